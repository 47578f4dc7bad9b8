"""Tar shards with random access: where each sample begins and ends, from an index file or from the archive's headers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmllm.data.tar import DamagedTar, Member, members
from mmllm.errors import DataError

INDEX = ".index.json"
"""What the name of a shard's index file has behind the shard's own."""
VERSION = 1
MAX_INDEX_BYTES = 1 << 30
MAX_MEMBERS = 1000
"""Members of one sample."""
MAX_SAMPLE_BYTES = 512 * 1024 * 1024
"""All members of one sample together, with their headers."""

_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
_TEXT = (".json", ".txt")


@dataclass(frozen=True)
class Shard:
    """One tar file: bytes ``starts[i]`` to ``ends[i]`` hold sample i, consecutive members of one key.

    ``checks`` are CRC-32s of these bytes (empty where the index was made from the headers alone). ``digest`` is the SHA-256 of
    the file where it was written by mmllm, else that of its headers and texts. ``damage`` says where the shard cannot be
    read further; it stands for one more sample, which cannot be used. ``stamp``: size and modification time.
    """

    path: Path
    starts: array[int]
    ends: array[int]
    checks: array[int]
    digest: str
    stamp: tuple[int, int]
    damage: str | None = None

    def __len__(self) -> int:
        return len(self.starts) + (self.damage is not None)

    def where(self, index: int) -> str:
        """``shard:number`` of a sample, counted from 1."""
        return f"{self.path}:{index + 1}"

    def read(self, index: int) -> tuple[str, dict[str, bytes]]:
        """The key of a sample, and its members' contents by the part of their names behind the key (``json``, ``0.jpg``).

        All is read into memory in one piece and nothing written. Raises ``DataError`` naming shard and sample when the
        bytes are gone, changed, over ``MAX_SAMPLE_BYTES`` or ``MAX_MEMBERS``, or not this sample.
        """
        where = self.where(index)
        if index == len(self.starts):
            raise DataError(str(self.damage))
        start, end = self.starts[index], self.ends[index]
        if end - start > MAX_SAMPLE_BYTES:
            raise DataError(f"{where}: the sample has {end - start:,} bytes, the limit is {MAX_SAMPLE_BYTES:,}")
        try:
            with self.path.open("rb") as file:
                if _stamp(file) != self.stamp:
                    raise DataError(f"{where}: the file has changed since it was opened; start again")
                file.seek(start)
                data = file.read(end - start)
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error.strerror})") from error
        if len(data) < end - start:
            size = f"it has {self.stamp[0]:,} bytes, this sample ends at {end:,}"
            raise DataError(f"{where}: the shard breaks off ({size}); copy it again")
        if self.checks and zlib.crc32(data) != self.checks[index]:
            raise DataError(f"{where}: the bytes are not those of the index (CRC-32 differs); copy the shard again")
        found: dict[str, bytes] = {}
        keys = set()
        archive = data + bytes(1024)
        for number, member in enumerate(members(io.BytesIO(archive), len(archive), where)):
            if number == MAX_MEMBERS:
                raise DataError(f"{where}: the sample has more than {MAX_MEMBERS:,} members")
            named = key_of(member.name)
            if named is not None:
                keys.add(named[0])
                found[named[1]] = data[member.offset : member.offset + member.size]
        if len(keys) != 1:
            raise DataError(f"{where}: the index is not this shard's; remove {self.path.name}{INDEX}")
        return keys.pop(), found


def key_of(name: str) -> tuple[str, str] | None:
    """Key and extension of a member: a sample's members share what stands before the first dot of the file's name
    (WebDataset's rule). None for members that belong to no sample: without extension, hidden, or named ``__…``.
    """
    match = _KEY.fullmatch(name)
    hidden = any(part.startswith((".", "__")) for part in name.split("/"))
    return None if match is None or hidden else (match[1], match[2].lower())


def open_shard(path: Path) -> Shard:
    """A shard with the index beside it, else with the one kept from an earlier opening, else with one that is made from the
    shard's headers and kept. Raises ``DataError`` for an archive that is refused (``tar.members``) and for an index that
    cannot be read; a damaged archive is told by ``damage``.
    """
    try:
        with path.open("rb") as file:
            stamp = _stamp(file)
            beside = path.with_name(path.name + INDEX)
            kept = _kept(path, stamp)
            for place in (beside, kept):
                if place.is_file():
                    return _read_index(place, path, stamp)
            shard = scan(file, path, stamp)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    _keep(shard, kept)
    return shard


def scan(file: BinaryIO, path: Path, stamp: tuple[int, int]) -> Shard:
    """Find a shard's samples by its headers: two reads a member, whatever its size."""
    starts, ends = array("q"), array("q")
    content = hashlib.sha256()
    current, damage = None, None
    try:
        for member in members(file, stamp[0], str(path)):
            named = key_of(member.name)
            content.update(f"{member.name} {member.size}\n".encode("utf-8", "backslashreplace"))
            if named is None:
                current = None
                continue
            if named[1].endswith(_TEXT) or f".{named[1]}" in _TEXT:
                content.update(_content(file, member))
            if named[0] != current:
                current = named[0]
                starts.append(member.start)
                ends.append(member.end)
            ends[-1] = member.end
    except DamagedTar as error:
        damage = str(error)
        if starts:  # the last sample may be missing members
            starts.pop()
            ends.pop()
    return Shard(path, starts, ends, array("q"), content.hexdigest(), stamp, damage)


def write_index(shard: Shard, place: Path) -> None:
    """Write a shard's index, complete or not at all."""
    told = {
        "version": VERSION,
        "size": shard.stamp[0],
        "count": len(shard.starts),
        "sha256": shard.digest,
        "starts": shard.starts.tolist(),
        "ends": shard.ends.tolist(),
        "crc32": shard.checks.tolist(),
        "damage": shard.damage,
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=place.parent, suffix=".part", delete=False) as file:
        json.dump(told, file, separators=(",", ":"))
    os.replace(file.name, place)


def index_folder() -> Path:
    """Where indexes of other people's shards are kept: ``$XDG_CACHE_HOME/mmllm/shards``, else ``~/.cache/mmllm/shards``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmllm" / "shards"


def _kept(path: Path, stamp: tuple[int, int]) -> Path:
    name = hashlib.sha256(f"{path.resolve()} {stamp[0]} {stamp[1]}".encode()).hexdigest()[:32]
    return index_folder() / f"{name}{INDEX}"


def _keep(shard: Shard, place: Path) -> None:
    try:
        write_index(shard, place)
    except OSError:  # a read-only or full home: the headers are read again next time, nothing else is lost
        return


def _read_index(place: Path, path: Path, stamp: tuple[int, int]) -> Shard:
    try:
        if place.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"more than {MAX_INDEX_BYTES:,} bytes")
        told: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        if told["version"] != VERSION:
            raise ValueError(f"version {told['version']!r:.20}, this mmllm reads {VERSION}")
        starts, ends, checks = (array("q", told[key]) for key in ("starts", "ends", "crc32"))
        digest, damage = told["sha256"], told["damage"]
        if len(ends) != len(starts) or len(checks) not in (0, len(starts)):
            raise ValueError("its columns differ in length")
        if any(not last <= start < end for last, start, end in zip((0, *ends), starts, ends, strict=False)):
            raise ValueError("its samples overlap")
        if not isinstance(digest, str) or not isinstance(damage, (str, type(None))):
            raise ValueError("a field has another type")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}"
        raise DataError(f"{place}: is no index of a shard ({text:.120}); remove it, and it is made anew") from error
    return Shard(path, starts, ends, checks, digest, stamp, damage)


def _content(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(min(member.size, 1 << 26))


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
