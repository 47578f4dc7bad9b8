"""What a person finds in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import systems
from PIL import Image

from mmllm.errors import TrainingError
from mmllm.training.report import StepLog, check_trackers, duration, smooth
from mmllm.training.run import train

DATA = [{"reader": {"kind": "messages", "path": "data.jsonl"}}]


def test_the_run_folder_tells_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = (
        systems.stage(epochs=1, eval_data=DATA, eval_every=2, samples=2),
        systems.stage("instruct", train=["backbone.adapter"], epochs=1),
    )
    config, context = systems.system(tmp_path, *stages, trackers=["tensorboard"])
    (tmp_path / "green.png").write_bytes(b"broken")
    train(config, context)
    text = (tmp_path / "run" / "run.md").read_text(encoding="utf-8")
    for line in (
        "## Stage `align`",
        "## Stage `instruct`",
        "| inputs.image.projector | 1,600 | trained | 0.01 |",
        "| backbone | 34,976 | frozen |  |",
        "- 17 samples, weight 1: messages {'path': 'data.jsonl'}",
        "5 steps, 1.00 epochs, 17 samples",
        "x MediaError",
        "| 4 | ",
        "expected: ",
        "mmllm 0.1.0, torch ",
    ):
        assert line in text, line
    with Image.open(tmp_path / "run" / "loss.png") as picture:
        assert picture.size == (1080, 540)
        assert len(picture.convert("RGB").getcolors(100_000) or []) > 20
    assert list((tmp_path / "run" / "trackers").rglob("events.out.tfevents*"))
    evaluated = systems.rows(tmp_path, "eval_loss")
    assert [row["step"] for row in evaluated] == [2, 4, 5]
    assert len(evaluated[0]["replies"]) == 2
    out = capsys.readouterr().out
    assert "align  loss " in out
    assert "samples/s" in out
    assert "left" in out


def test_unknown_and_missing_trackers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"unknown tracker 'tensorbord'; known: .*tensorboard"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(TrainingError, match="pip install wandb"):
        check_trackers(["wandb"])


def test_metrics_forget_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    metrics = StepLog(tmp_path / "metrics.jsonl")
    rows: list[dict[str, Any]] = [{"stage": s, "step": i} for s in ("a", "b") for i in range(4)]
    for row in rows:
        metrics.add(row)
    with metrics.file.open("a") as file:
        file.write('{"stage": "b", "st')  # cut short by a crash
    metrics.rewind({"a": float("inf"), "b": 1})
    assert metrics.rows() == [*rows[:4], *rows[4:6]]
    assert [json.loads(line) for line in metrics.file.read_text().splitlines()] == metrics.rows()
    metrics.rewind({})
    assert metrics.rows() == []


def test_smoothing_is_unbiased_at_the_start() -> None:
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([0.0, 1.0])[1] == pytest.approx(0.05 / 0.0975)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3725, "1 h 02 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
