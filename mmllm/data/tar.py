"""Where the members of a tar archive lie. Only names, sizes and places are read; nothing is ever unpacked to a disk.

Python's ``tarfile`` would do for good archives. It ends silently at a damaged header in the middle of one, keeps an object
per member, and knows links, devices and sparse files, none of which a shard of samples needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import BinaryIO

from mmllm.errors import DataError

BLOCK = 512
MAX_EXTENSION = 1 << 20
"""Bytes of one extended header, which holds a long name."""
MAX_NAME = 4096

PICKLES = {".pkl", ".pickle", ".pyd", ".pth", ".pt", ".ckpt", ".joblib", ".dill"}
"""Members that other tools load by running what is in them. A shard that holds one is not opened."""

_REGULAR, _FOLDER = (b"0", b"\0", b"7"), b"5"
_OTHERS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "a sparse file",
    b"M": "a piece of another archive",
}
_EMPTY = bytes(BLOCK)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class DamagedTar(DataError):
    """The archive breaks off, or holds something else than a header where one should be. What comes before is whole."""


@dataclass(frozen=True)
class Member:
    """A regular file. Its headers begin at byte ``start``, its ``size`` bytes at ``offset``, and the next member at
    ``end``.
    """

    name: str
    start: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + _padded(self.size)


def members(file: BinaryIO, size: int, where: str) -> Iterator[Member]:
    """The regular files of an uncompressed tar archive (ustar, GNU or pax) of ``size`` bytes; folders are passed over.

    Raises ``DamagedTar`` where the archive breaks off or is no archive, and ``DataError`` for what no data shard has to hold:
    names that lead out of the archive's folder, links, devices, sparse files, pickles. Both begin with ``where``.
    """
    position, long_name, long_size, start = 0, None, None, 0
    while True:
        if position + BLOCK > size:
            raise DamagedTar(f"{where}: the archive breaks off at byte {size:,}, without the empty blocks that end one")
        file.seek(position)
        header = file.read(BLOCK)
        if header == _EMPTY:
            _check_rest(file, where)
            return
        kind, length = _check_header(header, position, where)
        offset = position + BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            if length > MAX_EXTENSION or offset + _padded(length) > size:
                raise DamagedTar(f"{where}: an extended header of {length:,} bytes at byte {position:,}")
            content = file.read(length)
            if kind == b"L":
                long_name = content.rstrip(b"\0")
            elif kind == b"x":
                fields = _pax(content, position, where)
                if any(key.startswith(b"GNU.sparse") for key in fields):
                    raise DataError(
                        f"{where}: holds a sparse file at byte {position:,}; a shard holds regular files only"
                    )
                long_name = fields.get(b"path", long_name)
                long_size = _number(fields[b"size"], position, where) if b"size" in fields else None
            position = offset + _padded(length)
            continue
        name = _name(header) if long_name is None else long_name
        length = length if long_size is None else long_size
        text = _safe(name, where)
        long_name = long_size = None
        if kind in _REGULAR and not name.endswith(b"/"):
            if PurePosixPath(text).suffix.lower() in PICKLES:
                raise DataError(
                    f"{where}: holds {text!r:.80}; pickles can run code when they are loaded, so no shard with one is opened"
                )
            if offset + length > size:
                raise DamagedTar(
                    f"{where}: {text!r:.80} begins at byte {offset:,} and has {length:,}, but the file ends at {size:,}"
                )
            yield Member(text, start, offset, length)
        elif kind not in (*_REGULAR, _FOLDER):
            what = _OTHERS.get(kind, f"a member of type {kind!r}")
            raise DataError(f"{where}: {text!r:.80} is {what}; a shard holds regular files only")
        position = start = offset + _padded(length)


def _check_header(header: bytes, position: int, where: str) -> tuple[bytes, int]:
    """Type and size that a header tells."""
    told = header[148:156].strip(b" \0")
    found = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if not told or not all(byte in b"01234567" for byte in told) or int(told, 8) != found:
        if position == 0:
            packed = next((name for magic, name in _COMPRESSED.items() if header.startswith(magic)), None)
            if packed is not None:
                raise DamagedTar(
                    f"{where}: is compressed ({packed}), so it has no random access; unpack it to a plain tar"
                )
            raise DamagedTar(f"{where}: is no tar archive")
        raise DamagedTar(f"{where}: no header at byte {position:,}; the archive is damaged from there")
    field = header[124:136]
    if field[0] in (0x80, 0xFF):  # a size of 8 GiB and more, in binary
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    else:
        digits = field.strip(b" \0")
        size = int(digits or b"0", 8) if all(byte in b"01234567" for byte in digits) else -1
    if size < 0:
        raise DamagedTar(f"{where}: the header at byte {position:,} tells no size")
    return header[156:157], size


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    # Only POSIX's format has a prefix; GNU's keeps times there.
    return prefix + b"/" + name if header[257:263] == b"ustar\0" and prefix else name


def _safe(raw: bytes, where: str) -> str:
    """The name as text. Nothing is written under it; one that leads elsewhere was made to do harm to other programs."""
    text = raw.decode("utf-8", "backslashreplace").removeprefix("./")
    windows = PureWindowsPath(text)
    hostile = text.startswith("/") or windows.drive or windows.root or ".." in PurePosixPath(text).parts or "\0" in text
    if hostile or len(text) > MAX_NAME:
        raise DataError(f"{where}: the member {text!r:.80} leads out of the archive's folder; this shard is not opened")
    return text


def _pax(content: bytes, position: int, where: str) -> dict[bytes, bytes]:
    """Records ``length key=value`` of an extended header."""
    fields = {}
    while content.strip(b"\0"):
        number, space, _ = content.partition(b" ")
        length = int(number) if space and number.isdigit() and len(number) < 10 else 0
        key, equals, value = content[len(number) + 1 : length - 1].partition(b"=")
        if not equals or length > len(content):
            raise DamagedTar(f"{where}: the extended header at byte {position:,} cannot be read")
        fields[key] = value
        content = content[length:]
    return fields


def _number(digits: bytes, position: int, where: str) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise DamagedTar(f"{where}: the extended header at byte {position:,} tells no size")
    return int(digits)


def _check_rest(file: BinaryIO, where: str) -> None:
    """Behind the first empty block only empty ones may follow."""
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            text = "several archives joined into one file have to be taken apart"
            raise DamagedTar(f"{where}: goes on behind the empty block that ends an archive; {text}")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
