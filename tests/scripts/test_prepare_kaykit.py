"""training/prepare_kaykit.py on made-up packs in each layout it reads."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmllm.processing.point_clouds import decode_point_cloud
from mmllm.processing.sources import Limits

SCRIPT = Path(__file__).parents[2] / "training" / "prepare_kaykit.py"
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def obj(size: float, colour: str) -> bytes:
    """A triangle whose texture coordinate is the atlas's left half (red) or right half (blue), lying anywhere."""
    u, offset = (0.25 if colour == "red" else 0.75), (0.0 if colour == "red" else 7.5)
    lines = ["mtllib secret.mtl", *(f"v {x * size + offset} {y * size} 0" for x, y in ((0, 0), (1, 0), (0, 1)))]
    return "\n".join([*lines, f"vt {u} 0.5", "usemtl atlas", "f 1/1 2/1 3/1"]).encode()


def pack(shapes: int) -> dict[str, bytes]:
    """``shapes`` tables of different sizes, each in two colours, and one chair."""
    atlas = Image.new("RGB", (8, 4), COLOURS["red"])
    atlas.paste(COLOURS["blue"], (4, 0, 8, 4))
    buffer = io.BytesIO()
    atlas.save(buffer, "PNG")
    files = {f"dungeon/obj/table_{i}_{c}.obj": obj(1 + i / 10, c) for i in range(shapes) for c in COLOURS}
    return files | {"dungeon/obj/chair_1.obj": obj(9, "red"), "dungeon/textures/dungeon_texture.png": buffer.getvalue()}


def run(source: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--source", source, "--output", output, *more]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("layout", ["folder", "archive"])
def test_geometries_are_divided_and_colours_kept(tmp_path: Path, layout: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if layout == "folder":
        for name, content in pack(40).items():
            path = source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    else:
        with zipfile.ZipFile(source / "all.zip", "w") as archive:
            for name, content in pack(40).items():
                archive.writestr(name, content)
    done = run(source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    splits: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for line in (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            (shown, asked), (said,) = (message["content"] for message in row["messages"])
            assert (shown["type"], asked["text"]) == ("point_cloud", "What object is this?")
            assert said["text"] == row["category"] == "table"  # one chair is fewer than five
            name, colour = row["id"].rsplit("_", 1)
            splits.setdefault(name, set()).add(split)
            points = decode_point_cloud((tmp_path / "out" / shown["path"]).read_bytes(), Limits(), points=10)
            np.testing.assert_allclose(points[:, 3:] * 255, [COLOURS[colour]] * 10, atol=1e-3)
    assert len(splits) == 40
    assert all(len(found) == 1 for found in splits.values())  # both colours of a shape on one side
    held_out = [split for found in splits.values() for split in found if split == "test"]
    assert 3 <= len(held_out) <= 17  # a quarter of 40
    assert "CC0" in (tmp_path / "out" / "README.md").read_text()


def test_few_meshes_of_a_kind_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "chair_1.obj").write_bytes(obj(1, "red"))
    done = run(tmp_path / "source", tmp_path / "out")
    assert done.returncode == 1
    assert "no kind of object has 5 meshes" in done.stderr
    assert run(tmp_path / "source", tmp_path / "out", "--least", "1").returncode == 0
    assert (tmp_path / "out" / "meshes" / "chair_1.ply").is_file()


def test_a_source_without_meshes_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run(tmp_path / "empty", tmp_path / "out")
    assert done.returncode == 1
    assert f"no .obj file in {tmp_path / 'empty'}" in done.stderr
