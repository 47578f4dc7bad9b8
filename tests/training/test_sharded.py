"""FSDP2 on two processes (gloo) computes what DDP and one process do, and leaves the same files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import squares
import systems
from safetensors.torch import load_file

from mmllm.config.base import BuildContext
from mmllm.config.load import dump, load
from mmllm.errors import TrainingError
from mmllm.training import checkpoint
from mmllm.training.run import train

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


def launch(config: Path, *arguments: str, sharded: bool) -> None:
    """`mmllm train` on two processes to its end."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if sharded else {}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "mmllm", "train", str(config), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **asked}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same three stages on one process, and on two with DDP and with FSDP2."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "ddp", "fsdp")}
    for name, folder in folders.items():
        config = systems.write_config(folder, *three_stages(), model=MODEL, keep_last=100)
        if name == "one":
            train(load(config), BuildContext(root=folder))
        else:
            launch(config, sharded=name == "fsdp")
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


def interrupted(folder: Path, place: Path) -> Path:
    """A copy of a run, as it stood at step 2 of its second stage."""
    copy = place / "run"
    shutil.copytree(folder / "run", copy)
    shutil.rmtree(copy / "final")
    for path in checkpoint.checkpoints(copy):
        if path.name > "1-instruct-00000002":
            shutil.rmtree(path)
    assert checkpoint.checkpoints(copy)[-1].name == "1-instruct-00000002"
    return copy


def final(run: Path) -> dict[str, Any]:
    return load_file(run / "final" / "parts.safetensors")


def test_a_sharded_run_resumes_to_the_same_bits(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = interrupted(runs["fsdp"], tmp_path)
    launch(runs["fsdp"] / "config.yaml", f"output={copy}", "--resume", sharded=True)
    resumed, whole = final(copy), final(runs["fsdp"] / "run")
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if not resumed[name].equal(whole[name])] == []


def test_one_process_goes_on_from_a_sharded_checkpoint(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = interrupted(runs["fsdp"], tmp_path)
    config = load(runs["fsdp"] / "config.yaml", [f"output={copy}"])
    train(config, BuildContext(root=runs["fsdp"]), resume=True)
    resumed, whole = final(copy), final(runs["one"] / "run")
    for name, tensor in whole.items():
        assert (resumed[name] - tensor).abs().max() <= 1e-4, name


def test_parameters_without_a_dimension_are_averaged(tmp_path: Path) -> None:
    """The logit scale of retrieval, and features that processes exchange; in the last batch one process has nothing."""
    stage = squares.stage(batch_size=4, epochs=2, objectives={"text": 1.0, "contrastive": 1.0})
    stage["train"] = ["backbone.new_tokens", "outputs.image.retrieval"]
    for name, size in (("one", 4), ("two", 2)):
        squares.write_squares(tmp_path / name, count=9, text_every=5)
        config = squares.system(tmp_path / name, {**stage, "micro_batch_size": size})
        (tmp_path / name / "config.yaml").write_text(dump(config))
    launch(tmp_path / "two" / "config.yaml", sharded=True)
    train(load(tmp_path / "one" / "config.yaml"), BuildContext(root=tmp_path / "one"))
    for alone, together in zip(systems.rows(tmp_path / "one"), systems.rows(tmp_path / "two"), strict=True):
        assert together["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    one, two = final(tmp_path / "one" / "run"), final(tmp_path / "two" / "run")
    scale = "outputs.image.retrieval.logit_scale"
    assert two[scale] == pytest.approx(float(one[scale]), abs=1e-6)


def test_the_first_fsdp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    config, context = systems.system(tmp_path)
    with pytest.raises(TrainingError, match="fsdp_version: 2"):
        train(config, context)
