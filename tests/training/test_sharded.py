"""FSDP2 on two processes (gloo) computes what DDP and one process do, and leaves the same files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import systems
from safetensors.torch import load_file

from mmllm.training.run import train

ROOT = Path(__file__).parent.parent.parent
LORA = {"kind": "lora", "rank": 2, "alpha": 4}  # without dropout, which every process draws for itself
MODEL = {**systems.MODEL, "backbone": {**systems.MODEL["backbone"], "adapter": LORA}}


def three_stages(**changes: Any) -> list[dict[str, Any]]:
    """10 steps of what the other tests train, 5 with LoRA, 5 with the backbone and an encoder themselves; one sample a
    micro-batch, so that the processes hold different modalities most of the time, and one holds nothing at an epoch's end.
    """
    common = {"micro_batch_size": 1, "epochs": 1, **changes}
    lora = ["inputs.*.projector", "backbone.adapter", "backbone.new_tokens"]
    held_out = {"eval_data": [{"reader": {"kind": "messages", "path": "data.jsonl"}}], "eval_every": 5, "samples": 1}
    return [
        systems.stage("align", **{**common, "epochs": 2, **held_out}),
        systems.stage("instruct", **common, train=lora, gradient_checkpointing=True, save_every=2),
        systems.stage("whole", **common, train=["backbone", "inputs.image.*"], lr=0.001),
    ]


def launch(config: Path, *arguments: str, sharded: bool, script: str = "pretrain.py") -> None:
    """Run a training script on two processes to its end."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if sharded else {}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "training" / script), str(config), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **asked}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same three stages on one process, and on two with DDP and with FSDP2."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "ddp", "fsdp")}
    for name, folder in folders.items():
        config = systems.write_config(folder, *three_stages(), model=MODEL)
        if name == "one":
            loaded, context = systems.system(folder, *three_stages(), model=MODEL)
            train(loaded, context)
        else:
            launch(config, sharded=name == "fsdp")
            launch(config, sharded=name == "fsdp", script="instruct.py")
    return folders


@pytest.mark.parametrize("other", ["one", "ddp"])
def test_the_losses_of_twenty_steps_are_the_same(runs: dict[str, Path], other: str) -> None:
    sharded, reference = systems.rows(runs["fsdp"]), systems.rows(runs[other])
    assert [row["step"] for row in sharded] == [row["step"] for row in reference]
    assert len(sharded) == 20
    for ours, theirs in zip(sharded, reference, strict=True):
        assert (ours["tokens"], ours["samples"]) == (theirs["tokens"], theirs["samples"])
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4, abs=1e-7)


def test_evaluation_and_replies_are_the_same(runs: dict[str, Path]) -> None:
    """17 samples one by one: one process has a batch more than the other."""
    sharded, reference = systems.rows(runs["fsdp"], "eval_loss"), systems.rows(runs["one"], "eval_loss")
    assert len(sharded) == len(reference) == 2
    for ours, theirs in zip(sharded, reference, strict=True):
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)
        assert ours["replies"] == theirs["replies"]


def test_the_directories_hold_the_same(runs: dict[str, Path]) -> None:
    found = {
        name: sorted(p.relative_to(folder / "run") for p in (folder / "run").rglob("*.safetensors"))
        for name, folder in runs.items()
    }
    assert found["fsdp"] == found["one"]
    assert any("optimizer" in file.name for file in found["one"])
    for file in found["one"]:
        ours, theirs = load_file(runs["fsdp"] / "run" / file), load_file(runs["one"] / "run" / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert ours[name].shape == tensor.shape
            assert (ours[name] - tensor).abs().max() <= 1e-4, (file, name)
