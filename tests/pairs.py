"""Covering arrays: few combinations in which every two choices of different factors meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Pair = tuple[tuple[str, int], tuple[str, int]]


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations, one value of each factor, such that every pair of values occurs in one of them. Greedy: each begins
    with a pair that is still open, and takes of the other factors what closes the most.
    """
    names = list(factors)
    open_pairs: dict[Pair, None] = {
        ((a, i), (b, j)): None
        for a, b in combinations(names, 2)
        for i, j in product(range(len(factors[a])), range(len(factors[b])))
    }
    rows = []
    while open_pairs:
        row = dict(next(iter(open_pairs)))
        for name in names:
            if name not in row:
                row[name] = max(range(len(factors[name])), key=lambda i: _closed(open_pairs, {**row, name: i}, names))
        for a, b in combinations(names, 2):
            open_pairs.pop(((a, row[a]), (b, row[b])), None)
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


def _closed(open_pairs: Mapping[Pair, None], row: Mapping[str, int], names: Sequence[str]) -> int:
    there = [name for name in names if name in row]
    return sum(((a, row[a]), (b, row[b])) in open_pairs for a, b in combinations(there, 2))
