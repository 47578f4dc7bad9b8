"""`mmllm plan`: counts, shapes and contradictions, on the meta device with nothing downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmllm.cli import CONFIG_FOLDERS, main

CONFIGS = sorted(CONFIG_FOLDERS[1].rglob("*.yaml"))


def plan(config: Path | str, capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    assert main(["plan", str(config), "--json", *overrides]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_llava_15_has_the_published_parts(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan("llava-1.5-7b", capsys)
    assert result["hidden_dim"] == 4096
    image = result["inputs"]["image"]
    # arXiv 2310.03744: 336 px in patches of 14 gives 576 tokens whatever the picture's size.
    assert image["feature_dim"] == 1024
    assert image["tokens"] == {"512x512": 576, "1600x400": 576}
    parameters = result["parameters"]
    assert parameters["inputs.image.projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert parameters["backbone"] == 6_738_415_616  # Llama-7B
    per_layer = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert parameters["backbone.adapter"] == 128 * per_layer * 32
    assert result["total"] == sum(parameters.values())
    align, instruct = result["stages"]
    assert align["trainable"] == parameters["inputs.image.projector"]
    assert instruct["trainable"] == parameters["inputs.image.projector"] + parameters["backbone.adapter"]
    assert instruct["lr"] == {"inputs.image.projector": 2e-5, "backbone.adapter": 2e-4}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_has_a_plan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path)]) == 0
    text = capsys.readouterr().out
    assert "backbone" in text
    assert "total" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.align.max_length=8", "raise max_length"),
        ("stages.align.micro_batch_size=64", "more than batch_size"),
        ("stages.align.train=[inputs.video.projector]", "matches no part"),
        ("model.inputs.image.projector.num_heads=5", "64"),
        ("model.backbone.architecture.num_key_value_heads=3", "model"),
    ],
)
def test_a_contradiction_exits_2_and_says_what_to_change(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "clip-qformer-whisper-mlp", override]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_hub_architecture_is_a_contradiction_not_a_download(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"model": {"backbone": {"kind": "causal_lm", "pretrained": "no/such-model"}}}))
    assert main(["plan", str(path)]) == 2
    assert "architecture" in capsys.readouterr().err
