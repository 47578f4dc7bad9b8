"""Some of a part, read off the names of its parameters: its layers (``backbone.layers.20-31``), one of its modules
(``inputs.image.projector.modules.language_projection``), or all but some (``inputs.image.projector.without.norm``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")
Asked = range | str | frozenset[str] | None
"""Layers, the path of a module or parameter within the part, the names of what is left out of it, or all of it."""
_PIECE = re.compile(
    r"(?P<part>.+?)(?<!^inputs)(?<!^outputs)\."
    r"(?:layers\.(?P<first>\d+)(?:-(?P<last>\d+))?|modules\.(?P<path>.+)|without\.(?P<names>\w+(?:\+\w+)*))"
)


def split(name: str) -> tuple[str, Asked]:
    """The part, or pattern of parts, that ``name`` is about, and what of it."""
    found = _PIECE.fullmatch(name)
    if found is None:
        return name, None
    if found["path"] is not None:
        return found["part"], found["path"]
    if found["names"] is not None:
        return found["part"], frozenset(found["names"].split("+"))
    first, last = int(found["first"]), int(found["last"] or found["first"])
    return found["part"], range(first, last + 1)


def part_of(parameter: str) -> tuple[str, str]:
    """The part that a parameter belongs to but for adapters, from its qualified name; and its name within the part's model."""
    words = parameter.split(".")
    if words[0] in ("inputs", "outputs"):
        return ".".join(words[:3]), ".".join(words[3:])
    return "backbone.new_tokens" if words[1] == "new_tokens" else "backbone", ".".join(words[2:])


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
    return list(dict.fromkeys(_within(part, name).partition(".")[0] for name in names))


def members(part: str, names: Iterable[str], asked: Asked) -> set[str]:
    """Those of the parameters ``names`` of a part that are ``asked`` for."""
    names = list(names)
    if asked is None:
        return set(names)
    if isinstance(asked, str):
        return {name for name in names if f"{_within(part, name)}.".startswith(f"{asked}.")}
    if isinstance(asked, frozenset):
        return {name for name in names if _within(part, name).partition(".")[0] not in asked}
    return {name for name, layer in layers_of(names).items() if layer in asked}


def select(parts: Mapping[str, Mapping[str, Value]], name: str) -> dict[str, Value]:
    """What ``parts`` holds of a part, or of some of it, under the parameters' names."""
    part, asked = split(name)
    found = members(part, parts[part], asked)
    return {key: value for key, value in parts[part].items() if key in found}


def _within(part: str, parameter: str) -> str:
    """The parameter's name within the part: an adapter has no module of its own, and the backbone's is ``backbone.model``."""
    root = "backbone.model" if part == "backbone" else part.removesuffix(".adapter")
    return parameter.removeprefix(f"{root}.")
