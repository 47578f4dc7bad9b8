"""Encoded samples for the training loop; what happens with a sample that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmllm.config.base import BuildContext
from mmllm.config.run import DataSource, StageConfig
from mmllm.data.mixture import StageData
from mmllm.errors import ConfigError, DataError, MediaError

if TYPE_CHECKING:
    from mmllm.processing.processor import Encoded, Processor

MAX_FAILURES = 100
"""So many samples tried for one place in a batch, all of them bad, end the run."""


@dataclass(frozen=True)
class Failure:
    """A sample that could not be used: its index, ``file:line``, the error's class name and text."""

    index: int
    where: str
    reason: str
    message: str


@dataclass(frozen=True)
class Loaded:
    """A usable sample for one place in a batch, and the bad ones met before it."""

    encoded: Encoded
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class StageSamples:
    """A stage's data, encoded. Stateless and picklable: any worker of any process gives the same answer."""

    data: StageData
    processor: Processor
    max_length: int

    def order(self, epoch: int) -> list[int]:
        """Sample indices in the order of this epoch; every epoch has the same number."""
        return self.data.order(epoch)

    def sample_id(self, index: int) -> str:
        """The sample's id, or its ``file:line`` when the row cannot be read."""
        try:
            return self.data[index].id
        except DataError:
            return self.data.where(index)

    def encode(self, index: int) -> Encoded:
        """This sample and no other. Raises ``DataError``, ``MediaError`` or ``SampleTooLong``."""
        return self.processor.encode_sample(self.data[index], self.max_length)

    def load(self, index: int, batch: Collection[int] = ()) -> Loaded:
        """The sample at ``index``, or its replacement when it is bad (``DataError``, ``MediaError``, ``SampleTooLong``).

        The replacement is the first usable one of ``data.replacements(index)`` outside ``batch``, which is to be the
        whole global batch. It depends on the seed, the index and the batch, so it is the same for any number of
        processes and workers; and two bad neighbours do not both fall on the next good one.
        Raises ``DataError`` with the first causes after ``MAX_FAILURES`` bad samples.
        """
        failures: list[Failure] = []
        taken, candidate = set(batch), index
        replacements = self.data.replacements(index)
        while len(failures) < MAX_FAILURES:
            try:
                return Loaded(self.encode(candidate), tuple(failures))
            except (DataError, MediaError) as error:
                failures.append(Failure(candidate, self.data.where(candidate), type(error).__name__, str(error)))
            taken.add(candidate)
            # A source smaller than the batch has nothing outside it: after enough draws a sample comes twice.
            draws = [next(replacements) for _ in range(MAX_FAILURES)]
            candidate = next((draw for draw in draws if draw not in taken), draws[0])
        raise DataError(f"{MAX_FAILURES} samples in a row cannot be used; the first causes:\n{causes(failures)}")

    def modalities(self) -> set[str]:
        """All modalities that occur, without opening the media; rows that cannot be read do not count.

        Stops as soon as all of the model's have been seen, so it is slow (15,000 rows/s) only where one is missing.
        """
        found: set[str] = set()
        for index in self.order(0):
            try:
                sample = self.data[index]
            except DataError:
                continue
            found |= {part.type for message in sample.messages for part in message.parts if part.type != "text"}
            if found >= set(self.processor.modalities):
                break
        return found


def training_samples(stage: StageConfig, seed: int, processor: Processor, context: BuildContext) -> StageSamples:
    """The stage's training data. Raises ``DataError``, or ``ConfigError`` when an epoch does not fill one batch."""
    data = StageData(stage.data, seed, context)
    if data.epoch_size < stage.batch_size:
        text = f"is {stage.batch_size}, but an epoch has only {data.epoch_size} samples; lower it or give more data"
        raise ConfigError([(f"stages.{stage.name}.batch_size", text)])
    return StageSamples(data, processor, stage.max_length)


def eval_samples(
    sources: Sequence[DataSource], max_length: int, processor: Processor, context: BuildContext
) -> StageSamples:
    """Evaluation data; take the indices ``0 .. len(samples.data) - 1`` for file order."""
    return StageSamples(StageData(sources, 0, context), processor, max_length)


@dataclass
class SkipLog:
    """Counts skipped samples by reason, in the main process; ends the run when their share is above ``max_share``."""

    max_share: float = 0.1
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[Failure] = field(default_factory=list)
    used: int = 0
    met: set[int] = field(default_factory=set)

    @property
    def skipped(self) -> int:
        """How many tries failed; a bad sample counts each time it is met."""
        return self.reasons.total()

    def add(self, failures: Sequence[Failure], used: int) -> list[Failure]:
        """Count one step's failures and usable samples. Returns the failures of samples not met before, for the log.

        Raises ``DataError`` with the first causes once more than ``max_share`` of at least ``MAX_FAILURES`` tries failed.
        """
        self.used += used
        self.reasons.update(failure.reason for failure in failures)
        fresh = [failure for failure in failures if failure.index not in self.met]
        self.met.update(failure.index for failure in fresh)
        self.first = (self.first + fresh)[:5]
        tries = self.used + self.skipped
        if tries >= MAX_FAILURES and self.skipped > self.max_share * tries:
            raise DataError(
                f"{self.skipped} of {tries} samples cannot be used, the limit is {self.max_share:.0%}; "
                f"`mmllm data validate` lists all faults of a file. The first causes:\n{causes(self.first)}"
            )
        return fresh


def causes(failures: Sequence[Failure]) -> str:
    """The first five failures, a line each, beginning with ``file:line``."""
    texts = (f.message if f.message.startswith(f.where) else f"{f.where}: {f.message}" for f in failures[:5])
    return "\n".join(f"  {text}" for text in texts)
