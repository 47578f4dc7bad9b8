"""Rows T01 to T14 of the faults a run must survive: kills, full disks, signals, and what checkpoints hold."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import children
import pytest
import systems
import torch
import yaml
from safetensors.torch import load_file

from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.errors import CheckpointError, TrainingError
from mmllm.model import MultimodalLM
from mmllm.processing.processor import Processor
from mmllm.training import checkpoint
from mmllm.training.loop import seed_step
from mmllm.training.run import open_run, train
from mmllm.training.stage_run import StageRun
from mmllm.training.stages import freeze, resolve

# 17 samples in batches of 4 are five steps an epoch. Two micro-batches a step; the adapter has dropout.
STAGE = systems.stage(train=["inputs.*.projector", "backbone.adapter"], save_every=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted run of three epochs and all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    train(*systems.system(folder, {**STAGE, "epochs": 3}, keep_last=50))
    return folder


@pytest.mark.parametrize("step", [1, 3, 5, 6], ids=["first", "mid-epoch", "last of epoch", "first of epoch two"])
def test_T01_a_run_that_was_killed_ends_in_the_same_bits(whole: Path, tmp_path: Path, step: int) -> None:
    systems.write_config(tmp_path, {**STAGE, "epochs": 3}, keep_last=50)
    killed = children.start(tmp_path, (children.at_step, step, (children.kill,)), (children.train, tmp_path))
    assert children.exit_codes(killed) == [-signal.SIGKILL]
    assert len(checkpoint.checkpoints(tmp_path / "run")) == step - 1
    train(load(tmp_path / "config.yaml"), BuildContext(root=tmp_path), resume=True)
    assert systems.final_state(tmp_path / "run") == systems.final_state(whole / "run")
    assert systems.metrics(tmp_path / "run") == systems.metrics(whole / "run")


def test_T02_the_samples_go_on_from_every_checkpoint_of_three_epochs(whole: Path, tmp_path: Path) -> None:
    ids = systems.step_ids(whole / "run")
    assert len(ids) == 15
    for epoch in range(3):
        assert sorted(chain(*ids[epoch * 5 : epoch * 5 + 5])) == [f"s{i:02d}" for i in range(17)]
    assert len({*map(str, ids)}) == 15, "another order in every epoch"
    for found in checkpoint.checkpoints(whole / "run"):
        run, done = tmp_path / found.name, int(found.name[-8:])
        shutil.copytree(found, run / "checkpoints" / found.name)
        config = load(whole / "config.yaml", [f"output={run}", "stages.align.save_every=null"])
        train(config, BuildContext(root=whole), resume=True)
        assert (systems.step_ids(run) if done < 15 else []) == ids[done:], found.name


class NoFiles:
    """A processor without files: the tokenizer's many writes are not what this test is about."""

    def save(self, folder: Path) -> None:
        (folder / "processor.json").write_text("{}")


@pytest.mark.parametrize("call", ["mkdir", "write_text", "rename", "sync", "rmtree"])
def test_T04_a_valid_checkpoint_exists_at_every_moment_of_a_save(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Killed at every call of a kind, with one checkpoint kept (accelerate removes the old one first)."""
    config, context = systems.system(tmp_path, STAGE, keep_last=1)
    run, processor = tmp_path / "run", NoFiles()
    owner: Any = {"mkdir": Path, "write_text": Path, "rename": Path, "sync": checkpoint, "rmtree": shutil}[call]
    name = "_sync" if call == "sync" else call
    original = getattr(owner, name)
    model = MultimodalLM.from_config(config.model, context)
    for at in range(1, 40):
        shutil.rmtree(run, ignore_errors=True)
        older = "0-align-00000002"
        shutil.copytree(whole / "run" / "checkpoints" / older, run / "checkpoints" / older)
        calls = 0

        def dying(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:  # noqa: B023
                raise systems.Killed
            return original(*args, **kwargs)

        def save() -> None:
            position = checkpoint.Position("align", 3, False, "", {})
            newer = run / "checkpoints" / "0-align-00000003"
            checkpoint.save(newer, model, processor, config, context, [], position=position)  # type: ignore[arg-type]
            checkpoint.remove_old(run, keep=1)

        try:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, dying)
                save()
        except systems.Killed:
            assert checkpoint.latest_valid(run) is not None, f"call {at}"
            # Restarted, in a container under the same process id, the run saves the same step again.
            save()
            assert checkpoint.latest_valid(run) == run / "checkpoints" / "0-align-00000003"
        else:
            break
    assert calls > 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["0-align-00000003"]


def test_T05_a_full_disk_ends_the_run_with_its_last_checkpoint_intact(whole: Path, tmp_path: Path) -> None:
    systems.write_config(tmp_path, {**STAGE, "epochs": 3}, keep_last=50)
    full = children.start(tmp_path, (children.at_step, 3, (children.limit_files, 50_000)), (children.train, tmp_path))
    assert children.exit_codes(full) == [1]
    printed = children.output(tmp_path)
    assert "CheckpointError: cannot write" in printed
    assert "checkpoints written before are untouched" in printed
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["0-align-00000001", "0-align-00000002"], "nothing half-written is left"
    train(load(tmp_path / "config.yaml"), BuildContext(root=tmp_path), resume=True)
    assert systems.final_state(tmp_path / "run") == systems.final_state(whole / "run")


@pytest.mark.parametrize("size", [0, 200, 3_000, 10_000, 50_000])
def test_T05_whatever_file_the_disk_refuses(whole: Path, tmp_path: Path, size: int) -> None:
    """Settings, tokenizer (a library with errors of its own), adapter, weights."""
    config, context = load(whole / "config.yaml"), BuildContext(root=whole)
    model, processor = MultimodalLM.from_config(config.model, context), Processor.from_config(config.model, context)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        children.limit_files(size)
        with pytest.raises(CheckpointError, match=r"cannot write .*final: .*checkpoints written before are untouched"):
            checkpoint.save(tmp_path / "final", model, processor, config, context, ["backbone.adapter"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "data.json", "environment.json", "run.md"])
def test_T05_a_log_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = Path.open

    def full(self: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if mode in ("w", "a") and self.name in (name, f".{name}.tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, mode, *arguments, **named)

    config, context = systems.system(tmp_path, STAGE)
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(TrainingError, match=rf"cannot write .*{name}: No space left on device; checkpoints written"):
        train(config, context)


def test_T08_a_signal_to_one_process_of_two_stops_both_at_the_same_step(tmp_path: Path) -> None:
    systems.write_config(tmp_path, {**STAGE, "epochs": 500, "save_every": None})
    processes = children.start_two(tmp_path, (children.train, tmp_path))
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count('"loss"') > 2):
        assert all(process.is_alive() for process in processes), children.output(tmp_path)
        time.sleep(0.05)
    os.kill(processes[1].pid or 0, signal.SIGTERM)
    assert children.exit_codes(*processes) == [143, 143]
    (saved,) = checkpoint.checkpoints(tmp_path / "run")
    checkpoint.verify(saved)
    assert checkpoint.read_position(saved).step == systems.rows(tmp_path)[-1]["step"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_T08_a_signal_to_the_data_workers_too(tmp_path: Path, number: int, code: int) -> None:
    systems.write_config(tmp_path, {**STAGE, "num_workers": 2, "save_every": None})
    stopped = children.start(
        tmp_path, (os.setpgrp,), (children.at_step, 2, (children.signal_group, number)), (children.train, tmp_path)
    )
    assert children.exit_codes(stopped) == [code], children.output(tmp_path)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["0-align-00000002"]


def test_T10_a_checkpoint_opens_with_one_call_anywhere(whole: Path, tmp_path: Path) -> None:
    """LLaVA #1245: what was saved on the way is a whole model, configuration and processor included."""
    folder = whole / "run" / "checkpoints" / "0-align-00000003"
    call = [
        {"role": "user", "content": [{"type": "image", "path": str(whole / "red.png")}, {"type": "text", "text": "?"}]}
    ]
    program = f"import mmllm; print('said', repr(str(mmllm.load({str(folder)!r}).chat({call!r}, max_new_tokens=3))))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("said '")


@pytest.mark.parametrize(
    ("train_part", "targets"),
    [
        ("backbone.adapter", ["model.embed_tokens"]),
        ("backbone.adapter", r".*\.embed_tokens|.*\.q_proj"),
        ("backbone.modules.model.embed_tokens", None),
    ],
    ids=["LoRA by qualified name", "LoRA by pattern", "the table itself"],
)
def test_T11_trained_embeddings_are_saved(tmp_path: Path, train_part: str, targets: Any) -> None:
    file = systems.write_config(tmp_path, {**STAGE, "train": [train_part], "max_steps": 2, "epochs": None})
    tree = yaml.safe_load(file.read_text())
    adapter = tree["model"]["backbone"].pop("adapter")
    if targets is not None:
        tree["model"]["backbone"]["adapter"] = {**adapter, "targets": targets}
    file.write_text(yaml.safe_dump(tree))
    config, context = load(file), BuildContext(root=tmp_path)
    run = open_run(config, context, config.stages)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if "embed_tokens" in name}
    stage_run = StageRun(run, config.stages[0])
    stage_run.run()
    after = {name: p for name, p in run.model.named_parameters() if "embed_tokens" in name}
    assert any(not torch.equal(before[name], after[name]) for name in after)
    again = MultimodalLM.from_config(config.model, context)
    checkpoint.load_parts(again, checkpoint.checkpoints(tmp_path / "run")[-1])
    found = dict(again.named_parameters())
    assert all(torch.equal(found[name], after[name]) for name in after)


def test_T12_lora_learns_with_gradient_checkpointing_as_without(tmp_path: Path) -> None:
    """transformers #26221: embeddings that need no gradient cut the adapter off."""
    config, context = systems.system(tmp_path, {**STAGE, "train": ["backbone.adapter"]})
    processor = Processor.from_config(config.model, context)
    gradients: dict[bool, dict[str, torch.Tensor]] = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = MultimodalLM.from_config(config.model, context)
        parts = resolve(config.stages[0], model.parts())
        freeze(model, parts, gradient_checkpointing=checkpointing)
        parameters = parts[0].parameters
        optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
        data = StageRunData(config, context, processor)
        for step in range(2):
            optimizer.zero_grad()
            seed_step(0, "align", step, 0)
            model(data.batch(step))["text"].backward()
            if step == 1:
                gradients[checkpointing] = {
                    name: p.grad.clone() for name, p in parameters.items() if p.grad is not None
                }
            optimizer.step()
        learned = [bool(p.any()) for name, p in parameters.items() if "lora_B" in name]
        assert learned
        assert all(learned)
    assert gradients[True].keys() == gradients[False].keys() == parameters.keys()
    for name, gradient in gradients[False].items():
        assert torch.allclose(gradients[True][name], gradient, rtol=0, atol=1e-6), name


class StageRunData:
    """Batches of four samples of a stage, in order."""

    def __init__(self, config: Any, context: BuildContext, processor: Processor) -> None:
        from mmllm.data.mixture import StageData

        self.data, self.processor = StageData(config.stages[0].data, 0, context), processor

    def batch(self, number: int) -> Any:
        chosen = self.data.order(0)[4 * number : 4 * number + 4]
        return self.processor.collate([self.processor.encode_sample(self.data[i], 2048) for i in chosen])


@pytest.mark.parametrize(
    "patterns",
    [
        ["inputs.*.projector"],
        ["inputs.image.projector", "backbone.new_tokens"],
        ["backbone.adapter"],
        ["inputs.*.encoder"],
    ],
    ids=" ".join,
)
def test_T14_what_a_stage_declares_is_what_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patterns: list[str]
) -> None:
    config, context = systems.system(tmp_path, {**STAGE, "train": patterns, "epochs": None, "max_steps": 2})
    run = open_run(config, context, config.stages)
    parts = run.model.parts()
    declared = {n: p for part in resolve(config.stages[0], parts) for n, p in part.parameters.items()}
    stage_run = StageRun(run, config.stages[0])
    held = {id(p) for group in stage_run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in declared.values()}
    gradients: set[str] = set()
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *arguments: Any, **named: Any) -> Any:
        gradients.update(name for name, p in declared.items() if p.grad is not None)
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    stage_run.run()
    assert gradients == declared.keys()
    changed = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= declared.keys()
    assert {n.split(".")[1] for n in changed} == {n.split(".")[1] for n in declared}
    saved = load_file(checkpoint.checkpoints(tmp_path / "run")[-1] / "parts.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in saved.keys() - declared.keys())
