"""`mmllm plan` with its costs: JSON, text, options that contradict each other, downloads and licences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmllm.cli import main
from mmllm.config.base import BuildContext
from mmllm.plan.hub import generator_parameters, known


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "clip-qformer-whisper-mlp", "--devices", "2", "--sharding", "zero-2", "--device", "h100")
    assert found["setting"]["sharding"] == "zero-2"
    align = found["costs"]["stages"]["align"]
    assert align["memory"]["peak"] > sum(align["memory"]["weights"].values())
    assert align["media"] == {"image": ["512x512", 8], "audio": ["30 s", 150]}
    assert align["steps"] == 60
    assert align["hours"] > 0
    assert found["costs"]["disk"] > align["checkpoint"]
    assert found["costs"]["inference"]["cache"] > 0
    assert found["sources"] == []


def test_the_text_is_short_and_the_details_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "clip-qformer-whisper-mlp"]) == 0
    short = capsys.readouterr().out
    assert main(["plan", "clip-qformer-whisper-mlp", "--details"]) == 0
    long = capsys.readouterr().out
    assert "peak" in short
    assert "memory of align" not in short
    assert "memory of align" in long
    assert "operations of a step" in long
    assert "every sample has the given tokens" in long


def test_downloads_and_licences(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "llava-1.5-7b", "--quick")
    assert found["costs"] is None
    rows = {row["pretrained"]: row for row in found["sources"]}
    vicuna = rows["lmsys/vicuna-7b-v1.5"]
    assert vicuna["bytes"] == 2 * 6_738_415_616
    assert vicuna["licence"] == "Llama 2 Community License"
    assert not vicuna["estimated"]
    assert rows["openai/clip-vit-large-patch14-336"]["parts"] == ["inputs.image.encoder"]
    other = run(capsys, "llava-1.5-7b", "--quick", "model.backbone.pretrained=someone/else")
    row = next(row for row in other["sources"] if row["pretrained"] == "someone/else")
    assert (row["licence"], row["estimated"], row["bytes"]) == ("unknown", True, 2 * 6_738_415_616)


def test_every_line_of_the_table_has_a_licence() -> None:
    assert all(entry["licence"] for entry in known().values())


def test_generators_of_codes_that_are_not_there_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    costs = run(capsys, "qwen2.5-0.5b-vq-encodec", "--length", "512")["costs"]
    assert set(costs["stages"]) == {"align", "make"}
    assert [note.split(":")[0] for note in costs["notes"]] == ["outputs.image.generator", "outputs.audio.generator"]


def test_a_local_generator_is_counted_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "unet" / "model.safetensors")
    assert generator_parameters(str(tmp_path), BuildContext()) == 17
    assert generator_parameters("no/such-generator", BuildContext()) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "h10"], "unknown device 'h10'"),
        (["--devices", "2", "--sharding", "none"], "2 devices have to share the work"),
        (["--utilisation", "1.5"], "--utilisation: 1.5"),
        (["--supervised", "0"], "--supervised: 0"),
        (["--fit", "much"], "expected a size such as 24GB"),
        (["--device", "cpu", "precision=fp16"], "precision: fp16 needs a GPU"),
        (["--devices", "16"], "stages.0.batch_size: 8 samples for 16 devices"),
    ],
)
def test_contradictory_options_exit_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "clip-qformer-whisper-mlp", *words]) == 2
    assert message in capsys.readouterr().err
