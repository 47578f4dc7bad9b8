"""Some of a part: its layers (``backbone.layers.20-31``), read off the names of its parameters, or one of its modules
(``inputs.image.projector.modules.language_projection``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")
Asked = range | str | None
"""Layers, the path of a module or parameter within the part, or all of it."""
_LAYERS = re.compile(r"(.+)\.layers\.(\d+)(?:-(\d+))?")
_MODULE = re.compile(r"(.+?)(?<!^inputs)(?<!^outputs)\.modules\.(.+)")


def split(name: str) -> tuple[str, Asked]:
    """The part, or pattern of parts, that ``name`` is about, and what of it."""
    if (found := _MODULE.fullmatch(name)) is not None:
        return found[1], found[2]
    found = _LAYERS.fullmatch(name)
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


def modules_of(part: str, names: Iterable[str]) -> list[str]:
    """The part's own modules and parameters, in order. ``names`` are those of its parameters, which begin with ``part``."""
    inner = (name.removeprefix(f"{_root(part)}.") for name in names)
    return list(dict.fromkeys(name.partition(".")[0] for name in inner))


def members(part: str, names: Iterable[str], asked: Asked) -> set[str]:
    """Those of the parameters ``names`` of a part that are ``asked`` for."""
    names = list(names)
    if asked is None:
        return set(names)
    if isinstance(asked, str):
        path = f"{_root(part)}.{asked}"
        return {name for name in names if name == path or name.startswith(f"{path}.")}
    return {name for name, layer in layers_of(names).items() if layer in asked}


def select(parts: Mapping[str, Mapping[str, Value]], name: str) -> dict[str, Value]:
    """What ``parts`` holds of a part, or of some of it, under the parameters' names."""
    part, asked = split(name)
    found = members(part, parts[part], asked)
    return {key: value for key, value in parts[part].items() if key in found}


def _root(part: str) -> str:
    """Where a part's own module lies in the model: an adapter has none of its own, and the backbone's is ``backbone.model``."""
    return "backbone.model" if part == "backbone" else part.removesuffix(".adapter")
