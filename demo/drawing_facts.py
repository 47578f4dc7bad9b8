"""Which facts of a wish hold in a drawing, as `picture_parser` reads it, and shares of them with their intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from drawings import PLACES, Group, Wish
from picture_parser import Parsed, parse
from PIL import Image

from mmllm.evaluation import wilson

NOTHING = Parsed("", ())  # what is read where there is no picture: no fact holds
RESAMPLES = 2000  # of the bootstrap
COMPOSED = ("position", "direction and shape", "all")  # of other facts


def read(picture: Image.Image | None) -> Parsed:
    return NOTHING if picture is None else parse(np.asarray(picture))


def kinds(wish: Wish) -> Counter[tuple[str, str]]:
    """How many shapes of each colour and shape are wished for."""
    wanted: Counter[tuple[str, str]] = Counter()
    for group in wish.groups:
        wanted[group.color, group.shape] += group.count
    return wanted


def facts(wish: Wish, parsed: Parsed) -> dict[str, bool]:
    """Which of the wish's facts hold in a picture; only those that the wish has.

    ``kinds``: exactly the shapes asked for, ``places`` and ``relations``, either of them as ``position``, ``background``,
    and ``all``.
    """
    found = {"kinds": parsed.kinds() == kinds(wish), "background": parsed.background == wish.background}
    middles = {(shape.color, shape.shape): (shape.x, shape.y) for shape in parsed.shapes}
    if any(group.place for group in wish.groups):
        found["places"] = found["position"] = all(
            (group.color, group.shape) in middles and third(*middles[group.color, group.shape]) == group.place
            for group in wish.groups
            if group.place
        )
    if wish.relation:
        pair = [middles.get((group.color, group.shape)) for group in wish.groups]
        found["relations"] = found["position"] = None not in pair and related(wish.relation, *pair)  # type: ignore[arg-type]
    found["all"] = all(found.values())
    return found


def third(x: float, y: float) -> str:
    """The place of a centre, given as shares of the sides."""
    return PLACES[3 * min(2, int(3 * y)) + min(2, int(3 * x))]


def related(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    gap = {"left of": second[0] - first[0], "right of": first[0] - second[0]}
    gap |= {"above": second[1] - first[1], "below": first[1] - second[1]}
    return bool(gap[relation] > 0)


def wrong(found: dict[str, bool]) -> str:
    """The names of the facts that do not hold, "" when all do."""
    return ", ".join(name for name, holds in found.items() if not holds and name not in COMPOSED)


def read_back(parsed: Parsed) -> str:
    """What a picture shows, in words: every shape at its place."""
    if parsed == NOTHING:
        return "no picture"
    words = [Group(1, found.color, found.shape, third(found.x, found.y)).words() for found in parsed.shapes]
    return f"{', '.join(words) or 'nothing'}; {parsed.background} background"


def summary(results: Iterable[dict[str, bool]]) -> dict[str, Any]:
    """{fact: {"n", "share", "interval"}}."""
    listed = list(results)
    names = sorted({name for result in listed for name in result})
    counted = {name: [result[name] for result in listed if name in result] for name in names}
    return {
        name: {"n": len(v), "share": sum(v) / len(v), "interval": wilson(sum(v) / len(v), len(v))}
        for name, v in counted.items()
    }


def ratio(ours: list[dict[str, bool]], theirs: list[dict[str, bool]]) -> dict[str, Any]:
    """{fact: {"n", "share", "interval"}}: the share that holds in ``ours`` over that in ``theirs``, of the same wishes.

    The interval is that of the bootstrap over wishes, percentiles 2.5 and 97.5. A fact that holds in none of theirs is
    left out.
    """
    rng = np.random.default_rng(0)
    result = {}
    for name in sorted({name for found in theirs for name in found}):
        both = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) if name in b]
        pairs = np.array(both, dtype=np.float64)
        drawn = pairs[rng.integers(0, len(pairs), (RESAMPLES, len(pairs)))].mean(axis=1)
        drawn = drawn[drawn[:, 1] > 0]
        if not pairs[:, 1].any():
            continue
        interval = np.percentile(drawn[:, 0] / drawn[:, 1], (2.5, 97.5))
        share = pairs[:, 0].mean() / pairs[:, 1].mean()
        result[name] = {"n": len(pairs), "share": float(share), "interval": [float(value) for value in interval]}
    return result
