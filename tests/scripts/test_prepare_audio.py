"""training/prepare_fsdd.py and prepare_esc10.py, on made-up sources in each layout they read."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import wave
import zipfile
from pathlib import Path

import pytest

TRAINING = Path(__file__).parents[2] / "training"
TAKES = (0, 4, 5, 9, 10, 49)
FSDD = [f"{digit}_{speaker}_{take}.wav" for digit in (0, 7) for speaker in ("ann", "bob") for take in TAKES]


def wav(value: int) -> bytes:
    """A tenth of a second; the value makes the content of each file different."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(value.to_bytes(2, "little") * 800)
    return buffer.getvalue()


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TRAINING / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def read(path: Path) -> dict[str, tuple[str, str, str]]:
    """{id: (media path, question, answer)} of a messages file of one-question dialogues."""
    rows = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        audio, text = user["content"]
        assert (audio["type"], text["type"]) == ("audio", "text")
        assert assistant["content"][0]["type"] == "text"
        rows[row["id"]] = (audio["path"], text["text"], assistant["content"][0]["text"])
    return rows


def make_fsdd(folder: Path, layout: str) -> None:
    folder.mkdir()
    if layout == "repository":
        (folder / "recordings").mkdir()
        for i, name in enumerate(FSDD):
            (folder / "recordings" / name).write_bytes(wav(i))
    else:
        with zipfile.ZipFile(folder / "all.zip", "w") as archive:
            for i, name in enumerate(FSDD):
                archive.writestr(f"../../{name}" if i % 2 else name, wav(i))
            archive.writestr("notes.txt", "not a recording")


@pytest.mark.parametrize("layout", ["repository", "archive"])
def test_fsdd_splits_by_take(tmp_path: Path, layout: str) -> None:
    make_fsdd(tmp_path / "source", layout)
    done = run("prepare_fsdd.py", "--source", tmp_path / "source", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    takes = {"train": {10, 49}, "validation": {5, 9}, "test": {0, 4}}
    for split, expected in takes.items():
        rows = read(tmp_path / "out" / f"{split}.jsonl")
        assert {int(name.rsplit("_", 1)[1]) for name in rows} == expected
        assert len(rows) == 8
        for name, (media, question, answer) in rows.items():
            assert question == "Which digit is spoken?"
            assert answer == {"0": "zero", "7": "seven"}[name.split("-")[1][0]]
            assert (tmp_path / "out" / media).read_bytes() == wav(FSDD.index(Path(media).name))
    assert not list(tmp_path.glob("*.wav"))
    assert "CC BY-SA 4.0" in (tmp_path / "out" / "README.md").read_text()


def test_no_validation_puts_all_takes_into_training(tmp_path: Path) -> None:
    make_fsdd(tmp_path / "source", "archive")
    arguments = ("prepare_fsdd.py", "--source", tmp_path / "source", "--output", tmp_path / "out")
    assert run(*arguments).returncode == 0
    assert run(*arguments, "--validation", "none").returncode == 0
    assert not (tmp_path / "out" / "validation.jsonl").exists()
    assert len(read(tmp_path / "out" / "train.jsonl")) == 16


@pytest.mark.parametrize("script", ["prepare_fsdd.py", "prepare_esc10.py"])
def test_a_source_without_recordings_is_named(tmp_path: Path, script: str) -> None:
    (tmp_path / "empty").mkdir()
    done = run(script, "--source", tmp_path / "empty", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert f"in {tmp_path / 'empty'}, its folders or its archives; expected" in done.stderr


def test_an_oversized_member_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with zipfile.ZipFile(tmp_path / "source" / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0_ann_7.wav", bytes(5_000_000))
    done = run("prepare_fsdd.py", "--source", tmp_path / "source", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "0_ann_7.wav holds 5000000 bytes" in done.stderr


ESC10 = {f"{fold}-10{fold}-A": ("dog bark", "sea waves")[fold % 2] for fold in range(1, 6)}


def make_esc10(folder: Path, layout: str) -> None:
    folder.mkdir()
    if layout == "esc50":
        (folder / "audio").mkdir()
        (folder / "meta").mkdir()
        rows = ["filename,fold,target,category,esc10,src_file,take"]
        for i, (stem, category) in enumerate(ESC10.items()):
            (folder / "audio" / f"{stem}.wav").write_bytes(wav(i))
            name = {"dog bark": "dog", "sea waves": "sea_waves"}[category]
            rows.append(f"{stem}.wav,{stem[0]},0,{name},True,10{stem[0]},A")
        (folder / "audio" / "1-999-A.wav").write_bytes(wav(99))
        rows.append("1-999-A.wav,1,3,cow,False,999,A")
        (folder / "meta" / "esc50.csv").write_text("\n".join(rows))
        credit = [f"- [{stem}.ogg]: clip derived from x.wav (http://y) by author{stem[0]} [CC0]" for stem in ESC10]
        (folder / "LICENSE").write_text("\n".join(["# ESC-50", *credit]))
    elif layout == "folders":
        for i, (stem, category) in enumerate(ESC10.items()):
            place = folder / f"00{i} - {category.capitalize()}"
            place.mkdir(exist_ok=True)
            (place / f"{stem}.ogg").write_bytes(wav(i))
    else:
        rows = []
        with tarfile.open(folder / "clips.tar", "w") as archive:
            for i, (stem, category) in enumerate(ESC10.items()):
                info = tarfile.TarInfo(f"/{stem}.ogg")
                info.size = len(wav(i))
                archive.addfile(info, io.BytesIO(wav(i)))
                row = {"file": f"{stem}.ogg", "category": category, "author": f"author{stem[0]}"}
                rows.append(json.dumps(row | {"source_title": "x", "source_url": "http://y", "licence": "CC0"}))
        (folder / "clips.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize("layout", ["esc50", "folders", "archive"])
def test_esc10_splits_by_fold(tmp_path: Path, layout: str) -> None:
    make_esc10(tmp_path / "source", layout)
    done = run("prepare_esc10.py", "--source", tmp_path / "source", "--output", tmp_path / "out", "--validation", "2")
    assert done.returncode == 0, done.stderr
    found = {split: read(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "validation", "test")}
    folds = {split: {name.split("-")[1] for name in rows} for split, rows in found.items()}
    assert folds == {"train": {"1", "3", "4"}, "validation": {"2"}, "test": {"5"}}
    for rows in found.values():
        for name, (media, question, answer) in rows.items():
            assert question == "What do you hear?"
            assert answer == ESC10[name.removeprefix("esc10-")]
            assert (tmp_path / "out" / media).is_file()
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "CC BY 3.0" in readme
    assert ("author3" if layout != "folders" else "https://freesound.org/s/103/") in readme
