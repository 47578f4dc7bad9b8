"""Rows by byte offset: JSON Lines and arrays, marks and line ends, everything that is not a row."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path

import pytest

from mmllm.data.rows import MAX_ROW_BYTES, index_file
from mmllm.errors import DataError

TEXTS = [
    "family 👨‍👩‍👧‍👦 flag 🏳️‍🌈",
    "שלום \u202eabc\u202c مرحبا",
    "e\u0301a\u0328\u0301",
    "nul \x00 inside",
    "ключ — 値",
    "\u2028 line separator \u0085",
]


def save(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("array", [True, False])
def test_any_text_comes_back_as_written(tmp_path: Path, array: bool, ascii_only: bool) -> None:
    values = [{"text": text} for text in TEXTS]
    lines = [json.dumps(value, ensure_ascii=ascii_only) for value in values]
    rows = index_file(save(tmp_path / "f", "[\n" + ",\n".join(lines) + "\n]\n" if array else "\n".join(lines)))
    assert [rows[i] for i in range(len(rows))] == values
    assert list(rows.lines) == [i + 1 + array for i in range(len(values))]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"a":1}\n\n  \n{"a":2}', [1, 4]),
        ('\ufeff{"a":1}\r\n{"a":2}\r\n', [1, 2]),
        ('\ufeff [\r\n {"a":1},\r\n\r\n {"a":\n 2} ] \r\n', [2, 4]),
        ('[{"a":1},{"a":2}]', [1, 1]),
    ],
)
def test_blank_lines_byte_order_mark_and_crlf_are_stepped_over(tmp_path: Path, text: str, lines: list[int]) -> None:
    rows = index_file(save(tmp_path / "f", text))
    assert [rows[0], rows[1]] == [{"a": 1}, {"a": 2}]
    assert list(rows.lines) == lines
    assert rows.problem is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "f:2: not valid JSON: "),
        (b'{"a": 1} x', "f:2: not valid JSON: Extra data at character 10"),
        (b"[1]", r"f:2: expected a JSON object {…}, found an array"),
        (b"7", "f:2: expected a JSON object {…}, found a number"),
        (b'"x"', "found a string"),
        (b"null", "found null"),
        (b'{"a": "\xff"}', "f:2: not valid UTF-8 (byte 8 of the row)"),
        (b'{"a": "\\ud83d"}', "f:2: half of a surrogate pair"),
        (b'{"a": "\\uDE00 x"}', "f:2: half of a surrogate pair"),
        (b'{"a": ' + b"[" * 200_000, "f:2: "),
        (b'{"a": ' + b"9" * 5000 + b"}", "f:2: not valid JSON: "),
        (b"\x00\x00\x00", "f:2: not valid JSON: "),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, message: str) -> None:
    rows = index_file(save(tmp_path / "f", b'{"a": 1}\n' + line + b'\n{"a": "\\ud83d\\ude00"}\n'))
    assert (rows[0], rows[2]) == ({"a": 1}, {"a": "😀"})
    with pytest.raises(DataError) as error:
        rows[1]
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "count", "problem"),
    [
        ('[{"a":1},\n{"a":2},\n{"a":', 2, "f:3: not valid JSON: "),
        ('[{"a":1},\n{"a":2}\n{"a":3}]', 2, "f:3: expected ',' or ']' after a row, found '{'"),
        ('[{"a":1}', 1, "f:1: expected ',' or ']' after a row, found the end of the file"),
        ('[{"a":1}]\n\n]', 1, "f:3: text after the end of the JSON array: ']'"),
        ("[]\nx", 0, "f:2: text after the end"),
        ('[{"a":1},\n]', 1, "f:2: not valid JSON"),
        ("[" * 100_000, 0, "f:1: not valid JSON"),
    ],
)
def test_a_damaged_array_keeps_the_rows_before_the_damage(tmp_path: Path, text: str, count: int, problem: str) -> None:
    rows = index_file(save(tmp_path / "f", text))
    assert [rows[i] for i in range(len(rows))] == [{"a": i + 1} for i in range(count)]
    assert rows.problem is not None
    assert problem in rows.problem


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"PK\x03\x04", "ZIP"),
    ],
)
def test_files_that_are_no_text_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        index_file(save(tmp_path / "f", data))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        index_file(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"is a folder; give a file, or a pattern such as .*/\*\.jsonl"):
        index_file(tmp_path)


def test_a_file_changed_under_the_run_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "f", '{"a": 1}\n{"a": 2}\n')
    rows = index_file(path)
    save(path, '{"a": 10}\n{"a": 2}\n')
    with pytest.raises(DataError, match="has changed since it was opened"):
        rows[1]


def test_an_overlong_row_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n')
        os.ftruncate(file.fileno(), 3 * MAX_ROW_BYTES)
        file.seek(3 * MAX_ROW_BYTES)
        file.write(b'\n{"a": 2}\n')
    rows = index_file(path)
    assert (rows[0], rows[2]) == ({"a": 1}, {"a": 2})
    with pytest.raises(DataError, match=r"f:2: the row has 201,\d+,\d+ bytes, the limit is"):
        rows[1]


def test_a_megabyte_without_spaces_takes_bounded_time(tmp_path: Path) -> None:
    text = "ж" * 500_000 + "x" * 500_000
    begin = time.perf_counter()
    rows = index_file(save(tmp_path / "f", json.dumps({"text": text})))
    assert rows[0]["text"] == text
    assert time.perf_counter() - begin < 2


def test_a_hundred_thousand_rows_cost_bytes_not_objects(tmp_path: Path) -> None:
    line = json.dumps({"id": "x" * 40, "messages": [{"role": "user", "content": "y" * 100}]})
    rows = index_file(save(tmp_path / "f", f"{line}\n" * 100_000))
    assert len(rows) == 100_000
    assert len(pickle.dumps(rows)) < 2_500_000
    assert pickle.loads(pickle.dumps(rows))[99_999]["id"] == "x" * 40
