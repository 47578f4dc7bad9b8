"""Noun phrases of ``statement_grammar``: quantifiers, colours, nouns, and what may follow a noun."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from statement_world import (
    MANY,
    above,
    all_of,
    anything,
    below,
    exact,
    named,
    painted,
    tower_of,
)

Rule = tuple[str, Callable[..., Any]]

PHRASES: dict[str, list[Rule]] = {
    "SQ": [
        ("a|an|as|another", lambda: (1, MANY)),
        ("one|1", lambda: (1, MANY)),
        ("exactly one|1", lambda: (1, 1)),
        ("only one|1|a", lambda: (1, 1)),
        ("at least one|1", lambda: (1, MANY)),
        ("atleast one|1", lambda: (1, MANY)),
        ("at most one|1", lambda: (0, 1)),
        ("no", lambda: (0, 0)),
        ("a single", lambda: (1, 1)),
        ("single", lambda: (1, 1)),
        ("not more than one|1", lambda: (0, 1)),
        ("more than one|1", lambda: (2, MANY)),
    ],
    "PQ": [
        ("<NUM>", exact),
        ("exactly|just <NUM>", exact),
        ("only <NUM>", exact),
        ("at least <NUM>", lambda n: (n, MANY)),
        ("atleast <NUM>", lambda n: (n, MANY)),
        ("at most <NUM>", lambda n: (0, n)),
        ("more than <NUM>", lambda n: (n + 1, MANY)),
        ("less than <NUM>", lambda n: (0, n - 1)),
        ("not more than <NUM>", lambda n: (0, n)),
        ("no", lambda: (0, 0)),
        ("many|multiple", lambda: (4, MANY)),
        ("a lot of", lambda: (4, MANY)),
    ],
    "NUM": [
        (f"{word}|{digit}", lambda n=digit: n)
        for digit, word in enumerate(("two", "three", "four", "five", "six", "seven"), 2)
    ],
    "COLOR": [(c, lambda c=c: named(c)) for c in ("black", "blue", "yellow")],
    "CCOL": [("<COLOR>", lambda c: c), ("<COLOR> color", lambda c: c)],
    "COL": [
        ("", lambda: anything),
        ("<COLOR>", lambda c: c),
        ("<COLOR> color", lambda c: c),
        ("<COLOR> or <COLOR>", lambda c, d: lambda b: c(b) or d(b)),
    ],
    "SIZE": [("", lambda: anything), ("small", lambda: named("small")), ("big", lambda: named("big"))],
    "SNOUN": [
        ("item|object|block|shape|one|~", lambda: anything),
        *[(n, lambda n=n: named(n)) for n in ("circle", "square", "triangle")],
    ],
    "PNOUN": [
        ("items|objects|blocks|shapes", lambda: anything),
        *[(n + "s", lambda n=n: named(n)) for n in ("circle", "square", "triangle")],
    ],
    "SNP": [("<SIZE> <COL> <SNOUN> <POST>", lambda s, c, n, p: all_of(s, c, n, p))],
    "PNP": [("<SIZE> <COL> <PNOUN> <POST>", lambda s, c, n, p: all_of(s, c, n, p))],
    "POST": [
        ("", lambda: anything),
        ("<TOUCH>", lambda t: t),
        ("that|which is|are <TOUCH>", lambda t: t),
        ("of medium size", lambda: named("medium")),
        ("of medium size <TOUCH>", lambda t: all_of(named("medium"), t)),
        ("in it", lambda: anything),
        ("that|which is|are a|~ <COL> <SNOUN>", all_of),
        ("that|which is|are not <COLOR>", lambda c: lambda b: not c(b)),
        ("that|which is|are of <COLOR> color", lambda c: c),
        ("of <COLOR> color", lambda c: c),
        ("<TOUCH> that|which is|are not a|~ <COL> <SNOUN>", lambda t, c, n: lambda b: t(b) and not (c(b) and n(b))),
        ("at|on the|~ top of the tower", lambda: lambda b: b.level == b.height - 1),
        ("that|which is|are at|on the|~ top", lambda: lambda b: b.level == b.height - 1),
        ("as the|a top most block", lambda: lambda b: b.level == b.height - 1),
        ("above|over the|~ base block", lambda: lambda b: b.level >= 1),
        ("below the top block", lambda: lambda b: b.level == b.height - 2),
        ("in|~ between a|two|2|~ <COL> blocks|items|block|objects", lambda c: lambda b: below(c)(b) and above(c)(b)),
        ("at|on the|~ top|roof", lambda: lambda b: b.level == b.height - 1),
        ("at|on the|its|~ base|bottom", lambda: lambda b: b.level == 0),
        ("in the middle", lambda: lambda b: 0 < b.level < b.height - 1),
        ("as a|the middle block", lambda: lambda b: 0 < b.level < b.height - 1),
        ("as the <POS> of|~ a|the|~ tower|towers", lambda at: at),
        ("as the <POS> of a|the|~ tower with <QNP>", lambda at, q: lambda b: at(b) and q(tower_of(b))),
        ("above|over of|~ a|the|an <COL> <SNOUN>", lambda c, n: above(c)),
        ("on top of a|the|an <COL> <SNOUN>", lambda c, n: above(c)),
        ("right|directly on top of a|the|an <COL> <SNOUN>", lambda c, n: above(c)),
        ("on a|the|an <COL> <SNOUN>", lambda c, n: above(c)),
        ("bellow|below|under|beneath|underneath a|the <COL> <SNOUN>", lambda c, n: below(c)),
        (
            "attached|attach|touching to|with|~ a|the <COL> <SNOUN>",
            lambda c, n: lambda b: any(c(painted(b, f)) for f in b.friends),
        ),
        (
            "that is|are attached|attach to a|the <COL> <SNOUN>",
            lambda c, n: lambda b: any(c(painted(b, f)) for f in b.friends),
        ),
    ],
    "TOUCH": [
        ("closely|~ touching <WALL>", lambda t: t),
        ("nearly|almost touching <WALL>", lambda t: lambda b: t(replace(b, walls=b.near))),
        ("not touching <WALL>", lambda t: lambda b: not t(b)),
    ],
    "WALL": [
        ("the|a|any|an|~ edge|wall|side|line|sides|edges <OF>", lambda _: lambda b: bool(b.walls)),
        ("the|a|any|~ base|bottom|floor base|edge|wall|~ <OF>", lambda _: lambda b: "bottom" in b.walls),
        ("the|a|any|~ box|~ corner|corners <OF>", lambda _: lambda b: len(b.near) >= 2),
        ("the|~ right wall|side|edge edge|~ <OF>", lambda _: lambda b: "right" in b.walls),
        ("the|~ left wall|side|edge <OF>", lambda _: lambda b: "left" in b.walls),
        ("the|~ roof|top|ceiling <OF>", lambda _: lambda b: "top" in b.walls),
        ("the|a|~ bottom-right|lower corner <OF>", lambda _: lambda b: {"bottom", "right"} <= b.near),
    ],
    "OF": [
        ("", lambda: None),
        ("of a|the|grey box|square", lambda: None),
        ("of a|the grey box|square", lambda: None),
        ("with its side|top", lambda: None),
    ],
    "POS": [
        ("top|roof block|~", lambda: lambda b: b.level == b.height - 1),
        ("base|bottom|bases block|~", lambda: lambda b: b.level == 0),
        ("second block|blocks|~ from|~ the|~ base|~", lambda: lambda b: b.level == 1),
        ("third block|blocks|~ from|~ the|~ base|~", lambda: lambda b: b.level == 2),
        ("block below the top block|~", lambda: lambda b: b.level == b.height - 2),
        ("middle block|~", lambda: lambda b: 0 < b.level < b.height - 1),
    ],
    "END1": [("of|in|from", lambda: None)],
    "TRAIT": [
        ("height", lambda: len),
        ("color on|at top|the|~ top|~", lambda: lambda box: box[-1].color),
        ("base color|~", lambda: lambda box: box[0].color),
        ("top color|~", lambda: lambda box: box[-1].color),
    ],
}
