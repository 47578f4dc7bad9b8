"""The rows of a data file by byte offset: JSON Lines, or one JSON array. A million rows cost 24 MB, not gigabytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.errors import DataError

MAX_ROW_BYTES = 64 * 1024 * 1024
"""Longest row that is parsed. A longer one is nearly always a file without line ends, or media pasted in as base64."""

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_NO_JSON = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x1f\x8b": "a gzip archive",
    b"PK\3\4": "a ZIP archive",
}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Rows:
    """Where each row of ``path`` lies: bytes ``starts[i]`` to ``ends[i]``, beginning in line ``lines[i]`` (from 1).

    ``problem`` is what stopped the search for rows before the end of the file (``"file:line: …"``), if anything did.
    ``stamp`` is the file's size and modification time: a file changed under a run is noticed instead of misread.
    ``digest`` is the SHA-256 of its content, taken while it is read through for its rows. Holds no open file, so it can
    be pickled to worker processes.
    """

    path: Path
    starts: array[int]
    ends: array[int]
    lines: array[int]
    stamp: tuple[int, int]
    problem: str | None = None
    digest: str = ""

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, index: int) -> str:
        """``file:line`` of a row, as error messages begin."""
        return f"{self.path}:{self.lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row, parsed. Raises ``DataError`` naming file and line unless it is a JSON object in UTF-8."""
        where, start, end = self.where(index), self.starts[index], self.ends[index]
        if end - start > MAX_ROW_BYTES:
            size = f"{end - start:,} bytes, the limit is {MAX_ROW_BYTES:,}"
            raise DataError(f"{where}: the row has {size}; keep media in files")
        try:
            with self.path.open("rb") as file:
                if _stamp(file.fileno()) != self.stamp:
                    raise DataError(f"{where}: the file has changed since it was opened; start again")
                file.seek(start)
                data = file.read(end - start)
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error.strerror})") from error
        return parse_row(data, where)


def parse_row(data: bytes, where: str) -> dict[str, Any]:
    """One JSON object. Raises ``DataError`` for anything else, beginning with ``where``."""
    try:
        row = json.loads(data.decode("utf-8"))
        # "\ud83d" without its other half parses, but no tokenizer and no file takes it.
        if _SURROGATE.search(data):
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error.msg} at character {error.pos + 1}") from error
    except UnicodeDecodeError as error:
        place = f"byte {error.start + 1} of the row"
        raise DataError(f"{where}: not valid UTF-8 ({place}); save the file as UTF-8") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff alone) is not a character") from error
    except RecursionError as error:
        raise DataError(f"{where}: the JSON is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object {{…}}, found {_type(row)}")
    return row


def index_file(path: Path) -> Rows:
    """Find the rows of a file: a JSON array when its first character is ``[``, else one object per line (blank lines
    are skipped). A byte order mark and CRLF line ends are accepted.

    JSON Lines are read once, in constant memory. An array is held in memory while it is indexed (about twice its size).
    Raises ``DataError`` when the file cannot be read at all.
    """
    try:
        if path.is_dir():
            raise DataError(f"{path}: is a folder; give a file, or a pattern such as {path / '*.jsonl'}")
        with path.open("rb") as file:
            stamp = _stamp(file.fileno())
            head = file.read(4096)
            for magic, what in _NO_JSON.items():
                if head.startswith(magic):
                    raise DataError(f"{path}:1: this is {what}; expected JSON or JSON Lines in UTF-8")
            begin = len(_BOM) if head.startswith(_BOM) else 0
            if head[begin:].lstrip()[:1] == b"[":
                file.seek(0)
                data = file.read()
                starts, ends, lines, problem = _index_array(data, begin, str(path))
                return Rows(path, starts, ends, lines, stamp, problem, hashlib.sha256(data).hexdigest())
            file.seek(begin)
            starts, ends, lines = array("q"), array("q"), array("q")
            position, number = begin, 0
            content = hashlib.sha256()
            while line := file.readline(MAX_ROW_BYTES):
                number += 1
                size, blank, more = len(line), not line.strip(), line
                content.update(line)
                while not more.endswith(b"\n") and (more := file.readline(MAX_ROW_BYTES)):
                    size += len(more)
                    content.update(more)
                if not blank:
                    starts.append(position)
                    ends.append(position + size)
                    lines.append(number)
                position += size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return Rows(path, starts, ends, lines, stamp, digest=content.hexdigest())


def _index_array(data: bytes, begin: int, name: str) -> tuple[array[int], array[int], array[int], str | None]:
    starts, ends, lines = array("q"), array("q"), array("q")
    # As Latin-1 every byte is one character, so the decoder's positions are byte offsets; JSON's structure is ASCII.
    # Text outside ASCII comes out wrong, which does not matter: rows are parsed again, as UTF-8, when they are used.
    text = data.decode("latin-1")
    decoder = json.JSONDecoder()
    line, counted = 1, 0

    def line_of(position: int) -> int:
        nonlocal line, counted
        line += text.count("\n", counted, position)
        counted = position
        return line

    position = _skip(text, _skip(text, begin) + 1)
    if text[position : position + 1] == "]":
        return starts, ends, lines, _after_array(text, position + 1, name, line_of)
    while True:
        start = position
        number = line_of(start)
        try:
            _, position = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            where = f"{name}:{line_of(max(error.pos, start))}"
            return starts, ends, lines, f"{where}: not valid JSON: {error.msg}; the rest of the file cannot be read"
        except (RecursionError, ValueError) as error:
            return starts, ends, lines, f"{name}:{number}: not valid JSON: {error}; the rest of the file cannot be read"
        starts.append(start)
        ends.append(position)
        lines.append(number)
        position = _skip(text, position)
        mark = text[position : position + 1]
        if mark == "]":
            return starts, ends, lines, _after_array(text, position + 1, name, line_of)
        if mark != ",":
            found = repr(mark) if mark else "the end of the file"
            return starts, ends, lines, f"{name}:{line_of(position)}: expected ',' or ']' after a row, found {found}"
        position = _skip(text, position + 1)


def _after_array(text: str, position: int, name: str, line_of: Any) -> str | None:
    position = _skip(text, position)
    if position < len(text):
        return f"{name}:{line_of(position)}: text after the end of the JSON array: {text[position : position + 20]!r}"
    return None


def _skip(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    assert space is not None
    return space.end()


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
