"""Text conditions of captions, each computed once: content-addressed files that any number of processes share."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmllm.generators.base import Condition, Generator

log = logging.getLogger(__name__)

STALE = 3600.0  # seconds after which a half-written file is taken for one of a killed process


class Store:
    """Tensors by key in ``folder``, one safetensors file each, ``limit`` bytes in all; nothing is kept in memory.

    A file is written beside its place and renamed, and holds a hash of its content: whatever happens to the writer or to the
    disk, a key gives what was put under it or nothing. ``processes`` is how many share the room that is left.
    """

    def __init__(self, folder: Path, limit: int, processes: int = 1) -> None:
        self.folder, self._unfinished = folder, folder / "unfinished"
        self._unfinished.mkdir(parents=True, exist_ok=True)
        for path in self._unfinished.iterdir():
            with suppress(FileNotFoundError):  # another run's, which has just finished it
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()
        present = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        self._room = max(0, limit - present) // processes
        self._full = False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was put under ``key``, on the CPU; None when there is nothing, or the file is damaged."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if (file.metadata() or {}).get("sha256") == _digest(tensors):
                    return tensors
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("%s cannot be read (%s); it is made again", path, error)
            return None
        log.warning("%s is damaged; it is made again", path)
        return None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep ``tensors`` under ``key``. Where the room or the disk is at its end, a warning is logged once instead."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        if self._full:
            return
        path, half = self._path(key), self._unfinished / uuid.uuid4().hex
        try:
            save_file(tensors, half, metadata={"sha256": _digest(tensors)})
            size = half.stat().st_size
            if size > self._room:
                half.unlink()
                self._give_up(f"the limit of {self.folder} is reached")
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(half, path)
        except (OSError, SafetensorError) as error:
            self._give_up(f"cannot write {path}: {error}")
            return
        self._room -= size

    def _give_up(self, why: str) -> None:
        self._full = True
        log.warning("%s; further text conditions are computed whenever they are needed", why)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


class TextConditions:
    """``encode_text`` of a generator, through a ``store`` if there is one.

    Every caption is encoded alone, with and without a store: rounding depends on what is computed together, so only then
    has a caption one condition, to the last bit.
    """

    def __init__(self, generator: Generator, store: Store | None = None) -> None:
        self.generator, self.store = generator, store
        self._known: tuple[list[tuple[int, int]], str] | None = None
        self._pinned: str | None = None

    def __call__(self, captions: Sequence[str]) -> Condition:
        """The text conditions of ``captions``, on the generator's device."""
        identity = self._identity()
        found = {caption: self._one(caption, identity) for caption in dict.fromkeys(captions)}
        items = [found[caption] for caption in captions]
        streams = {name: torch.cat([one.streams[name] for one in items]) for name in items[0].streams}
        return Condition(streams, {name: torch.cat([one.masks[name] for one in items]) for name in items[0].masks})

    def _one(self, caption: str, identity: list[str]) -> Condition:
        if self.store is None:
            return self.generator.encode_text([caption])
        key = hashlib.sha256(json.dumps([*identity, caption]).encode()).hexdigest()
        kept = self.store.get(key)
        if kept is None:
            made = self.generator.encode_text([caption])
            kept = {f"stream.{name}": value for name, value in made.streams.items()}
            self.store.put(key, kept | {f"mask.{name}": mask for name, mask in made.masks.items()})
            return made
        device = self._device()
        sides: dict[str, dict[str, Tensor]] = {"stream": {}, "mask": {}}
        for place, value in kept.items():
            side, _, name = place.partition(".")
            sides[side][name] = value.to(device)
        return Condition(sides["stream"], sides["mask"])

    def _identity(self) -> list[str]:
        """All that decides about a caption's condition beside it: the generator, and how torch computes here."""
        if self.store is None:
            return []
        device = self._device().type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return [self._fingerprint(), device, str(cast), torch.get_float32_matmul_precision()]

    def pin(self) -> None:
        """Take the generator's fingerprint now for good: its weights stay what they are, but not where they are."""
        self._pinned = None if self.store is None else self.generator.fingerprint()

    def _fingerprint(self) -> str:
        """The generator's fingerprint, taken anew when one of its tensors was replaced or changed in place."""
        if self._pinned is not None:
            return self._pinned
        now = [(value.data_ptr(), value._version) for value in self._tensors()]
        if self._known is None or self._known[0] != now:
            self._known = now, self.generator.fingerprint()
        return self._known[1]

    def _tensors(self) -> list[Tensor]:
        return [*self.generator.parameters(), *self.generator.buffers()]

    def _device(self) -> torch.device:
        return self._tensors()[0].device


def _digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers
    return total.hexdigest()
