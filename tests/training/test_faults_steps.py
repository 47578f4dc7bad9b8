"""Rows T15 to T22 of the faults a run must survive: bad batches, losses that are no numbers or leap, other numbers of
processes and workers, a process that fails."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import children
import pytest
import systems
import torch
from safetensors.torch import load_file
from test_distributed import LAUNCH

from mmllm.config.base import BuildContext
from mmllm.config.load import load, parse
from mmllm.data.mixture import StageData
from mmllm.errors import CheckpointError, ConfigError, TrainingError
from mmllm.processing.batch import Batch
from mmllm.processing.processor import Processor
from mmllm.training import checkpoint, loop, stage_run
from mmllm.training.batches import StepDataset, loader
from mmllm.training.loop import SummedLoss
from mmllm.training.run import train
from mmllm.training.stage_run import StageRun

STAGE = systems.stage(train=["inputs.*.projector", "backbone.adapter"])


def order(folder: Path, epoch: int = 0) -> list[str]:
    """The ids of an epoch of ``folder/config.yaml`` in training order."""
    config = load(folder / "config.yaml")
    data = StageData(config.stages[0].data, config.seed, BuildContext(root=folder))
    return [f"s{index:02d}" for index in data.order(epoch)]


@pytest.mark.parametrize("only", [1, None], ids=["in one process of two", "in both"])
def test_T15_micro_batches_without_a_label_have_a_finite_loss(tmp_path: Path, only: int | None) -> None:
    """The mean over no token is not 0 / 0, and the process takes part in the exchange of gradients."""
    systems.write_config(tmp_path, {**STAGE, "max_steps": 3})
    processes = children.start_two(tmp_path, (children.teach_nothing, only), (children.train, tmp_path))
    assert children.exit_codes(*processes) == [0, 0], children.output(tmp_path, 1)
    rows = systems.rows(tmp_path)
    assert [row["updated"] for row in rows] == [True] * 3
    assert [row["samples"] for row in rows] == [4] * 3
    if only is None:
        assert [(row["loss"], row["tokens"], row["grad_norm"]) for row in rows] == [(0.0, 0, 0.0)] * 3
    else:
        assert all(4 < row["loss"] < 7 and row["tokens"] > 0 and row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_T17_what_is_no_number_in_one_process_changes_no_weight_anywhere(tmp_path: Path, what: str) -> None:
    systems.write_config(tmp_path, {**STAGE, "epochs": 1})
    bad = order(tmp_path)[5]  # of the second step, dealt to the second process
    processes = children.start_two(
        tmp_path, (children.spoil, what, 1, bad), (children.note_weights, tmp_path), (children.train, tmp_path)
    )
    assert children.exit_codes(*processes) == [0, 0], children.output(tmp_path, 1)
    assert [row["updated"] for row in systems.rows(tmp_path)] == [True, False, True, True, True]
    first, second = ((tmp_path / f"weights-{rank}.txt").read_text().split() for rank in range(2))
    assert first == second
    assert [one == other for one, other in pairwise(first)] == [True, False, False, False]
    (line,) = [line for line in children.output(tmp_path).splitlines() if "is not finite, nothing was learned" in line]
    assert bad in line


def test_T17_too_many_such_steps_end_every_process(tmp_path: Path) -> None:
    systems.write_config(tmp_path, {**STAGE, "save_every": 1})
    ids = order(tmp_path)[8:]  # all from the third step on
    processes = children.start_two(
        tmp_path, (children.limit_nonfinite, 3), (children.spoil, "loss", 1, *ids), (children.train, tmp_path)
    )
    assert children.exit_codes(*processes) == [1, 1]
    assert "This is step 3 in a row; lower the rate, or look at these samples" in children.output(tmp_path, 1)
    steps = [checkpoint.read_position(path).step for path in checkpoint.checkpoints(tmp_path / "run")]
    assert steps == [1, 2]


SPIKING = {**STAGE, "save_every": 3, "epochs": 3, "spike": {"window": 4, "deviations": 6.0}}


def leap(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The loss of these steps is fifty times as large."""
    forward, seed_step, current = SummedLoss.forward, loop.seed_step, 0

    def seeded(seed: int, stage: str, step: int, rank: int) -> None:
        nonlocal current
        current = step + 1
        seed_step(seed, stage, step, rank)

    def leaping(self: SummedLoss, batch: Batch) -> dict[str, torch.Tensor]:
        return {name: loss * (50.0 if current in steps else 1.0) for name, loss in forward(self, batch).items()}

    monkeypatch.setattr(loop, "seed_step", seeded)
    monkeypatch.setattr(SummedLoss, "forward", leaping)


def test_T18_a_leaping_loss_sends_the_stage_back_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, context = systems.system(tmp_path, SPIKING, keep_last=50)
    leap(monkeypatch, 9, 13)
    roll_back, restored = StageRun._roll_back, []

    def checked(self: StageRun) -> None:
        roll_back(self)
        saved = load_file(tmp_path / "run" / "checkpoints" / "0-align-00000006" / "parts.safetensors")
        now = dict(self.shared.model.named_parameters())
        restored.append(all(torch.equal(now[name], tensor) for name, tensor in saved.items()))

    monkeypatch.setattr(StageRun, "_roll_back", checked)
    with caplog.at_level(logging.WARNING, "mmllm"):
        train(config, context)
    assert [(row["step"], row["rolled_back_to"]) for row in systems.rows(tmp_path, "rolled_back_to")] == [(9, 6)]
    assert restored == [True]
    assert [row["step"] for row in systems.rows(tmp_path)] == [*range(1, 16)], "on behind the leap"
    assert systems.step_ids(tmp_path / "run") == planned(tmp_path)
    assert "The loss leapt at step 9: back to step 6" in (tmp_path / "run" / "run.md").read_text()
    first, second = [record.message for record in caplog.records if "leapt" in record.message]
    assert "went back" not in first
    assert "went back 1 time(s) already" in second
    goes_on_from_any_checkpoint(tmp_path)


def goes_on_from_any_checkpoint(folder: Path) -> None:
    """Killed before the checkpoint that follows the leap, or later, it ends in the same bits: the losses decide again."""
    for last in ("0-align-00000006", "0-align-00000012"):
        other = folder / last
        shutil.copytree(folder / "run" / "checkpoints" / last, other / "checkpoints" / last)
        train(load(folder / "config.yaml", [f"output={other}"]), BuildContext(root=folder), resume=True)
        assert systems.final_state(other) == systems.final_state(folder / "run")


def planned(folder: Path) -> list[list[str]]:
    """The ids of every step of three epochs."""
    return [ids[at : at + 4] for epoch in range(3) for ids in [order(folder, epoch)] for at in range(0, 17, 4)]


def test_T18_without_a_checkpoint_to_go_back_to_the_stage_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, context = systems.system(tmp_path, {**SPIKING, "save_every": 100, "epochs": 2})
    leap(monkeypatch, 6)
    with caplog.at_level(logging.WARNING, "mmllm"):
        train(config, context)
    assert "no checkpoint of stage 'align' to go back to" in caplog.text
    assert not systems.rows(tmp_path, "rolled_back_to")


def test_T18_going_back_needs_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="goes back to a checkpoint of the stage; give `save_every`"):
        parse(systems.tree(tmp_path, {**SPIKING, "save_every": None}))


@pytest.mark.parametrize(("world", "batch_size", "micro"), [(2, 4, 2), (2, 4, 4), (3, 5, 1), (5, 17, 2), (4, 3, 2)])
def test_T19_every_sample_once_an_epoch_and_something_to_compute_everywhere(
    tmp_path: Path, world: int, batch_size: int, micro: int
) -> None:
    config, context = systems.system(tmp_path, {**STAGE, "batch_size": batch_size, "micro_batch_size": micro})
    data, processor = StageData(config.stages[0].data, 0, context), Processor.from_config(config.model, context)
    sets = [StepDataset(data, processor, config.stages[0], rank=rank, world=world) for rank in range(world)]
    steps = [[dataset[step] for dataset in sets] for step in range(len(sets[0]) // 2)]
    assert Counter(chain(*(one.ids for step in steps for one in step))) == {f"s{i:02d}": 1 for i in range(17)}
    assert all(one.micro for step in steps for one in step), "nobody waits for ever"


@pytest.mark.parametrize("first", [2, 1], ids=["two processes, then one", "one process, then two"])
def test_T20_another_number_of_processes_and_workers_goes_on_with_the_same_samples(tmp_path: Path, first: int) -> None:
    systems.write_config(tmp_path, {**STAGE, "save_every": 1})
    wanted = planned(tmp_path)[:10]

    def run(count: int, *calls: children.Call) -> list[int | None]:
        start = children.start_two if count == 2 else lambda *given: [children.start(*given)]
        return children.exit_codes(*start(tmp_path, *calls))

    assert run(first, (children.at_step, 4, (children.kill,)), (children.train, tmp_path)) == [-signal.SIGKILL] * first
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("  samples: 0", "  samples: 0\n  num_workers: 2"))
    assert run(3 - first, (children.resume, tmp_path)) == [0] * (3 - first)
    assert systems.step_ids(tmp_path / "run") == wanted
    assert [row["step"] for row in systems.rows(tmp_path)] == [*range(1, 11)]


def test_T20_another_global_batch_is_refused_before_the_first_step(tmp_path: Path) -> None:
    config, context = systems.system(tmp_path, {**STAGE, "save_every": 1})
    with pytest.MonkeyPatch.context() as patch:
        systems.kill_after(patch, 5)
        with pytest.raises(systems.Killed):
            train(config, context)
    other = load(tmp_path / "config.yaml", ["stages.align.batch_size=6"])
    with pytest.raises(CheckpointError, match=r"changed: stages\.align\.batch_size"):
        train(other, context, resume=True)
    assert len(systems.rows(tmp_path)) == 2


def test_T21_any_number_of_workers_prepares_the_same_batches(tmp_path: Path) -> None:
    config, context = systems.system(tmp_path, {**STAGE, "epochs": 4})
    data, processor = StageData(config.stages[0].data, 0, context), Processor.from_config(config.model, context)
    steps = StepDataset(data, processor, config.stages[0], rank=0, world=1)

    def digest(batch: Batch) -> str:
        media = {f"{name}.{key}": t for name, m in batch.media.items() for key, t in m.inputs.items()}
        tensors = {"ids": batch.ids, "targets": batch.targets, "predict": batch.predict, **media}
        content = hashlib.sha256(json.dumps(batch.sample_ids).encode())
        for name in sorted(tensors):
            content.update(name.encode() + tensors[name].numpy().tobytes())
        return content.hexdigest()

    found = [
        [[digest(batch) for batch, _ in step.micro] for step in loader(steps, range(20), workers)]
        for workers in range(3)
    ]
    assert found[0] == found[1] == found[2]
    assert len({*chain(*found[0])}) > 30


def test_T22_a_process_that_fails_ends_all_with_its_traceback(tmp_path: Path) -> None:
    config = systems.write_config(tmp_path, STAGE)
    command = [*LAUNCH, str(Path(__file__).parent / "raising.py"), str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed, _ = process.communicate(timeout=600)
    ended = time.time()
    assert process.returncode != 0
    assert ended - (tmp_path / "raised").stat().st_mtime < 60
    assert "IndexError: the row that nobody thought of" in printed
    assert "in failing" in printed, "the line that raised"
    assert len(systems.rows(tmp_path)) == 2


def test_T22_without_a_launcher_too(tmp_path: Path) -> None:
    systems.write_config(tmp_path, STAGE)
    processes = children.start_two(tmp_path, (children.at_step, 3, (children.fail,), 1), (children.train, tmp_path))
    assert children.exit_codes(*processes) == [1, 1]
    assert "IndexError: the row that nobody thought of" in children.output(tmp_path, 1)


def test_T22_a_data_worker_that_is_killed_ends_the_run_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collate, here = Processor.collate, os.getpid()

    def dying(self: Processor, *arguments: Any, **named: Any) -> Batch:
        batch = collate(self, *arguments, **named)
        if os.getpid() != here and "s07" in batch.sample_ids:
            children.kill()
        return batch

    monkeypatch.setattr(Processor, "collate", dying)
    config, context = systems.system(tmp_path, {**STAGE, "num_workers": 1})
    with pytest.raises(TrainingError, match=r"DataLoader worker .*A data worker died, .*--resume goes on"):
        train(config, context)


def test_T18_goes_back_as_often_as_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice to the same checkpoint, and no third time."""
    config, context = systems.system(tmp_path, {**SPIKING, "spike": {**SPIKING["spike"], "rollbacks": 2}}, keep_last=50)
    leap(monkeypatch, 10, 11, 12)
    train(config, context)
    assert [(row["step"], row["rolled_back_to"]) for row in systems.rows(tmp_path, "rolled_back_to")] == [
        (10, 9),
        (11, 9),
    ]


def test_T08_a_signal_during_the_last_evaluation_ends_the_run_behind_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [systems.stage("first", epochs=1, eval_data=["data.jsonl"]), systems.stage("second", epochs=1)]
    config, context = systems.system(tmp_path, *stages)
    real = stage_run.evaluate

    def signalled(*given: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(stage_run, "evaluate", signalled)
    with pytest.raises(SystemExit) as stop:
        train(config, context)
    assert stop.value.code == 128 + signal.SIGTERM
    assert {row["stage"] for row in systems.rows(tmp_path)} == {"first"}
    monkeypatch.undo()
    train(config, context, resume=True)
    assert {row["stage"] for row in systems.rows(tmp_path)} == {"first", "second"}
