"""Preparing NLVR from both layouts: same rows, contained images, box orders that keep the boxes' contents."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "training" / "prepare_nlvr.py"
spec = importlib.util.spec_from_file_location("prepare_nlvr", SCRIPT)
assert spec is not None
assert spec.loader is not None
prepare_nlvr = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare_nlvr)

SENTENCES = {"1-0": ("There is a box", True, "0"), "1-1": ("There is a box", False, "0"), "7-0": ("A tower", True, "5")}


def picture(shade: int) -> bytes:
    """Three boxes with different greys, so that a box order can be read off."""
    pixels = np.full((100, 400, 3), 128, np.uint8)
    for box in range(3):
        pixels[:, box * 150 : box * 150 + 100] = shade + 40 * box
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A folder with jsonl and tar; the tar also holds a member that tries to leave the folder."""
    folder = tmp_path / "pack"
    folder.mkdir()
    rows = [
        {"id": i, "sentence": s, "label": label, "directory": d, "image": f"train-{i}-0.png"}
        for i, (s, label, d) in SENTENCES.items()
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with tarfile.open(folder / "train-images.tar", "w") as archive:
        for number, row in enumerate(rows):
            add(archive, f"train/{row['image']}", picture(0 if number < 2 else 30))
        add(archive, "../../outside.png", b"x")
    return folder


@pytest.fixture
def authors(tmp_path: Path) -> Path:
    """The same rows as the authors' repository lays them out."""
    folder = tmp_path / "repository" / "nlvr" / "train"
    lines = []
    for number, (i, (sentence, label, directory)) in enumerate(SENTENCES.items()):
        (folder / "images" / directory).mkdir(parents=True, exist_ok=True)
        (folder / "images" / directory / f"train-{i}-0.png").write_bytes(picture(0 if number < 2 else 30))
        (folder / "images" / directory / f"train-{i}-1.png").write_bytes(b"another order, not needed")
        row = {"identifier": i, "sentence": sentence, "label": str(label).lower(), "directory": directory}
        lines.append(json.dumps(row) + "\n")
    (folder / "train.json").write_text("".join(lines))
    return tmp_path / "repository"


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_layouts_give_the_same_rows(pack: Path, authors: Path, tmp_path: Path) -> None:
    for source, output in ((pack, tmp_path / "a"), (authors, tmp_path / "b")):
        command = [sys.executable, str(SCRIPT), "--source", str(source), "--output", str(output), "--splits", "train"]
        subprocess.run([*command, "--validation", "5"], check=True, capture_output=True)
    rows = lines(tmp_path / "a" / "train.jsonl")
    assert rows == lines(tmp_path / "b" / "train.jsonl")
    assert rows[0]["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": "images/train-1-0-0.png"},
                {"type": "text", "text": "Is this true? There is a box"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    assert len(rows) == 2
    assert len(lines(tmp_path / "a" / "validation.jsonl")) == 1
    assert not (tmp_path / "outside.png").exists()
    assert "CC BY 4.0" in (tmp_path / "a" / "README.md").read_text()
    assert (tmp_path / "a" / "images" / "train-1-0-0.png").read_bytes() == picture(0)


def test_six_orders_move_boxes_and_keep_labels(pack: Path, tmp_path: Path) -> None:
    prepare_nlvr.prepare(pack, tmp_path / "out", ["train"], True, set(), False)
    rows = lines(tmp_path / "out" / "train.jsonl")
    assert len(rows) == 18
    assert len({str(row["id"]) for row in rows}) == 18
    seen = set()
    for order in range(6):
        pixels = np.asarray(Image.open(tmp_path / "out" / "images" / f"train-1-0-{order}.png"))
        assert (pixels[:, 100:150] == 128).all()
        seen.add(tuple(int(pixels[50, x, 0]) for x in (50, 200, 350)))
    assert len(seen) == 6
    assert all(sorted(order) == [0, 40, 80] for order in seen)


def test_group_asks_all_sentences_of_a_picture_in_one_dialogue(pack: Path, tmp_path: Path) -> None:
    prepare_nlvr.prepare(pack, tmp_path / "out", ["train"], False, set(), True)
    rows = lines(tmp_path / "out" / "train.jsonl")
    assert [len(row["messages"]) for row in rows] == [4, 2]  # type: ignore[arg-type]
    types = [[part["type"] for part in turn["content"]] for turn in rows[0]["messages"]]  # type: ignore[attr-defined]
    assert types == [["image", "text"], ["text"], ["text"], ["text"]]


def test_missing_split_and_missing_picture_are_named(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no dev split in"):
        prepare_nlvr.prepare(pack, tmp_path / "out", ["dev"], False, set(), False)
    with (pack / "train.jsonl").open("a") as file:
        row = {"id": "9-9", "sentence": "x", "label": True, "directory": "0", "image": "train-9-9-0.png"}
        file.write(json.dumps(row) + "\n")
    with pytest.raises(FileNotFoundError, match=r"train-9-9-0\.png"):
        prepare_nlvr.prepare(pack, tmp_path / "out", ["train"], False, set(), False)
