"""Tensors by key in append-only files: memory-mapped, written by many processes at once, never half, bounded in size."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Storage = Literal["exact", "float16", "bfloat16", "int8"]
ALIGNMENT = 64  # bytes; a tensor begins at a multiple of it
LOOK_EVERY = 1.0  # seconds between looks for what other processes have written


class Packed(NamedTuple):
    """A tensor as it is stored: the ``payload``, its dtype ``stored``, and what it is made again: ``dtype`` and ``shape``."""

    payload: bytearray | memoryview
    stored: str
    dtype: str
    shape: tuple[int, ...]


class Place(NamedTuple):
    """Where an entry lies, and what it is; ``facts`` is JSON."""

    segment: str
    at: int
    size: int
    sha256: str
    stored: str
    dtype: str
    shape: tuple[int, ...]
    facts: str


class Room:
    """How many bytes may still be written below ``folder``, by this one of ``processes``."""

    def __init__(self, folder: Path, limit: int, processes: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.left = max(0, limit - sum(path.stat().st_size for path in folder.rglob("*.bin"))) // processes
        self.closed = False

    def close(self, why: str) -> None:
        """Nothing more is written. Said once."""
        if not self.closed:
            log.warning("%s; what is not in %s by now is computed whenever it is needed", why, self.folder)
        self.closed = True


class TensorStore:
    """Tensors and facts about them by key, in ``folder``.

    Every writing process appends to a segment of its own, ``NAME.bin`` (raw tensors) with ``NAME.jsonl`` (a line for every
    ``commit``, with where each entry lies and a hash of it), so there are no locks, and what a killed writer leaves is in
    no line. A reader maps segments into memory and believes an entry only if its hash is right. Where the same key was
    written several times the first one counts. Without ``room`` it is only read. Picklable; a copy in another process reads.
    """

    def __init__(self, folder: Path, room: Room | None = None) -> None:
        self.folder, self.room = folder, room
        folder.mkdir(parents=True, exist_ok=True)
        self._forget()

    def _forget(self) -> None:
        self._places: dict[str, list[Place]] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._read: dict[str, int] = {}  # bytes of each index that are known
        self._looked = -LOOK_EVERY
        self._segment, self._end, self._uncommitted = "", 0, list[tuple[str, Place]]()
        self._files: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "room": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def get(self, key: str) -> tuple[Tensor, dict[str, Any]] | None:
        """The tensor and the facts under ``key``, on the CPU; None when there are none, or they are damaged.

        What was stored exactly is a view of the file: do not write into it.
        """
        if key not in self._places:
            self._look()
        for place in list(self._places.get(key, ())):
            found = self._value(key, place)
            if found is not None:
                return found
            log.warning("an entry of %s is damaged; it is made again", self.folder / place.segment)
            self._places[key].remove(place)
        return None

    def put(self, key: str, value: Tensor, facts: Mapping[str, Any], storage: Storage = "exact") -> None:
        """Write an entry, which this process finds from now on, others and later ones behind ``commit``.

        Where the room or the disk is at its end a warning is logged once instead.
        """
        room = self.room
        if room is None or room.closed:
            return
        packed = pack(value, storage)
        size = len(packed.payload) + (-len(packed.payload) % ALIGNMENT)
        if size > room.left:
            room.close(f"the limit of {room.folder} is reached")
            return
        told = json.dumps(facts, sort_keys=True)
        try:
            data, _ = self._open()
            written = os.write(data, bytes(packed.payload).ljust(size, b"\0"))
            if written < size:
                raise OSError(f"{written} of {size} bytes written")
        except OSError as error:
            room.close(f"cannot write in {self.folder}: {error}")
            return
        room.left -= size
        digest = _digest(key, packed, told)
        place = Place(self._segment, self._end, len(packed.payload), digest, *packed[1:], told)
        self._end += size
        self._places.setdefault(key, []).append(place)
        self._uncommitted.append((key, place))

    def commit(self) -> None:
        """Let all that was put since the last time be found by others and by later runs: all of it, or nothing."""
        if not self._uncommitted or self._files is None or self.room is None:
            return
        entries = [
            {"key": key, **place._asdict(), "facts": json.loads(place.facts)} for key, place in self._uncommitted
        ]
        line = json.dumps([{name: value for name, value in entry.items() if name != "segment"} for entry in entries])
        self._uncommitted = []
        try:
            written = os.write(self._files[1], f"{line}\n".encode())
            self._read[self._segment] = self._read.get(self._segment, 0) + written
        except OSError as error:
            self.room.close(f"cannot write in {self.folder}: {error}")

    def __contains__(self, key: str) -> bool:
        return bool(self._places.get(key))

    def __len__(self) -> int:
        self._look(now=True)
        return sum(map(bool, self._places.values()))

    def _open(self) -> tuple[int, int]:
        """The segment and index that this process writes."""
        if self._files is None:
            # The names sort by age.
            self._segment = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND
            data, index = (os.open(self.folder / f"{self._segment}{end}", flags, 0o644) for end in (".bin", ".jsonl"))
            self._files, self._end = (data, index), 0
        return self._files

    def close(self) -> None:
        """Commit, and close what is open; the store can be used again."""
        self.commit()
        for file in self._files or ():
            os.close(file)
        self._forget()

    def _look(self, *, now: bool = False) -> None:
        """Read what was added to the indexes."""
        if not now and time.monotonic() - self._looked < LOOK_EVERY:
            return
        self._looked = time.monotonic()
        for index in sorted(self.folder.glob("*.jsonl")):
            known = self._read.get(index.stem, 0)
            try:
                if index.stat().st_size <= known:
                    continue
                with index.open("rb") as file:
                    file.seek(known)
                    added = file.read()
            except OSError:  # removed meanwhile
                continue
            whole = added[: added.rfind(b"\n") + 1]  # a line without its end is still being written, or never will be
            self._read[index.stem] = known + len(whole)
            for line in whole.splitlines():
                self._add(index.stem, line)

    def _add(self, segment: str, line: bytes) -> None:
        try:
            for entry in json.loads(line):
                entry["shape"], entry["facts"] = tuple(entry["shape"]), json.dumps(entry["facts"], sort_keys=True)
                self._places.setdefault(entry.pop("key"), []).append(Place(segment=segment, **entry))
        except (ValueError, TypeError, KeyError) as error:
            log.warning("%s has a line that cannot be read (%s); it is left out", self.folder / segment, error)

    def _value(self, key: str, place: Place) -> tuple[Tensor, dict[str, Any]] | None:
        try:
            data = memoryview(self._mapped(place.segment, place.at + place.size))[place.at : place.at + place.size]
            # The hash is over the facts too, so past this line all of the entry is what was put.
            if _digest(key, Packed(data, *place[4:7]), place.facts) != place.sha256:
                return None
            return unpack(Packed(data, *place[4:7])), json.loads(place.facts)
        except (OSError, ValueError, TypeError):
            return None

    def _mapped(self, segment: str, needed: int) -> mmap.mmap:
        """The segment in memory, at least ``needed`` bytes of it. Raises ``ValueError`` where the file has fewer."""
        path = self.folder / f"{segment}.bin"
        size = (
            path.stat().st_size
        )  # looked up each time: reading beyond the end of a file cut short would kill the process
        if size < needed:
            raise ValueError(f"{path} has {size} bytes, expected {needed}")
        if segment not in self._maps or len(self._maps[segment]) < needed:
            with path.open("rb") as file:
                # Private pages: torch takes no memory that cannot be written.
                self._maps[segment] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[segment]


def pack(value: Tensor, storage: Storage = "exact") -> Packed:
    """A tensor ``(…, D)`` as bytes; in fewer if ``storage`` is a narrower dtype than its own, which int8 is with a float32
    scale for each D numbers: the largest of them is 127.

    What cannot be said that way (no floating-point numbers; infinite, or beyond float16) is stored exactly.
    """
    value = value.detach().cpu().contiguous()
    dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
    if storage != "exact" and value.is_floating_point() and value.numel():
        if storage == "int8":
            scale = value.float().abs().amax(dim=-1, keepdim=True) / 127
            if bool(scale.isfinite().all()):
                steps = (value.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
                return Packed(_bytes(scale) + _bytes(steps), "int8", dtype, shape)
        else:
            narrow = value.to({"float16": torch.float16, "bfloat16": torch.bfloat16}[storage])
            if narrow.element_size() < value.element_size() and bool(narrow.isfinite().all()):
                return Packed(_bytes(narrow), storage, dtype, shape)
    return Packed(_bytes(value), dtype, dtype, shape)


def unpack(packed: Packed) -> Tensor:
    """The tensor again, in its own dtype. Raises ``ValueError`` where the numbers do not go with the payload."""
    dtype, stored = getattr(torch, packed.dtype), getattr(torch, packed.stored)
    if not packed.payload:
        return torch.empty(packed.shape, dtype=dtype)
    if packed.stored == "int8" and packed.dtype != "int8":
        rows = (*packed.shape[:-1], 1)
        count = 4 * torch.Size(rows).numel()
        scale = torch.frombuffer(packed.payload[:count], dtype=torch.float32).view(rows)
        steps = torch.frombuffer(packed.payload[count:], dtype=torch.int8).view(packed.shape)
        return (steps.float() * scale).to(dtype)
    return torch.frombuffer(packed.payload, dtype=stored).view(packed.shape).to(dtype)


def _bytes(value: Tensor) -> bytearray:
    """Its bytes, where torch may write: it takes no other memory."""
    return bytearray(value.contiguous().reshape(-1).view(torch.uint8).numpy())


def _digest(key: str, packed: Packed, facts: str) -> str:
    total = hashlib.sha256(json.dumps([key, packed.stored, packed.dtype, packed.shape, facts]).encode())
    total.update(packed.payload)
    return total.hexdigest()
