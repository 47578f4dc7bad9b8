"""The training loop: one optimizer step after another, the same on one process or many."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmllm.config.run import StageConfig
from mmllm.data.dataset import SkipLog
from mmllm.errors import TrainingError
from mmllm.model import MultimodalLM
from mmllm.processing.batch import Batch
from mmllm.training import sharding
from mmllm.training.batches import StepData
from mmllm.training.micro_batches import filler
from mmllm.training.optimizer import lr_factor, set_rates
from mmllm.training.stages import GradientWatch, TrainedPart

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

# Steps in a row without finite loss and gradient after which a run ends. fp16 needs a few to find its loss scale.
NONFINITE_LIMIT = 20


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all processes. ``loss`` is what was minimised, ``losses`` the objectives' means
    of which it is the weighted sum (``text`` in nats per supervised token).

    ``step`` counts the stage's steps so far, this one included; ``lr`` is the stage's rate (parts may have their own);
    ``updated`` is False when nothing was learned (non-finite); ``skipped`` counts bad samples by kind of error; ``ids`` are
    the samples in the order of the global batch, whatever the number of processes.
    """

    step: int
    epoch: float
    loss: float
    losses: dict[str, float]
    tokens: int
    samples: int
    lr: float
    grad_norm: float
    updated: bool
    skipped: dict[str, int]
    ids: list[str]


class SummedLoss(nn.Module):
    """What accelerate prepares, anew for every stage: the model as a function from a batch to its summed losses."""

    def __init__(self, model: MultimodalLM, objectives: Collection[str] = ("text",)) -> None:
        super().__init__()
        self.model, self.objectives = model, objectives

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Summed losses by objective, float32 scalars."""
        losses: dict[str, Tensor] = self.model(batch, self.objectives)
        return losses


def run_steps(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    parts: list[TrainedPart],
    stage: StageConfig,
    steps: Iterable[StepData],
    *,
    total: int,
    seed: int,
    skips: SkipLog,
    stopping: Callable[[], bool],
    after: Callable[[StepResult, bool], bool],
) -> None:
    """Take ``steps`` of a stage of ``total``. ``model`` (a ``SummedLoss``) and ``optimizer`` are accelerate's.

    Loss of a step = over the stage's objectives, weight times sum of the terms of the whole global batch / their number
    (``text``: supervised tokens), whatever the number of processes and the size of micro-batches. ``after(result,
    stop)`` is called behind every step on every process and answers whether the loop ends here; ``stop`` says that some
    process answered ``stopping()``. Raises ``TrainingError`` after ``NONFINITE_LIMIT`` steps in a row with a loss or
    gradient that is not finite.
    """
    from accelerate.utils import gather_object

    parameters = [p for part in parts for p in part.parameters.values()]
    objectives: dict[str, float] = dict(stage.objectives)  # type: ignore[arg-type]
    watch, nonfinite = GradientWatch(parts), 0
    for data in steps:
        seed_step(seed, stage.name, data.step, accelerator.process_index)
        _fill_up(accelerator, data)
        reasons = _count_skipped(data, skips)
        own = [data.counts[name] for name in objectives]
        totals = total_of(accelerator, [*own, data.tokens, len(data.ids), len(reasons)])
        terms = dict(zip(objectives, totals, strict=False))
        tokens, samples, skipped = (int(n) for n in totals[-3:])
        factor = lr_factor(data.step, total, stage.optimizer)
        set_rates(optimizer, factor)
        # DDP averages gradients over processes.
        scales = {name: w * accelerator.num_processes / max(terms[name], 1) for name, w in objectives.items()}
        detached = []
        for number, (batch, weight) in enumerate(data.micro, start=1):
            with sharding.accumulating(accelerator, model, last=number == len(data.micro)):
                with accelerator.autocast():
                    losses_of = model(batch.to(accelerator.device))
                found = {name: loss * weight for name, loss in losses_of.items()}
                accelerator.backward(sum(loss * scales[name] for name, loss in found.items()))
            zero = torch.zeros((), device=accelerator.device)
            detached.append(torch.stack([found[name].detach() if name in found else zero for name in objectives]))
        sums = torch.stack(detached).tolist()  # one wait for the device, not one per micro-batch
        losses = [sum(row) for row in sums]
        sharding.average_whole(accelerator, parameters)
        norm = float(accelerator.clip_grad_norm_(parameters, stage.optimizer.clip or math.inf))
        *over_all, stops = total_of(accelerator, [*(sum(c) for c in zip(*sums, strict=True)), stopping()])
        means = {name: value / max(terms[name], 1) for name, value in zip(objectives, over_all, strict=True)}
        loss = sum(objectives[name] * mean for name, mean in means.items())
        finite = math.isfinite(loss) and math.isfinite(norm)
        nonfinite = 0 if finite else nonfinite + 1
        if finite:
            for name in watch(data.modalities):
                log.warning("%s is trained, but its gradients have all been zero so far", name)
        else:
            _report_nonfinite(accelerator, data, losses, norm, nonfinite)
        # The fp16 scaler leaves the weights alone by itself and lowers its scale when a gradient overflows.
        if finite or accelerator.scaler is not None:
            optimizer.step()
        optimizer.zero_grad()
        counts = dict(Counter(gather_object(reasons))) if skipped else {}
        lr, ids = stage.lr * factor, _global_ids(accelerator, data)
        if after(
            StepResult(data.step + 1, data.epoch, loss, means, tokens, samples, lr, norm, finite, counts, ids),
            stops > 0,
        ):
            return


def _fill_up(accelerator: Accelerator, data: StepData) -> None:
    """Give every process as many micro-batches as the one with the most: gradients are exchanged in each."""
    if accelerator.num_processes > 1:
        counts: Tensor = accelerator.gather(torch.tensor([len(data.micro)], device=accelerator.device))
        data.micro += [(filler(data.micro[-1][0]), 0.0)] * (int(counts.max()) - len(data.micro))


def _count_skipped(data: StepData, skips: SkipLog) -> list[str]:
    """Log bad samples met for the first time; the reasons of all. Raises ``DataError`` when too many are bad."""
    for loaded in data.loaded:
        for failure in skips.add(loaded):
            log.warning("skipped %s: %s", failure.where, failure.message)
    return [failure.reason for loaded in data.loaded for failure in loaded.failures]


def _global_ids(accelerator: Accelerator, data: StepData) -> list[str]:
    """The sample ids of the whole step. A global batch is dealt out one by one, so a process's n-th has its place in it."""
    own = [loaded.encoded.id for loaded in data.loaded]
    if accelerator.num_processes == 1:
        return own
    from accelerate.utils import gather_object

    placed = gather_object([(place, accelerator.process_index, id) for place, id in enumerate(own)])
    return [id for _, _, id in sorted(placed)]


def _report_nonfinite(accelerator: Accelerator, data: StepData, losses: list[float], norm: float, times: int) -> None:
    """Log the samples of a step without finite loss or gradient on all processes; stop the run after too many in a
    row.
    """
    from accelerate.utils import gather_object

    bad = [b for (b, weight), loss in zip(data.micro, losses, strict=True) if weight and not math.isfinite(loss)]
    own = [id for batch in bad for id in batch.sample_ids]
    ids = gather_object(own) or gather_object(data.ids)
    text = f"step {data.step}: loss or gradient norm ({norm:.3g}) is not finite, nothing was learned; {', '.join(ids)}"
    log.warning(text)
    if times >= NONFINITE_LIMIT:
        raise TrainingError(f"{text}. This is step {times} in a row; lower the rate, or look at these samples")


def total_of(accelerator: Accelerator, values: list[Any]) -> list[float]:
    """Sums over all processes, in float64 (exact for counts)."""
    if accelerator.num_processes == 1:
        return [float(v) for v in values]
    local = torch.tensor([float(v) for v in values], dtype=torch.float64, device=accelerator.device)
    reduced: Tensor = accelerator.reduce(local, "sum")
    return [float(value) for value in reduced]


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: SummedLoss, batches: Iterable[Batch | None]) -> dict[str, float]:
    """The objectives' mean losses over all processes' batches. Leaves every module's train/eval mode as it was.

    Raises ``TrainingError`` when no batch holds a usable sample.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    names = list(model.objectives)
    losses, terms = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for batch, counts in sharding.in_step(accelerator, batches):
        with accelerator.autocast():
            found = model(batch.to(accelerator.device))
        if counts:
            for name in names:
                losses[name] += float(found.get(name, 0.0))
                terms[name] += batch.counts[name]
    for module, mode in modes.items():
        module.training = mode
    totals = total_of(accelerator, [*losses.values(), *terms.values()])
    means = {n: loss / max(count, 1) for n, loss, count in zip(names, totals, totals[len(names) :], strict=False)}
    if not sum(totals[len(names) :]):
        raise TrainingError("the evaluation data hold no usable sample; `mmllm data validate` names the reasons")
    return means


def seed_step(seed: int, stage: str, step: int, rank: int) -> None:
    """Set Python's, NumPy's and torch's random states from the place in the run.

    Every step starts from its own state, so a resumed run draws what the uninterrupted one drew, whatever was drawn
    between steps (evaluation, sample generation).
    """
    entropy = [seed % 2**64, *stage.encode(), step, rank]
    state = np.random.SeedSequence(entropy).generate_state(3, np.uint32)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))
