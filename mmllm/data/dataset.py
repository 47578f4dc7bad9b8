"""Encoded samples for the training loop; what happens with a sample that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmllm.config.base import BuildContext
from mmllm.config.run import StageConfig
from mmllm.data.mixture import DRAWS, StageData
from mmllm.data.tokens import token_lengths
from mmllm.errors import ConfigError, DataError, MediaError

if TYPE_CHECKING:
    from mmllm.processing.batch import Encoded
    from mmllm.processing.processor import Processor

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
class SampleStream:
    """A stage's data for the training loop. Stateless and picklable: every worker of every process answers alike."""

    data: StageData

    def load(self, index: int, processor: Processor, max_length: int, batch: Collection[int] = ()) -> Loaded:
        """The sample at ``index``, or a replacement when it is bad (``DataError``, ``MediaError``, ``SampleTooLong``).

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
                return Loaded(processor.encode_sample(self.data[candidate], max_length), tuple(failures))
            except (DataError, MediaError) as error:
                failures.append(Failure(candidate, self.data.where(candidate), type(error).__name__, str(error)))
            taken.add(candidate)
            # A source smaller than the batch has nothing outside it: after enough draws a sample comes twice.
            draws = [next(replacements) for _ in range(DRAWS)]
            candidate = next((draw for draw in draws if draw not in taken), draws[0])
        raise DataError(f"{MAX_FAILURES} samples in a row cannot be used; the first causes:\n{causes(failures)}")


def open_stage(stage: StageConfig, seed: int, context: BuildContext, processor: Processor | None = None) -> StageData:
    """The stage's training data. Raises ``DataError``, or ``ConfigError`` when an epoch does not fill one batch.

    ``processor`` counts tokens where the stage's ``mixture`` is of them, and is needed then.
    """
    data = StageData(stage.data, seed, context, token_lengths(stage, processor))
    size = data.epoch_size(0)
    if size < stage.batch_size:
        text = f"is {stage.batch_size}, but an epoch has only {size} samples; lower it or give more data"
        raise ConfigError([(f"stages.{stage.name}.batch_size", text)])
    return data


@dataclass
class SkipLog:
    """Counts skipped samples by reason, in the main process; ends a run when their share is above ``max_share``."""

    max_share: float = 0.1
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[Failure] = field(default_factory=list)
    used: int = 0
    met: set[int] = field(default_factory=set)

    @property
    def skipped(self) -> int:
        """How many tries failed; a bad sample counts each time it is met."""
        return self.reasons.total()

    def add(self, loaded: Loaded) -> list[Failure]:
        """Count one loaded sample. Returns its failures of samples not met before, for the log.

        Raises ``DataError`` with the first causes once more than ``max_share`` of the tries (at least 100, unless it is 0)
        failed.
        """
        self.used += 1
        self.reasons.update(failure.reason for failure in loaded.failures)
        fresh = [failure for failure in loaded.failures if failure.index not in self.met]
        self.met.update(failure.index for failure in fresh)
        self.first = (self.first + fresh)[:5]
        tries = self.used + self.skipped
        if (tries >= MAX_FAILURES or not self.max_share) and self.skipped > self.max_share * tries:
            raise DataError(
                f"{self.skipped} of {tries} samples cannot be used, the limit is {self.max_share:.0%} (`max_skipped`); "
                f"`mmllm data validate` lists all faults of a file. The first causes:\n{causes(self.first)}"
            )
        return fresh


def causes(failures: Sequence[Failure]) -> str:
    """The first five failures, a line each, beginning with ``file:line``."""
    texts = (f.message if f.message.startswith(f.where) else f"{f.where}: {f.message}" for f in failures[:5])
    return "\n".join(f"  {text}" for text in texts)
