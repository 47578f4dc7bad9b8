"""A killed run goes on as if nothing had happened: weights, optimizer, order of samples, metrics (bit for bit on the CPU)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import systems
from safetensors.torch import load_file

from mmllm.config.load import load
from mmllm.config.run import RunConfig
from mmllm.errors import CheckpointError, TrainingError
from mmllm.training import checkpoint
from mmllm.training.run import train

# 17 samples in batches of 4: steps 1-5 are epoch one, 6-10 epoch two, then the second stage. Dropout is on in the adapter.
STAGES = (
    systems.stage(save_every=1),
    systems.stage("instruct", train=["inputs.*.projector", "backbone.adapter"], epochs=1, save_every=2),
)


class Killed(BaseException):
    """Stands for a power cut: nothing in the code catches it."""


def final_state(folder: Path) -> dict[str, bytes]:
    """All weights and optimizer tensors at the end of a run, as bytes."""
    newest = checkpoint.checkpoints(folder)[-1]
    files = [*newest.rglob("*.safetensors"), *(folder / "final").rglob("*.safetensors")]
    return {
        f"{file.relative_to(folder)}:{name}": tensor.numpy().tobytes()
        for file in files
        for name, tensor in load_file(file).items()
    }


def metrics(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    config, context = systems.system(folder, *STAGES, keep_last=50)
    train(config, context)
    return folder / "run"


def kill_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Let the process 'die' in the ``calls``-th forward pass (micro-batch) of the run."""
    from mmllm.training.loop import SummedLoss

    forward, count = SummedLoss.forward, 0

    def counting(self: SummedLoss, batch: object) -> object:
        nonlocal count
        count += 1
        if count == calls:
            raise Killed
        return forward(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(SummedLoss, "forward", counting)


# Two micro-batches per step, one in the last step of an epoch (a single sample): 9 an epoch, 18 in the first stage.
@pytest.mark.parametrize(
    "forward",
    [1, 3, 6, 9, 10, 12, 18, 19, 23, 27],
    ids=[
        "before any checkpoint", "second step", "mid-accumulation", "last step of epoch one", "first step of epoch two",
        "mid-accumulation in epoch two", "last step of the stage", "stage boundary", "between two saves", "last step",
    ],
)  # fmt: skip
def test_a_killed_run_resumes_bit_for_bit(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: int
) -> None:
    config, context = systems.system(tmp_path, *STAGES, keep_last=50)
    with monkeypatch.context() as patch:
        kill_after(patch, forward)
        with pytest.raises(Killed):
            train(config, context)
    train(config, context, resume=True)
    assert final_state(tmp_path / "run") == final_state(uninterrupted)
    assert metrics(tmp_path / "run") == [
        {**row, "data": now["data"]} if "data" in row else row
        for row, now in zip(metrics(uninterrupted), metrics(tmp_path / "run"), strict=True)
    ]
