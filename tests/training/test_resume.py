"""A killed run goes on as if nothing had happened: weights, optimizer, samples and metrics, bit for bit on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import systems

from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.config.run import RunConfig
from mmllm.errors import CheckpointError, TrainingError
from mmllm.training.run import train

# 17 samples in batches of 4: steps 1-5 are epoch one, 6-10 epoch two, then the second stage. The adapter has dropout.
STAGES = (
    systems.stage(save_every=1),
    systems.stage("instruct", train=["inputs.*.projector", "backbone.adapter"], epochs=1, save_every=2),
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    config, context = systems.system(folder, *STAGES, keep_last=50)
    train(config, context)
    return folder / "run"


# Two micro-batches per step, one in the last step of an epoch (a single sample): 9 an epoch, 18 in the first stage.
KILLS = {
    "before any checkpoint": 1,
    "mid-accumulation": 6,
    "last step of epoch one": 9,
    "first step of epoch two": 10,
    "last step of the stage": 18,
    "stage boundary": 19,
    "between two saves": 23,
}


@pytest.mark.parametrize("forward", KILLS.values(), ids=KILLS)
def test_a_killed_run_resumes_bit_for_bit(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: int
) -> None:
    """Projector and LoRA runs alike (LLaVA #901 #1164); the ids of the samples too (transformers #40691)."""
    config, context = systems.system(tmp_path, *STAGES, keep_last=50)
    with monkeypatch.context() as patch:
        systems.kill_after(patch, forward)
        with pytest.raises(systems.Killed):
            train(config, context)
    train(config, context, resume=True)
    assert systems.final_state(tmp_path / "run") == systems.final_state(uninterrupted)
    assert systems.metrics(tmp_path / "run") == systems.metrics(uninterrupted)


def resumable(folder: Path, *overrides: str) -> tuple[RunConfig, BuildContext]:
    """A run of the first stage stopped after two steps; its configuration with ``overrides``."""
    config, context = systems.system(folder, systems.stage(save_every=1))
    with pytest.MonkeyPatch.context() as patch:
        systems.kill_after(patch, 5)
        with pytest.raises(systems.Killed):
            train(config, context)
    return load(folder / "config.yaml", overrides), context


def test_another_config_is_refused_naming_the_keys(tmp_path: Path) -> None:
    config, context = resumable(
        tmp_path, "stages.align.lr=0.5", "model.backbone.adapter.rank=3", "stages.align.optimizer.clip=2.0", "seed=1"
    )
    with pytest.raises(CheckpointError) as caught:
        train(config, context, resume=True)
    for key in ("stages.align.lr", "model.backbone.adapter.rank", "stages.align.optimizer.clip", "seed"):
        assert f" {key}" in str(caught.value)
    assert "stages.align.epochs" not in str(caught.value)


def test_what_does_not_change_the_run_may_change(tmp_path: Path) -> None:
    """Also the micro-batch size, so a run can go on on another machine; and stages that have not begun."""
    config, context = resumable(tmp_path, "keep_last=7", "stages.align.save_every=2", "stages.align.micro_batch_size=4")
    later = config.stages[0].model_copy(update={"name": "later", "max_steps": 1})
    train(config.model_copy(update={"stages": [*config.stages, later]}), context, resume=True)
    assert [row["step"] for row in systems.rows(tmp_path)] == [*range(1, 11), 1]


def test_other_data_are_refused(tmp_path: Path) -> None:
    config, context = resumable(tmp_path)
    systems.write_data(tmp_path, count=18)
    with pytest.raises(CheckpointError, match="its data files are not the checkpoint's"):
        train(config, context, resume=True)


def test_a_fresh_start_does_not_overwrite_a_run(tmp_path: Path) -> None:
    config, context = resumable(tmp_path)
    with pytest.raises(TrainingError, match=r"already holds 0-align-00000002; resume"):
        train(config, context)


def test_later_stages_wait_for_an_unfinished_one(tmp_path: Path) -> None:
    config, context = resumable(tmp_path)
    later = config.stages[0].model_copy(update={"name": "later"})
    with pytest.raises(TrainingError, match="stage 'align' is not finished"):
        train(config.model_copy(update={"stages": [*config.stages, later]}), context, resume=True, stages=["later"])


def test_resuming_a_finished_run_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    before = systems.final_state(uninterrupted), systems.metrics(uninterrupted)
    config = load(uninterrupted.parent / "config.yaml")
    train(config, BuildContext(root=uninterrupted.parent), resume=True)
    assert (systems.final_state(uninterrupted), systems.metrics(uninterrupted)) == before


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    config, context = systems.system(tmp_path)
    with pytest.raises(TrainingError, match=r"no stage 'algin'; the stages are align; did you mean 'align'"):
        train(config, context, stages=["algin"])
