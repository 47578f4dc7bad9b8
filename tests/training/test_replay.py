"""What a run leaves so that it can be repeated, and a logged step computed once more."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import systems
import torch

from mmllm.cli import main
from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.processing.processor import Processor
from mmllm.training import checkpoint
from mmllm.training.run import train

# Steps 1-10 of `align`, then 1-5 of `instruct`, whose adapter has dropout; checkpoints of 4, 8 and the stages' ends.
STAGES = (
    systems.stage(save_every=4),
    systems.stage("instruct", train=["inputs.*.projector", "backbone.adapter"], epochs=1, eval_every=2, samples=1),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    data = [{"reader": {"kind": "messages", "path": "data.jsonl", "limit": 5}}]
    train(*systems.system(folder, STAGES[0], {**STAGES[1], "eval_data": data}, keep_last=50))
    return folder


def replay(folder: Path, step: str, *overrides: str) -> int:
    return main(["train", str(folder / "config.yaml"), "--replay", step, *overrides])


@pytest.mark.parametrize(
    ("step", "place", "source"),
    [
        ("1", "step 1 of stage align", "the start of the run"),
        ("6", "step 6 of stage align", "0-align-00000004"),
        ("align:9", "step 9 of stage align", "0-align-00000008"),
        ("12", "step 2 of stage instruct", "0-align-00000010"),
        ("instruct:5", "step 5 of stage instruct", "0-align-00000010"),
    ],
)
def test_a_logged_step_comes_out_as_it_did(
    whole: Path, capsys: pytest.CaptureFixture[str], step: str, place: str, source: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "run").rglob("*")}
    assert replay(whole, step) == 0
    printed = capsys.readouterr().out
    assert f"{place}, from {source}" in printed
    assert "as logged, bit for bit" in printed
    number = int(place.split()[1]) + (10 if "instruct" in place else 0)
    assert f"loss       {systems.rows(whole)[number - 1]['loss']!r}" in printed
    assert " ".join(systems.step_ids(whole / "run")[number - 1]) in printed
    assert {path: path.stat().st_mtime_ns for path in (whole / "run").rglob("*")} == before, "the run is only read"


@pytest.mark.parametrize(("file", "key", "value"), [
    ("metrics.jsonl", "loss", lambda loss: loss * (1 + 1e-12)),
    ("metrics.jsonl", "grad_norm", lambda norm: norm + 1.0),
    ("samples.jsonl", "ids", lambda ids: ids[::-1]),
])  # fmt: skip
def test_a_step_that_differs_from_the_log_is_told(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, key: str, value: Any
) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / file).read_text().splitlines()]
    for row in rows:
        if key in row and (row["stage"], row["step"]) == ("align", 6):
            row[key] = value(row[key])
    (tmp_path / "run" / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert replay(whole, "6", f"output={tmp_path / 'run'}") == 1
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if "DIFFERS" in line] == [key]


def test_other_data_or_another_configuration_are_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay(whole, "6", "stages.align.lr=0.5") == 1
    assert "changed: stages.align.lr" in capsys.readouterr().err
    for step in ("0", "16", "align:11", "allign:3", "last"):
        assert replay(whole, step) == 1
        assert "those are align:1 to align:10, instruct:1 to instruct:5" in capsys.readouterr().err
    shutil.copytree(whole, tmp_path / "moved")
    systems.write_data(tmp_path / "moved", count=18)
    file = tmp_path / "moved" / "config.yaml"
    file.write_text((whole / "config.yaml").read_text().replace(str(whole), str(tmp_path / "moved")))
    assert replay(tmp_path / "moved", "6") == 1
    assert "changed: stages.align.data.0.reader.path" in capsys.readouterr().err


def test_a_run_from_other_weights_is_replayed_from_them(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(whole / "config.yaml", [f"output={tmp_path / 'run'}"])
    context = BuildContext(root=whole)
    start = shutil.copytree(whole / "run" / "checkpoints" / "0-align-00000004", tmp_path / "start")
    train(config, context, stages=["instruct"], start_from=start)
    assert replay(whole, "2", f"output={tmp_path / 'run'}") == 0
    assert "step 2 of stage instruct, from the start of the run" in capsys.readouterr().out
    checkpoint.write_manifest(Path(shutil.copytree(whole / "run" / "final", start, dirs_exist_ok=True)))
    assert replay(whole, "2", f"output={tmp_path / 'run'}") == 1
    assert "is not what this run started from" in capsys.readouterr().err


def test_the_data_manifest_has_every_file_with_its_hash(whole: Path) -> None:
    found = json.loads((whole / "run" / "data.json").read_text())
    assert found.keys() == {"align", "instruct"}
    content = (whole / "data.jsonl").read_bytes()
    file = {
        "path": str(whole / "data.jsonl"),
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (source,) = found["align"]["data"]
    assert (source["files"], source["samples"], source["weight"]) == ([file], 17, 1.0)
    assert "eval_data" not in found["align"]
    (evaluation,) = found["instruct"]["eval_data"]
    assert (evaluation["files"], evaluation["samples"]) == ([file], 5)
    position = checkpoint.read_position(checkpoint.checkpoints(whole / "run")[0])
    assert found["align"]["fingerprint"] == position.data


def test_the_environment_of_every_start_is_kept(whole: Path) -> None:
    (start,) = json.loads((whole / "run" / "environment.json").read_text())
    assert start["packages"]["torch"] == version("torch")
    assert start["packages"]["mmllm"] == version("mmllm")
    assert start["threads"] == torch.get_num_threads()
    assert (start["processes"], start["device"], start["precision"], start["seed"]) == (1, "cpu", "fp32", 0)
    assert start["weights_from"] is None
    assert start["python"]
    assert start["platform"]
    train(load(whole / "config.yaml"), BuildContext(root=whole), resume=True)
    first, second = json.loads((whole / "run" / "environment.json").read_text())
    assert first == start
    assert second["weights_from"]["path"] == str(checkpoint.checkpoints(whole / "run")[-1])


def test_the_log_names_the_samples_that_were_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a bad one was replaced: the id is that of the sample that came in its place."""
    config, context = systems.system(tmp_path, systems.stage(epochs=1))
    (tmp_path / "300.wav").write_bytes(b"no sound")
    learned: list[str] = []
    collate = Processor.collate

    def watched(self: Processor, samples: Any, **named: Any) -> Any:
        learned.extend(sample.id for sample in samples)
        return collate(self, samples, **named)

    monkeypatch.setattr(Processor, "collate", watched)
    config = config.model_copy(update={"stages": [config.stages[0].model_copy(update={"max_skipped": 1.0})]})
    train(config, context)
    logged = [id for ids in systems.step_ids(tmp_path / "run") for id in ids]
    assert sorted(logged) == sorted(learned)
    assert sum(sum(row["skipped"].values()) for row in systems.rows(tmp_path)) >= 3
