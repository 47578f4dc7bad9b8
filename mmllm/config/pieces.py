"""Some layers of a part: ``backbone.layers.20-31``. Layers are read off the names of the part's parameters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")
_PIECE = re.compile(r"(.+)\.layers\.(\d+)(?:-(\d+))?")


def split(name: str) -> tuple[str, range | None]:
    """The part, or pattern of parts, that ``name`` is about, and which of its layers; None for all of it."""
    found = _PIECE.fullmatch(name)
    if found is None:
        return name, None
    first, last = int(found[2]), int(found[3] or found[2])
    return found[1], range(first, last + 1)


def layers_of(names: Iterable[str]) -> dict[str, int]:
    """The layer, from 0, of every parameter that lies in one; ``names`` are those of one part.

    A layer is an entry of the list of modules that holds the most of the names: ``….layers.7.…``, ``….h.7.…``.
    """
    entries = {name: found for name in names if (found := re.match(r"(.+?)\.(\d+)\.", name))}
    lists = Counter(found[1] for found in entries.values())
    stack = max(lists, key=lambda path: lists[path], default=None)
    return {name: int(found[2]) for name, found in entries.items() if found[1] == stack}


def select(parts: Mapping[str, Mapping[str, Value]], name: str) -> dict[str, Value]:
    """What ``parts`` holds of a part, or of some of its layers, under the parameters' names."""
    part, layers = split(name)
    if layers is None:
        return dict(parts[part])
    found = layers_of(parts[part])
    return {key: value for key, value in parts[part].items() if found.get(key) in layers}
