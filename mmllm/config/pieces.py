"""Pieces of a part: some of its layers (``backbone.layers.20-31``), or all but some of its modules
(``inputs.image.projector.without.language_projection``). Both are read off the names of the part's parameters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")
Choice = range | frozenset[str] | None  # layers, modules left out, or everything
_LAYERS = re.compile(r"(.+)\.layers\.(\d+)(?:-(\d+))?")
_WITHOUT = re.compile(r"(.+)\.without\.(\w+(?:\+\w+)*)")


def split(name: str) -> tuple[str, Choice]:
    """The part, or pattern of parts, that ``name`` is about, and what of it: a range of layers, the names of modules that are
    left out (joined by ``+``), or None for all of it.
    """
    if found := _WITHOUT.fullmatch(name):
        return found[1], frozenset(found[2].split("+"))
    if found := _LAYERS.fullmatch(name):
        first, last = int(found[2]), int(found[3] or found[2])
        return found[1], range(first, last + 1)
    return name, None


def module_of(part: str, parameter: str) -> str:
    """The module, or parameter, directly in ``part`` that ``parameter`` belongs to, from its qualified name."""
    return parameter.removeprefix(f"{part}.").split(".")[0]


def layers_of(names: Iterable[str]) -> dict[str, int]:
    """The layer, from 0, of every parameter that lies in one; ``names`` are those of one part.

    A layer is an entry of the list of modules that holds the most of the names: ``….layers.7.…``, ``….h.7.…``.
    """
    entries = {name: found for name in names if (found := re.match(r"(.+?)\.(\d+)\.", name))}
    lists = Counter(found[1] for found in entries.values())
    stack = max(lists, key=lambda path: lists[path], default=None)
    return {name: int(found[2]) for name, found in entries.items() if found[1] == stack}


def select(parts: Mapping[str, Mapping[str, Value]], name: str) -> dict[str, Value]:
    """What ``parts`` holds of a part, or of a piece of it, under the parameters' names."""
    part, choice = split(name)
    if choice is None:
        return dict(parts[part])
    if isinstance(choice, frozenset):
        return {key: value for key, value in parts[part].items() if module_of(part, key) not in choice}
    found = layers_of(parts[part])
    return {key: value for key, value in parts[part].items() if found.get(key) in choice}
