"""What of a part a pattern asks for: some of its layers (``backbone.layers.20-31``), or a module of a projector
(``inputs.image.projector.language_projection``). Both are read off the names of the part's parameters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")
_LAYERS = re.compile(r"(.+)\.(layers\.\d+(?:-\d+)?)")
# Of projectors alone: their modules are few and have names that papers use, those of towers and backbones are neither.
_MODULE = re.compile(r"((?:inputs|outputs)\.[^.]+\.projector)\.(.+)")


def split(name: str) -> tuple[str, str | None]:
    """The part, or pattern of parts, that ``name`` is about, and the piece of it that is asked for; None for all of it."""
    found = _LAYERS.fullmatch(name) or _MODULE.fullmatch(name)
    return (name, None) if found is None else (found[1], found[2])


def layer_range(piece: str) -> range | None:
    """The layers of the piece ``layers.20-31``; None for a module."""
    found = re.fullmatch(r"layers\.(\d+)(?:-(\d+))?", piece)
    return None if found is None else range(int(found[1]), int(found[2] or found[1]) + 1)


def layers_of(names: Iterable[str]) -> dict[str, int]:
    """The layer, from 0, of every parameter that lies in one; ``names`` are those of one part.

    A layer is an entry of the list of modules that holds the most of the names: ``….layers.7.…``, ``….h.7.…``.
    """
    entries = {name: found for name in names if (found := re.match(r"(.+?)\.(\d+)\.", name))}
    lists = Counter(found[1] for found in entries.values())
    stack = max(lists, key=lambda path: lists[path], default=None)
    return {name: int(found[2]) for name, found in entries.items() if found[1] == stack}


def chosen(names: Collection[str], part: str, piece: str) -> set[str]:
    """Which of the parameters ``names`` of ``part`` belong to a piece of it."""
    layers = layer_range(piece)
    if layers is None:
        return {name for name in names if f"{name}.".startswith(f"{part}.{piece}.")}
    return {name for name, layer in layers_of(names).items() if layer in layers}


def modules(names: Iterable[str], part: str) -> list[str]:
    """The modules of ``part``, and parameters outside of them, in order; ``names`` are those of its parameters."""
    return list(dict.fromkeys(name.removeprefix(f"{part}.").partition(".")[0] for name in names))


def select(parts: Mapping[str, Mapping[str, Value]], name: str) -> dict[str, Value]:
    """What ``parts`` holds of a part, or of a piece of it, under the parameters' names."""
    part, piece = split(name)
    if piece is None:
        return dict(parts[part])
    found = chosen(parts[part], part, piece)
    return {key: value for key, value in parts[part].items() if key in found}
