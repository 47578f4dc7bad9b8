"""The diagrams of a system: everything is there, nothing lies over anything else."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from systems_for_plans import system

from mmllm.cli import find_config, main
from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.config.run import RunConfig
from mmllm.plan import Plan, make_plan
from mmllm.plan.diagram import draw_text, picture
from mmllm.plan.svg import draw

SVG = "{http://www.w3.org/2000/svg}"


def planned(config: RunConfig, root: Path = Path()) -> Plan:
    return make_plan(config, BuildContext(root=root))


def named(name: str) -> tuple[RunConfig, Plan]:
    path = find_config(name)
    config = load(path)
    return config, planned(config, path.parent)


@pytest.mark.parametrize("name", ["next_gpt", "clip-qformer-whisper-mlp"])
def test_an_svg_shows_every_part_inside_its_frame(name: str) -> None:
    config, plan = named(name)
    root = ET.fromstring(draw(plan, config))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    texts = {text.text for text in root.iter(f"{SVG}text")}
    for shown in (*plan.inputs.values(),):
        assert {shown.encoder, shown.projector} <= texts
    for out in plan.outputs.values():
        assert {out.generator, out.projector} <= texts
    assert {*plan.inputs, *plan.outputs, "text", config.model.backbone.kind} <= texts
    assert {stage.name for stage in config.stages} <= texts
    boxes = [
        tuple(float(rect.get(key, 0)) for key in ("x", "y", "width", "height"))
        for rect in root.iter(f"{SVG}rect")
        if rect.get("height") == "54"
    ]
    assert len(boxes) >= len(plan.inputs) * 2 + 1
    for x, y, w, h in boxes:
        assert 0 < x < x + w < width
        assert 0 < y < y + h < height
    for (ax, ay, aw, ah), (bx, by, bw, bh) in itertools.combinations(boxes, 2):
        assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay


def test_names_are_escaped_and_frozen_parts_say_so() -> None:
    config = system("inputs.image.projector")
    text = draw(planned(config), config)
    ET.fromstring(text)
    assert text.count("frozen") == 2  # encoder and backbone


def test_the_terminal_marks_what_is_trained() -> None:
    config = system("inputs.image.projector", "backbone.adapter", adapter=True)
    lines = draw_text(picture(planned(config), config.model)).splitlines()
    assert any("image ─▶ clip ─▶ linear*" in line and "16 ─▶" in line for line in lines)
    assert any("lora*" in line for line in lines)
    assert len({line.index("│") for line in lines[1:-1]}) == 1


def test_the_command_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "system.svg"
    assert main(["plan", "clip-qformer-whisper-mlp", "--quick", "--svg", str(file)]) == 0
    assert ET.parse(file).getroot().tag == f"{SVG}svg"
    assert "causal_lm" in capsys.readouterr().out
