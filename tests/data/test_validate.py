"""``mmllm data validate``: each fault with file and line, exit status 1, never a traceback."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_rows import row
from PIL import Image

from mmllm.config.base import BUILTIN
from mmllm.data.kinds import formats
from mmllm.data.validate import MAX_UNREADABLE, run_validate, validate

Write = Callable[..., Path]
IMAGE, SOUND = {"type": "image", "path": "red.png"}, {"type": "audio", "path": "tone.wav"}


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_a_good_file(media: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(row("a", [IMAGE, IMAGE, {"type": "text", "text": "Same?"}]), row("b", [SOUND]), row("c"))
    assert run_validate(str(path)) == 0
    assert capsys.readouterr().out == f"{path}: format messages, 3 rows, 1 audio, 2 image media, no faults\n"


def test_empty_questions_null_ids_and_a_missing_root_are_faults(media: Path, write: Write) -> None:
    silent = {"id": None, **turns(("user", " "), ("assistant", "Yes."))}
    path = write(silent, row("b", [IMAGE]))
    found = [str(fault) for fault in validate(path).faults]
    assert found == [
        f"{path}:1: id is null; give a text or a number, or leave it out",
        f"{path}:1: message 0: the user says nothing; expected text or media",
    ]
    (fault,) = validate(path, root=media / "nowhere").faults
    assert "is no folder" in fault.message


def test_all_faults_are_found_in_one_go(media: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    (media / "folder.png").mkdir()
    (media / "text.png").write_text("<svg/>")
    (media / "cut.png").write_bytes((media / "red.png").read_bytes()[:60])
    image = {"type": "image", "path": ""}
    path = write(
        row("ok", [IMAGE]),
        '{"messages": [',
        row("ok"),
        row("gone", [{**image, "path": "none.png"}, {**image, "path": "none.png"}]),
        row("out", [{**image, "path": "../x.png"}]),
        row("dir", [{**image, "path": "folder.png"}]),
        row("svg", [{**image, "path": "text.png"}]),
        row("cut", [{**image, "path": "cut.png"}]),
        row("swap", [{"type": "audio", "path": "red.png"}]),
        row("typo", [{"type": "imgae", "path": "red.png"}]),
        row("empty", answer="  "),
        turns(),
        turns(("system", "S")),
        turns(("assistant", "first")),
        turns(("user", "a"), ("user", "b")),
        turns(("user", "no reply")),
        turns(("user", None), ("assistant", "x")),
        {"conversations": []},
        row("same")["messages"],
        '{"id": "half", "messages": "\\ud83d"}',
    )
    assert run_validate(str(path)) == 1
    *faults, summary = capsys.readouterr().out.splitlines()
    expected = {
        2: "not valid JSON",
        3: "id 'ok' is used before, in line 1",
        4: "'none.png': no such file",
        5: "must stay in the data file's folder",
        6: "a folder",
        7: "text.png",
        8: "cut.png",
        9: "red.png",
        10: "a part of type 'imgae'; expected one of text, image, audio, video, point_cloud; did you mean 'image'?",
        11: "the assistant's reply is empty",
        12: "no user message",
        13: "no user message",
        14: "turn 0 is from 'assistant', expected 'user'",
        15: "turn 1 is from 'user', expected 'assistant'",
        16: "ends without an assistant reply",
        17: "content is NoneType",
        18: 'no "messages" in this row',
        19: "expected a JSON object {…}, found an array",
        20: "half of a surrogate pair",
    }
    found = {int(line.removeprefix(f"{path}:").split(":")[0]): line for line in faults}
    assert sorted(found) == sorted(expected)
    assert len(faults) == len(expected)  # the file named twice in one row is one fault
    for line, text in expected.items():
        assert text in found[line], line
    assert summary.endswith("19 faults")


@pytest.mark.parametrize(
    ("data", "place", "message"),
    [
        (b'\xef\xbb\xbf{"messages": []}\n', 1, "begins with a byte order mark"),
        (b'{"x": 1}\n{"messages": []}\r\n', 2, "the line ends with CR LF"),
        (b"", 1, "holds no rows"),
        (b"\n\n", 1, "holds no rows"),
        (b"[]", 1, "holds no rows"),
        (b"\xff\xfe{\x00", 1, "UTF-16"),
        (b"\x1f\x8b\x08", 1, "gzip"),
        (b'[{"messages": []},\n{"messages": []}]\n]', 3, "text after the end of the JSON array"),
        (b'[\n{"messages": []},\n{"mess', 3, "not valid JSON"),
        (b'{"messages": []}\nend of file\n', 2, "not valid JSON"),
        (b'{"text": "x"}\n', 1, "no row has a known layout; the formats are hf_datasets, llava, messages"),
    ],
)
def test_faults_of_the_file_itself(tmp_path: Path, data: bytes, place: int, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    faults = [str(fault) for fault in validate(path).faults]
    assert any(fault.startswith(f"{path}:{place}: ") and message in fault for fault in faults), faults


def test_missing_file_folder_and_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, format, message in (
        ("none.jsonl", None, "cannot be read (No such file or directory)"),
        (".", None, "is a folder"),
        ("none.jsonl", "mesages", "format 'mesages' is unknown"),
    ):
        path = tmp_path / name
        assert run_validate(str(path), format) == 1
        output = capsys.readouterr().out
        assert output.startswith(f"{path}:1: ")
        assert message in output


def test_arrays_report_the_line_a_row_begins_in(tmp_path: Path, media: Path) -> None:
    good = {"id": "1", "image": "red.png", "conversations": [{"from": "human", "value": "<image>?"}]}
    good["conversations"] += [{"from": "gpt", "value": "red"}]  # type: ignore[operator]
    bad = {**good, "id": "2", "image": ["red.png", "two.png"]}
    path = tmp_path / "llava.json"
    path.write_text(json.dumps([good, bad, {**good, "id": "1"}], indent=1))
    report = validate(path)
    text = path.read_text().splitlines()
    assert report.format == "llava"
    lines = [int(fault.where.rpartition(":")[2]) for fault in report.faults]
    assert ['"image"' in text[line + 1] and text[line - 1].strip() == "{" for line in lines] == [True, True]
    assert "the text has 1 <image>, but the row gives 2" in report.faults[0].message
    assert "id '1' is used before, in line 2" in report.faults[1].message


def test_fast_does_not_decode(media: Path, write: Write) -> None:
    (media / "cut.png").write_bytes((media / "red.png").read_bytes()[:60])
    path = write(row("a", [{"type": "image", "path": "cut.png"}]), row("b", [{"type": "image", "path": "none.png"}]))
    assert [f.where for f in validate(path, fast=True).faults] == [f"{path}:2"]
    assert [f.where for f in validate(path).faults] == [f"{path}:1", f"{path}:2"]


def test_a_pixel_bomb_is_refused_from_its_header(tmp_path: Path, write: Write) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    scan = zlib.compress(bytes(3751) * 30_000, 9)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", scan) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    begin = time.perf_counter()
    (fault,) = validate(write(row("a", [{"type": "image", "path": "bomb.png"}]))).faults
    assert "pixels" in fault.message
    assert time.perf_counter() - begin < 1


def test_root_is_where_the_media_are(media: Path, write: Write) -> None:
    path = write(row("a", [IMAGE]), name="lists/data.jsonl")
    assert not validate(path).ok
    assert validate(path, root=media).ok


def test_questions_need_no_reply_but_training_rows_do(media: Path, write: Write) -> None:
    assert validate(write({"question_id": 1, "image": "red.png", "text": "Which colour?"})).ok
    human = {"from": "human", "value": "<image>?"}
    (fault,) = validate(write({"id": "1", "image": "red.png", "conversations": [human]})).faults
    assert "ends without an assistant reply" in fault.message


def test_clips_are_decoded(media: Path, write: Write) -> None:
    (media / "v.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42")
    frames = [Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(3)]
    frames[0].save(media / "v.gif", save_all=True, append_images=frames[1:])
    user, reply = {"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "A dog."}
    report = validate(write(*({"messages": [user, reply], "videos": [name]} for name in ("v.mp4", "v.gif"))))
    assert report.format == "sharegpt"
    assert report.media["video"] == 2
    (fault,) = report.faults
    assert fault.where.endswith(":1")
    assert "v.mp4" in fault.message
    assert "truncated or damaged" in fault.message
    assert validate(write({"messages": [user, reply], "videos": ["v.mp4"]}), fast=True).ok


def test_point_clouds_are_decoded(media: Path, write: Write) -> None:
    (media / "flat.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    (media / "cut.off").write_text("OFF\n3 1 0\n0 0 0\n1 0\n")
    np.save(media / "objects.npy", np.array([[{}, {}, {}]]), allow_pickle=True)
    names = ("flat.off", "cut.off", "objects.npy")
    report = validate(write(*(row(name, [{"type": "point_cloud", "path": name}]) for name in names)))
    assert report.media["point_cloud"] == 3
    cut, objects = report.faults
    assert cut.where.endswith(":2")
    assert "cut.off" in cut.message
    assert "truncated or damaged" in cut.message
    assert "holds object; expected numbers" in objects.message


def test_a_file_of_something_else_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("nothing like JSON\n" * 10_000)
    report = validate(path, "messages")
    assert len(report.faults) == MAX_UNREADABLE + 1
    assert "the rest is not read" in report.faults[-1].message


def test_ten_thousand_turns_and_a_megabyte_take_bounded_time(write: Write) -> None:
    long = turns(*(("user", "question") if i % 2 == 0 else ("assistant", "answer") for i in range(10_000)))
    path = write(long, row("wide", "x" * 1_000_000), row("tags", "<image>" * 100_000))
    begin = time.perf_counter()
    assert validate(path).ok
    assert not validate(path, "sharegpt").ok
    assert time.perf_counter() - begin < 5


def test_every_shipped_reader_of_files_is_a_format() -> None:
    assert sorted(formats()) == sorted(BUILTIN["reader"])
