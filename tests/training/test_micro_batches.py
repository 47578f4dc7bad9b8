"""Micro-batches: every sample once, limits kept, and the same loss and gradients however they are cut (RELIABILITY D25)."""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import systems
import torch
from torch import Tensor

from mmllm.config.run import RunConfig, StageConfig
from mmllm.data.mixture import StageData
from mmllm.model import MultimodalLM
from mmllm.processing.batch import Batch, Encoded, Span
from mmllm.processing.processor import Processor
from mmllm.training import loop
from mmllm.training.batches import EvalDataset, StepData, StepDataset
from mmllm.training.micro_batches import batching_of, cut
from mmllm.training.run import train


def stage(**options: Any) -> StageConfig:
    return StageConfig(name="one", train=["x"], lr=1.0, data=["none.jsonl"], **options)  # type: ignore[list-item]


def sample(number: int, length: int, pictures: int = 0) -> Encoded:
    spans = [Span("image", place, 1, {}) for place in range(pictures)]
    return Encoded(str(number), [1] * length, [True] * length, spans)


@pytest.mark.parametrize("batching", ["packed", "grouped", "padded"])
@pytest.mark.parametrize("seed", range(5))
def test_every_sample_once_within_the_limits(batching: Any, seed: int) -> None:
    draw = random.Random(seed)
    samples = [sample(i, draw.randint(1, 90), draw.randint(0, 3)) for i in range(draw.randint(1, 40))]
    limits = {"micro_batch_size": draw.choice([1, 5, 40]), "micro_batch_tokens": draw.choice([None, 60, 300])}
    limits["micro_batch_media"] = draw.choice([None, 4])
    chunks = cut(samples, stage(batch_size=40, **limits), batching)
    assert sorted(int(s.id) for chunk in chunks for s in chunk) == list(range(len(samples)))
    for chunk in chunks:
        lengths = [len(s.ids) for s in chunk]
        tokens = sum(lengths) if batching == "packed" else len(chunk) * max(lengths)
        assert len(chunk) <= limits["micro_batch_size"]
        assert len(chunk) == 1 or limits["micro_batch_tokens"] is None or tokens <= limits["micro_batch_tokens"]
        assert len(chunk) == 1 or limits["micro_batch_media"] is None or sum(len(s.spans) for s in chunk) <= 4
    assert chunks == cut(samples, stage(batch_size=40, **limits), batching), "the same on every call"


def test_packed_ones_are_few_and_alike() -> None:
    lengths = [100, 10, 60, 50, 40, 30, 90, 20]
    chunks = cut([sample(i, n) for i, n in enumerate(lengths)], stage(micro_batch_tokens=100), "packed")
    assert [sum(len(s.ids) for s in chunk) for chunk in chunks] == [100, 100, 100, 100]
    halves = cut([sample(i, n) for i, n in enumerate(lengths)], stage(micro_batch_size=4), "packed")
    assert [sum(len(s.ids) for s in chunk) for chunk in halves] == [200, 200]


def test_grouped_ones_waste_less_than_padded_ones() -> None:
    samples = [sample(i, n) for i, n in enumerate([90, 10, 80, 20, 70, 30])]

    def padded(batching: Any) -> int:
        chunks = cut(samples, stage(micro_batch_size=2), batching)
        return sum(len(chunk) * max(len(s.ids) for s in chunk) for chunk in chunks)

    assert padded("padded") == 2 * (90 + 80 + 70)
    assert padded("grouped") == 2 * (90 + 70 + 20)
    assert [s.id for chunk in cut(samples, stage(micro_batch_size=2), "padded") for s in chunk] == list("012345")


def test_large_batches_are_cut_at_once() -> None:
    draw, begun = random.Random(0), time.process_time()
    samples = [sample(i, draw.randint(10, 2000)) for i in range(2048)]
    chunks = cut(samples, stage(batch_size=2048, micro_batch_size=8), "packed")
    assert len(chunks) == 256
    assert time.process_time() - begun < 5  # measured: 0.4 s


def test_evaluation_keeps_the_limit_of_tokens(tmp_path: Path) -> None:
    run, context = systems.system(tmp_path, systems.stage(micro_batch_tokens=1024, max_length=256, micro_batch_size=4))
    processor, one = Processor.from_config(run.model, context), run.stages[0]
    found = EvalDataset(StageData(one.data, 0, context), processor, one, rank=0, world=1, batching="packed")
    assert [len(chunk) for chunk in found.chunks] == [4, 4, 4, 4, 1]
    tight = one.model_copy(update={"micro_batch_tokens": 300})
    assert len(EvalDataset(StageData(one.data, 0, context), processor, tight, rank=0, world=1)) == 17


def gradients(run: RunConfig, context: Any, **options: Any) -> tuple[str, dict[str, Tensor]]:
    """How the first step of the run was cut, its summed loss and all gradients of the stage, from the same start."""
    torch.manual_seed(0)
    model, one = MultimodalLM.from_config(run.model, context), run.stages[0].model_copy(update=options)
    processor = Processor.from_config(run.model, context)
    batching = batching_of(one, model)
    if options.pop("trim", False):
        assert "last layer trimmed" in model.backbone.take_short_cuts()
    model.backbone.eval()  # without dropout
    data = StepDataset(StageData(one.data, 0, context), processor, one, rank=0, world=1, batching=batching)[0]
    torch.manual_seed(0)
    loss = sum(model(batch)["text"] for batch, _ in data.micro)
    assert isinstance(loss, Tensor)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return batching, {"loss": loss.detach(), **found}


def test_packed_equals_unpacked_in_loss_and_every_gradient(tmp_path: Path) -> None:
    """No attention across samples, no moved label, no medium in another's place."""
    run, context = systems.system(tmp_path, systems.stage(batch_size=8, micro_batch_size=8))
    how, expected = gradients(run, context, batching="padded", micro_batch_size=1)
    assert how == "padded"
    ways = itertools.product(("packed", "grouped", "padded"), (False, True), ({}, {"micro_batch_tokens": 150}))
    for batching, trim, limit in ways:
        how, found = gradients(run, context, batching=batching, trim=trim, **limit)
        assert how == batching
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            error = (tensor - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-6)
            assert error < 1e-5, (batching, trim, name, float(error))


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_twenty_steps_have_the_losses_of_padded_ones(tmp_path: Path, batching: str) -> None:
    losses = []
    for way in ("padded", batching):
        options = {"batching": way, "max_steps": 20, "epochs": None, "eval_data": [], "samples": 0}
        config, context = systems.system(
            tmp_path / way, systems.stage(**options), trackers=[], short_cuts=way != "padded"
        )
        train(config, context)
        rows = map(json.loads, (tmp_path / way / "run" / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert len(losses[0]) == 20
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), atol=1e-5, rtol=1e-5)


def test_backbones_and_objectives_that_cannot_pack(tmp_path: Path) -> None:
    run, context = systems.system(tmp_path)
    model = MultimodalLM.from_config(run.model, context)
    assert batching_of(run.stages[0], model) == "packed"
    assert batching_of(run.stages[0].model_copy(update={"objectives": {"itc": 1.0}}), model) == "padded"
    backbone = run.model.backbone.model_copy(update={"architecture": {"model_type": "mamba"}}).tiny()
    mamba = MultimodalLM.from_config(run.model.model_copy(update={"backbone": backbone}), context)
    assert batching_of(run.stages[0], mamba) == "grouped"


def test_a_process_with_fewer_micro_batches_runs_fillers() -> None:
    accelerator = SimpleNamespace(num_processes=2, device="cpu", gather=lambda own: torch.cat([own, torch.tensor([3])]))
    ids = torch.ones(1, 3, dtype=torch.int64)
    first = Batch(ids, ids, torch.tensor([1]), torch.tensor([1]), {}, ["a"])
    data = StepData(0, 0.0, [(first, 1.0)])
    loop._fill_up(accelerator, data)  # type: ignore[arg-type]
    assert [weight for _, weight in data.micro] == [1.0, 0.0, 0.0]
    assert data.tokens == first.tokens
    assert data.ids == first.sample_ids
