"""What a frozen part gives for media, by their bytes: looked up by data workers, so that what is known is not even decoded."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm.cache.store import Room, Storage, TensorStore, pack, unpack
from mmllm.config.families import Gridded, Membered

if TYPE_CHECKING:
    from mmllm.config.families import Preprocessor

JUDGED_AFTER = 50
"""Items read before it is judged whether that is faster than computing them."""

Item = dict[str, Tensor]  # a prepared medium, as an encoder's preprocessor or a generator's target makes it


@dataclass(frozen=True)
class Facts:
    """What a projector asks of an item without its features: their number, and how they lie (``Preprocessor``). Where
    ``tokens`` is 0 all values are of one shape.
    """

    tokens: int = 0
    grid: tuple[int, ...] | None = None
    members: dict[str, int] | None = None

    @classmethod
    def of(cls, preprocessor: Preprocessor, item: Item) -> Facts:
        """What ``preprocessor`` says of a prepared item."""
        grid = preprocessor.grid(item) if isinstance(preprocessor, Gridded) else None
        members = preprocessor.members(item) if isinstance(preprocessor, Membered) else None
        return cls(preprocessor.num_tokens(item), grid, members)

    @classmethod
    def of_json(cls, told: Mapping[str, Any]) -> Facts:
        grid = told["grid"]
        return cls(told["tokens"], None if grid is None else tuple(grid), told["members"])


class Told:
    """Stands in for a preprocessor where an item's ``Facts`` are all that is asked."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    def num_tokens(self, item: Item) -> int:
        return self.facts.tokens

    def grid(self, item: Item) -> tuple[int, ...] | None:
        return self.facts.grid

    def members(self, item: Item) -> dict[str, int] | None:
        return self.facts.members


@dataclass(frozen=True)
class Known:
    """One medium as a worker found it: its ``value`` from the cache, or else the ``item`` that it is to be computed from.

    ``seconds`` is what finding it took, and ``spared`` what computing it had taken when it was put into the cache.
    """

    key: str
    facts: Facts
    item: Item | None
    value: Tensor | None
    seconds: float
    spared: float = 0.0


@dataclass
class Tally:
    """What a cache did: items and seconds. ``spared`` is what computing what was ``read`` had taken."""

    read: int = 0
    reading: float = 0.0
    spared: float = 0.0
    made: int = 0
    making: float = 0.0
    writing: float = 0.0


@dataclass
class CachedBatch:
    """N items of a batch, some of them known: the values of the items ``hits``, padded to one length, as ``values
    (H, S, …)``; the others are ``items``, by their place, until they are collated.
    """

    keys: list[str]
    facts: list[Facts]
    hits: list[int]
    values: Tensor | None
    items: dict[int, Item]
    reading: list[tuple[float, float]] = field(default_factory=list)  # seconds and spared seconds of the hits
    preparing: float = 0.0  # seconds of an item that is not known, on the average

    @classmethod
    def of(cls, known: Sequence[Known]) -> CachedBatch:
        found = [(i, one.value) for i, one in enumerate(known) if one.value is not None]
        items = {i: one.item for i, one in enumerate(known) if one.item is not None}
        prepared = [known[i].seconds for i in items]
        return cls(
            [one.key for one in known],
            [one.facts for one in known],
            [i for i, _ in found],
            padded([value for _, value in found]) if found else None,
            items,
            [(known[i].seconds, known[i].spared) for i, _ in found],
            sum(prepared) / max(len(prepared), 1),
        )

    @property
    def missing(self) -> list[int]:
        """The places of the items that are to be computed, in their order."""
        return [i for i in range(len(self.keys)) if i not in self.hits]

    def take(self) -> list[Item]:
        """The items to be computed, in their order; they are no longer kept here."""
        items, self.items = self.items, {}
        return [items[i] for i in self.missing]

    def known(self) -> dict[int, Tensor]:
        """The known values ``(S_i, …)`` by their places."""
        found = () if self.values is None else zip(self.hits, self.values, strict=True)
        return {i: value[: self.facts[i].tokens or None] for i, value in found}

    def to(self, device: torch.device | str) -> CachedBatch:
        return replace(self, values=None if self.values is None else self.values.to(device, non_blocking=True))


class MediaCache:
    """What one frozen part gives for media. Picklable: workers get copies that read.

    ``identity`` is a hash of all else that decides about a value: the part, how media are prepared for it, where and how
    precisely it computes. ``storage`` is how values are kept; ones that lose by it are used as they are kept from the first
    time on, so that all epochs see the same.
    """

    def __init__(self, folder: Path, identity: str, storage: Storage = "exact", room: Room | None = None) -> None:
        self.store = TensorStore(folder / identity[:32], room)
        self.identity, self.storage = identity, storage
        self.tally = Tally()
        # Shared with the workers that have copies of this.
        self._off = torch.zeros(1, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def off(self) -> bool:
        return bool(self._off.item())

    def find(self, data: bytes, prepare: Callable[[], Item], facts: Callable[[Item], Facts]) -> Known:
        """The medium with the encoded bytes ``data``; where it is not known, prepared."""
        begin = time.perf_counter()
        key = self.key(data)
        found = None if self.off else self.store.get(key)
        if found is not None:
            value, told = found
            seconds = time.perf_counter() - begin
            return Known(key, Facts.of_json(told), None, value, seconds, told["seconds"])
        item = prepare()
        return Known(key, facts(item), item, None, time.perf_counter() - begin)

    def key(self, data: bytes) -> str:
        """The identity stands in the name of the folder, shortened: here it is whole."""
        return hashlib.sha256(self.identity.encode() + data).hexdigest()

    def complete(self, batch: CachedBatch) -> CachedBatch:
        """``batch`` with what has become known since a worker looked: then only the rest is computed, and what that is
        depends on the samples alone, not on how far ahead the workers are.
        """
        begin = time.perf_counter()
        found = {i: got for i in batch.missing if (got := None if self.off else self.store.get(batch.keys[i]))}
        if not found:
            return batch
        values = batch.known() | {i: value for i, (value, _) in found.items()}
        hits = sorted(values)
        items = {i: item for i, item in batch.items.items() if i not in found}
        together = padded([values[i] for i in hits])
        seconds = (time.perf_counter() - begin) / len(found)
        reading = [*batch.reading, *((seconds, told["seconds"]) for _, told in found.values())]
        return replace(batch, hits=hits, values=together, items=items, reading=reading)

    def features(self, batch: CachedBatch, encode: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The features ``(N, S, …)`` and mask ``(N, S)`` of all items of ``batch``; ``encode`` gives those that are missing,
        which are put into the cache.
        """

        def rows() -> list[Tensor]:
            found, mask = encode()
            # Asking for the lengths waits for the device, so the time is the encoder's.
            return [row[:length] for row, length in zip(found, mask.sum(dim=1).tolist(), strict=True)]

        values = self.values(batch, rows)
        lengths = torch.tensor([len(value) for value in values], device=values[0].device)
        together = padded(values)
        return together, torch.arange(together.shape[1], device=together.device) < lengths[:, None]

    def values(self, batch: CachedBatch, compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """The values ``(S, …)`` of all items of ``batch``; ``compute`` gives those that are missing, which are put into the
        cache.
        """
        begin = time.perf_counter()
        made = compute() if batch.missing else ()
        computed = time.perf_counter()
        values = batch.known()
        share = (computed - begin) / max(len(made), 1) + batch.preparing
        for i, value in zip(batch.missing, made, strict=True):
            if self.off:  # what is used stays what was used before
                values[i] = value if self.storage == "exact" else unpack(pack(value, self.storage)).to(value.device)
            else:
                values[i] = self._kept(batch.keys[i], value, batch.facts[i], share)
        self.tally.made += len(made)
        self.tally.making += share * len(made)
        self.tally.writing += time.perf_counter() - computed
        self._judge(batch)
        return [values[i] for i in range(len(batch.keys))]

    def _kept(self, key: str, value: Tensor, facts: Facts, seconds: float) -> Tensor:
        """What is used of a new value: the one that was put first, if this is one of several equal media; else as stored."""
        found = self.store.get(key)
        if found is not None:
            return found[0].to(value.device)
        told = {"tokens": facts.tokens, "grid": facts.grid, "members": facts.members, "seconds": round(seconds, 7)}
        self.store.put(key, value, told, self.storage)
        return value if self.storage == "exact" else unpack(pack(value, self.storage)).to(value.device)

    def _judge(self, batch: CachedBatch) -> None:
        """Count what was read, and turn off where that takes longer than computing did."""
        self.tally.read += len(batch.reading)
        self.tally.reading += sum(seconds for seconds, _ in batch.reading)
        self.tally.spared += sum(spared for _, spared in batch.reading)
        if self.tally.read >= JUDGED_AFTER and self.tally.reading > self.tally.spared:
            self._off.fill_(1)


def padded(values: Sequence[Tensor]) -> Tensor:
    """N values ``(S_i, …)`` as ``(N, S, …)``, zeros behind the shorter ones."""
    out = values[0].new_zeros(len(values), max(len(value) for value in values), *values[0].shape[1:])
    for row, value in zip(out, values, strict=True):
        row[: len(value)] = value
    return out
