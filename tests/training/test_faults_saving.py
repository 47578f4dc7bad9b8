"""Rows T23 to T26 of the faults a run must survive: saving while training goes on, missing files, old checkpoints, hash seeds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import children
import pytest
import systems
import torch
from safetensors.torch import load_file

from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.errors import CheckpointError
from mmllm.training import checkpoint
from mmllm.training.run import train
from mmllm.training.saving import Saver

GOLDEN = Path(__file__).parent.parent / "golden" / "run-of-format-1"
STAGE = systems.stage(train=["inputs.*.projector", "backbone.adapter", "backbone.new_tokens"], save_every=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted run and all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    train(*systems.system(folder, STAGE, keep_last=50))
    return folder


def test_T23_what_is_written_is_what_was_there_at_the_call(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on under a slow writer; every file of every checkpoint equals that of the run that waits."""
    config, context = systems.system(tmp_path, STAGE, keep_last=50, save_async=True)
    monkeypatch.setattr(checkpoint, "save_file", checkpoint.save_file)
    children.slow_writes(0.2)
    train(config, context)
    found, expected = (checkpoint.checkpoints(folder / "run") for folder in (tmp_path, whole))
    assert [path.name for path in found] == [path.name for path in expected]
    for one, other in zip(found, expected, strict=True):
        checkpoint.verify(one)
        files, wanted = (checkpoint.read_json(path / "manifest.json")["files"] for path in (one, other))
        assert files.keys() == wanted.keys()
        assert [name for name in files if files[name] != wanted[name]] == ["config.yaml"], one.name
    assert systems.final_state(tmp_path / "run") == systems.final_state(whole / "run")


def test_T23_training_goes_on_meanwhile_and_the_next_save_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, context = systems.system(tmp_path, {**STAGE, "epochs": None, "max_steps": 3}, save_async=True)
    writing, may_write, events = threading.Event(), threading.Event(), list[str]()
    commit, steps = checkpoint.Pending.commit, checkpoint.prepare

    def slow(self: checkpoint.Pending) -> None:
        if threading.current_thread() is threading.main_thread():  # the final model
            commit(self)
            return
        writing.set()
        assert may_write.wait(60)
        commit(self)
        events.append(f"written {self.folder.name[-1]}")

    def prepare(folder: Path, *arguments: Any, **named: Any) -> checkpoint.Pending:
        if folder.name.endswith("2"):
            events.append("step 2 done")
        if "copy" in named and folder.name.endswith("3"):
            events.append("step 3 done")
        return steps(folder, *arguments, **named)

    wait = Saver.wait

    def waiting(self: Saver) -> None:
        if writing.is_set():  # the second save has come while the first one is not written
            events.append("waits")
            may_write.set()
        wait(self)

    monkeypatch.setattr(checkpoint.Pending, "commit", slow)
    monkeypatch.setattr(checkpoint, "prepare", prepare)
    monkeypatch.setattr(Saver, "wait", waiting)
    train(config, context)
    assert events[:3] == ["waits", "written 1", "step 2 done"]
    assert [event for event in events if "written" in event] == ["written 1", "written 2", "written 3"]


def test_T23_the_exit_waits_for_the_write(tmp_path: Path) -> None:
    systems.write_config(tmp_path, {**STAGE, "save_every": None}, save_async=True)
    stopped = children.start(
        tmp_path,
        (children.slow_writes, 1.0),
        (children.at_step, 2, (children.signal_group, signal.SIGTERM)),
        (os.setpgrp,),
        (children.train, tmp_path),
    )
    assert children.exit_codes(stopped) == [143], children.output(tmp_path)
    (saved,) = checkpoint.checkpoints(tmp_path / "run")
    checkpoint.verify(saved)
    assert checkpoint.read_position(saved).step == 2


def test_T23_a_write_that_fails_is_told_by_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, context = systems.system(tmp_path, STAGE, save_async=True)
    original, calls = checkpoint.save_file, 0

    def full(*arguments: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # two files a checkpoint
            raise OSError(28, "No space left on device")
        original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match=r"0-align-00000002: .*No space left.*written before are untouched"):
            train(config, context)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0-align-00000001"]
    train(config, context, resume=True)


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_T24_no_file_of_a_checkpoint_can_be_missing(whole: Path, tmp_path: Path) -> None:
    name = "0-align-00000003"
    files = files_of(whole / "run" / "checkpoints" / name)
    assert "state/optimizer.safetensors" in files
    config = load(whole / "config.yaml", [f"output={tmp_path / 'run'}"])
    copy = tmp_path / "run" / "checkpoints" / name
    shutil.copytree(whole / "run" / "checkpoints" / name, copy)
    for file in files:
        (copy / file).rename(tmp_path / "aside")
        with pytest.raises(
            CheckpointError, match=f"missing: {file}" if file != "manifest.json" else "no manifest.json"
        ):
            train(config, BuildContext(root=whole), resume=True)
        (tmp_path / "aside").rename(copy / file)
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "no step was made"


@pytest.mark.parametrize("file", ["parts.safetensors", "adapter/adapter_model.safetensors", "state/optimizer.safetensors",
                                  "state/position.json", "config.yaml"])  # fmt: skip
def test_T24_nor_can_the_manifest_hide_that_it_is(whole: Path, tmp_path: Path, file: str) -> None:
    name = "0-align-00000003"
    copy = tmp_path / "run" / "checkpoints" / name
    shutil.copytree(whole / "run" / "checkpoints" / name, copy)
    (copy / file).unlink()
    checkpoint.write_manifest(copy)
    config = load(whole / "config.yaml", [f"output={tmp_path / 'run'}"])
    with pytest.raises((ValueError, OSError), match=Path(file).name + "|backbone.adapter"):
        train(config, BuildContext(root=whole), resume=True)
    assert not (tmp_path / "run" / "metrics.jsonl").is_file() or not systems.metrics(tmp_path / "run")


@pytest.mark.parametrize(("change", "message"), [
    ({"step": None}, "lacks 'step'"),
    ({"momentum": 3}, "has 'momentum', which this version does not know"),
])  # fmt: skip
def test_T24_a_position_of_another_form_is_named(
    whole: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copy = tmp_path / "run" / "checkpoints" / "0-align-00000003"
    shutil.copytree(whole / "run" / "checkpoints" / copy.name, copy)
    file = copy / "state" / "position.json"
    position = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({key: value for key, value in position.items() if value is not None}))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_position(copy)


def test_T25_a_checkpoint_of_the_first_format_goes_on(tmp_path: Path) -> None:
    """Written by version 0.1.0 before this format had another key. Its losses came out the same since."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    (found,) = checkpoint.checkpoints(tmp_path / "run")
    checkpoint.verify(found)
    # Data are where they were: the run has not moved, its files have.
    settings = found / "config.yaml"
    settings.write_text(settings.read_text().replace("/golden/", f"{tmp_path}/"))
    checkpoint.write_manifest(found)
    config = load(tmp_path / "config.yaml", [f"output={tmp_path / 'run'}"])
    expected = [json.loads(line) for line in (GOLDEN / "run" / "metrics.jsonl").read_text().splitlines()]
    train(config, BuildContext(root=tmp_path), resume=True)
    rows = systems.rows(tmp_path)
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [1, 2, 3, 4, 5, 6]
    for row, logged in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(logged["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-3)


def test_T25_another_format_is_named(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run" / "checkpoints" / "0-align-00000003"
    shutil.copytree(whole / "run" / "checkpoints" / copy.name, copy)
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 0'))
    config = load(whole / "config.yaml", [f"output={tmp_path / 'run'}"])
    with pytest.raises(CheckpointError, match="checkpoint format 0, this version reads 1"):
        train(config, BuildContext(root=whole), resume=True)


def test_T26_the_hash_seed_of_python_changes_nothing(whole: Path, tmp_path: Path) -> None:
    """And the command line, in a process of its own, does what a call does."""
    systems.write_config(tmp_path, STAGE, keep_last=50)
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": other}
    program = "import sys; from mmllm.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "train", str(tmp_path / "config.yaml")]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert systems.final_state(tmp_path / "run") == systems.final_state(whole / "run")
    assert systems.metrics(tmp_path / "run") == systems.metrics(whole / "run")


def test_checkpoints_that_stay_for_good(tmp_path: Path) -> None:
    """Intermediate ones on request: one of every so many steps, whatever `save_every` and `keep_last` say."""
    config, context = systems.system(tmp_path, {**STAGE, "save_every": 3}, keep_last=1, keep_every=4)
    train(config, context)
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "run")]
    assert names == ["0-align-00000004", "0-align-00000008", "0-align-00000010"]
    for path in checkpoint.checkpoints(tmp_path / "run"):
        checkpoint.verify(path)


def test_a_late_save_stays_in_the_place_of_the_one_that_was_due(tmp_path: Path) -> None:
    for step in (2, 4, 5, 6, 9, 10, 11):
        (tmp_path / "checkpoints" / f"0-align-{step:08d}").mkdir(parents=True)
    checkpoint.remove_old(tmp_path, keep=1, every=4)
    assert [int(path.name[-8:]) for path in checkpoint.checkpoints(tmp_path)] == [4, 9, 11]


def test_tensors_are_copied_only_where_they_can_change(whole: Path) -> None:
    config, context = load(whole / "config.yaml"), BuildContext(root=whole)
    from mmllm.model import MultimodalLM
    from mmllm.processing.processor import Processor

    model, processor = MultimodalLM.from_config(config.model, context), Processor.from_config(config.model, context)
    own = dict(model.named_parameters())
    for copy in (False, True):
        place = whole / f"copied-{copy}"
        pending = checkpoint.prepare(place, model, processor, config, context, ["inputs.image.projector"], copy=copy)
        tensors, _ = pending.tensors["parts.safetensors"]
        assert {tensors[n].data_ptr() == own[n].data_ptr() for n in tensors} == {not copy}
        name = min(tensors)
        with torch.no_grad():
            own[name].add_(1)
        pending.commit()
        assert torch.equal(load_file(place / "parts.safetensors")[name], own[name]) is not copy
