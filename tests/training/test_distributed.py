"""Two processes (gloo) compute what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import squares
import systems
import torch

from mmllm.config.base import BuildContext
from mmllm.config.load import dump, load
from mmllm.training.run import train

ROOT = Path(__file__).parent.parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def launch(config: Path) -> subprocess.Popen[str]:
    # --multi_gpu is accelerate's name for torchrun; without a GPU it gives as many CPU processes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, str(ROOT / "training" / "pretrain.py"), str(config)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_give_the_loss_of_one(tmp_path: Path) -> None:
    """17 samples in batches of 4, one sample per micro-batch, so most of the time the two processes hold different
    modalities, and in the last step of an epoch one holds nothing (DeepSpeed #7170, transformers #37186)."""
    stage = systems.stage(micro_batch_size=1)
    process = launch(systems.write_config(tmp_path / "two", stage))
    config, context = systems.system(tmp_path / "one", stage)
    train(config, context)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "2 process(es), cpu" in (tmp_path / "two" / "run" / "run.md").read_text()
    one, two = systems.rows(tmp_path / "one"), systems.rows(tmp_path / "two")
    assert len(one) == len(two) == 10
    for alone, together in zip(one, two, strict=True):
        assert (together["tokens"], together["samples"]) == (alone["tokens"], alone["samples"])
        # Largest differences measured: 0 in the loss, 1.2e-7 in the norm.
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-6)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)


def test_two_processes_tell_the_same_pictures_apart_as_one(tmp_path: Path) -> None:
    """9 samples in batches of 4, every fifth without a picture; the last batch leaves one process nothing to do, and what
    it then runs through must not be among the pictures."""
    stage = squares.stage(batch_size=4, epochs=2, objectives={"text": 1.0, "contrastive": 1.0})
    stage["train"] = ["backbone.new_tokens", "outputs.image.retrieval"]
    for name, size in (("one", 4), ("two", 2)):
        squares.write_squares(tmp_path / name, count=9, text_every=5)
        config = squares.system(tmp_path / name, {**stage, "micro_batch_size": size})
        (tmp_path / name / "config.yaml").write_text(dump(config))
    process = launch(tmp_path / "two" / "config.yaml")
    train(load(tmp_path / "one" / "config.yaml"), BuildContext(root=tmp_path / "one"))
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    one, two = systems.rows(tmp_path / "one"), systems.rows(tmp_path / "two")
    assert len(one) == len(two) == 6
    for alone, together in zip(one, two, strict=True):
        assert together["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    assert one[0]["losses"]["contrastive"] > 0.1
    assert one[2]["losses"]["contrastive"] == pytest.approx(0.0, abs=1e-5)  # a single picture


def test_a_launcher_that_starts_one_process_instead_of_two_is_refused(tmp_path: Path) -> None:
    """`accelerate launch --num_processes 2` without --multi_gpu on a machine without GPUs."""
    if torch.accelerator.is_available():
        pytest.skip("accelerate starts both where there are devices")
    environment = {**os.environ, "MASTER_PORT": "29500"}
    command = [sys.executable, str(ROOT / "training" / "pretrain.py"), str(systems.write_config(tmp_path))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert "--multi_gpu" in run.stderr
    assert "Traceback" not in run.stderr
