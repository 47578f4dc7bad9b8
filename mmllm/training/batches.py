"""From samples to the micro-batches of each optimizer step.

Everything here is a function of the step number: which samples, in which order, on which process. So a resumed run
needs no loader state but the step, any number of workers gives the same batches, and any number of processes the same
samples.
"""

from __future__ import annotations

import math
import signal
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from typing import Any

from torch.utils.data import DataLoader, Dataset

from mmllm.config.run import Batching, StageConfig
from mmllm.data.dataset import Loaded, SampleStream
from mmllm.data.mixture import StageData
from mmllm.errors import DataError, MediaError
from mmllm.processing.batch import OBJECTIVES, Batch, Encoded
from mmllm.processing.processor import Processor
from mmllm.training.micro_batches import cut, filler


@dataclass
class StepData:
    """One process's share of an optimizer step.

    ``micro`` holds ``(batch, weight)``; weight 0 marks a filler, run only because the other processes have a micro-batch
    there and gradient exchange needs everybody (``mmllm.training.loop`` adds what is missing). ``loaded`` has one entry per
    sample, emptied of its tensors: what was skipped on the way. ``epoch`` is how many epochs are done after this step.
    """

    step: int
    epoch: float
    micro: list[tuple[Batch, float]] = field(default_factory=list)
    loaded: list[Loaded] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Terms of each objective's sum that count."""
        own = [batch.counts for batch, weight in self.micro if weight]
        return {name: sum(counts[name] for counts in own) for name in OBJECTIVES}

    @property
    def tokens(self) -> int:
        """Supervised tokens that count."""
        return self.counts["text"]

    @property
    def ids(self) -> list[str]:
        """The samples that count."""
        return [id for batch, weight in self.micro if weight for id in batch.sample_ids]

    @property
    def modalities(self) -> set[str]:
        """What the batches hold, as part names begin: ``inputs.image``, ``outputs.image``."""
        taken = {f"inputs.{name}" for batch, _ in self.micro for name in (*batch.media, *batch.sentences)}
        return taken | {f"outputs.{name}" for batch, _ in self.micro for name in batch.made}


class StepDataset(Dataset[StepData]):
    """``dataset[step]`` is what process ``rank`` of ``world`` computes in that optimizer step.

    An epoch is cut into global batches of ``stage.batch_size`` samples; the last one is smaller and used as it is, so
    every sample of the epoch occurs exactly once. A global batch is dealt out to the processes one by one.
    """

    def __init__(
        self,
        data: StageData,
        processor: Processor,
        stage: StageConfig,
        *,
        rank: int,
        world: int,
        batching: Batching = "padded",
    ) -> None:
        self.stream, self.processor, self.stage = SampleStream(data), processor, stage
        self.rank, self.world, self.batching = rank, world, batching
        # ends[e] is the step after the last one of epoch e.
        self.ends = epoch_ends(data, stage)
        self._order = lru_cache(maxsize=1)(data.order)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=1)(self.stream.data.order)

    def place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the step's number within it."""
        epoch = bisect_right(self.ends, step)
        return epoch, step - (self.ends[epoch - 1] if epoch else 0)

    def indices(self, step: int) -> list[int]:
        """The global batch of a step: sample indices over all processes."""
        epoch, place = self.place(step)
        size = self.stage.batch_size
        return [int(index) for index in self._order(epoch)[place * size : (place + 1) * size]]

    def __getitem__(self, step: int) -> StepData:
        epoch, place = self.place(step)
        whole = self.indices(step)
        samples_done = place * self.stage.batch_size + len(whole)
        data = StepData(step, epoch + samples_done / self.stream.data.epoch_size(epoch))
        own = [self._load(index, whole, data) for index in whole[self.rank :: self.world]]
        pack = self.batching == "packed"
        data.micro = [(self.processor.collate(chunk, pack=pack), 1.0) for chunk in cut(own, self.stage, self.batching)]
        if not own:  # a process without samples takes part with another's
            one = self.processor.collate([self._load(whole[0], whole, None)], pack=pack)
            data.micro = [(filler(one), 0.0)]
        return data

    def _load(self, index: int, whole: list[int], data: StepData | None) -> Encoded:
        loaded = self.stream.load(index, self.processor, self.stage.max_length, whole)
        if data is not None:
            data.loaded.append(replace(loaded, encoded=Encoded(loaded.encoded.id, [], [], [])))
        return loaded.encoded


class EvalDataset(Dataset[Batch | None]):
    """Micro-batches of the evaluation data in file order; process ``rank`` takes every ``world``-th.

    Samples that cannot be used are left out, never replaced; None stands for a micro-batch without any usable one.
    """

    def __init__(
        self,
        data: StageData,
        processor: Processor,
        stage: StageConfig,
        *,
        rank: int,
        world: int,
        batching: Batching = "padded",
    ) -> None:
        self.data, self.processor, self.stage, self.pack = data, processor, stage, batching == "packed"
        size = stage.micro_batch_size
        if stage.micro_batch_tokens is not None:  # no sample is longer than `max_length`
            size = max(1, min(size, stage.micro_batch_tokens // stage.max_length))
        self.chunks = [range(start, min(start + size, len(data))) for start in range(0, len(data), size)][rank::world]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Batch | None:
        encoded = []
        for index in self.chunks[number]:
            try:
                encoded.append(self.processor.encode_sample(self.data[index], self.stage.max_length))
            except (DataError, MediaError):
                continue
        return self.processor.collate(encoded, pack=self.pack) if encoded else None


def epoch_ends(data: StageData, stage: StageConfig) -> list[int]:
    """For every epoch of the stage, the number of optimizer steps done at its end.

    The stage lasts ``epochs`` (a fraction ends within an epoch), or ``max_steps``, whichever is less; without either,
    one epoch.
    """
    epochs = stage.epochs if stage.epochs or stage.max_steps else 1.0
    limit = math.inf if stage.max_steps is None else stage.max_steps
    ends: list[int] = []
    for epoch in count():
        done = ends[-1] if ends else 0
        share = 1.0 if epochs is None else min(epochs - epoch, 1.0)
        if share <= 1e-9 or done >= limit:
            return ends
        # Rounded: 0.1 * 30 samples is 3, not 3.0000000000000004 and so 4 batches of one.
        steps = math.ceil(round(share * data.epoch_size(epoch), 6) / stage.batch_size)
        ends.append(int(min(done + steps, limit)))
    raise AssertionError("unreachable")


def loader(dataset: Dataset[Any], numbers: Sequence[int], num_workers: int) -> DataLoader[Any]:
    """Items of ``dataset`` at ``numbers``, in order, prepared ahead by ``num_workers`` processes."""
    return DataLoader(
        dataset, batch_size=None, sampler=numbers, num_workers=num_workers, worker_init_fn=_outlive_signals
    )


def _outlive_signals(_worker: int) -> None:
    """Ctrl-C reaches a terminal's whole process group, a scheduler's SIGTERM every process of a job: workers leave it to the
    main process to finish the step and save. They end when it does; a second SIGTERM ends them too, as torch's own may be.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
