"""A small grammar of true/false statements about box scenes, in the wordings people used for NLVR.

Each rule is a pattern of words and ``<SYMBOLS>`` with the meaning of the whole as a function of its parts' meanings.
``a|b`` are alternative words, ``~`` is no word. The same rules generate statements and parse them, so what the
generator cannot say can be listed, and the truth it assigns can be compared with people's judgements.

Meanings: a quantifier is an interval (low, high) of counts; a noun phrase is a predicate on a block; a counted phrase
(``QNP``) and a box property (``BP``) are predicates on the list of blocks of a box; a statement is a predicate on the
three lists. Blocks carry what the sentences speak of: colour, shape, size, touched walls, level and height of the tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scene_model import Scene, box_items, gap, size_name, walls

MANY = 99


@dataclass(frozen=True)
class Block:
    """A shape as the sentences see it; ``level`` 0 is the base of a tower, ``near`` the walls within 5 pixels."""

    color: str
    shape: str
    size: str
    walls: frozenset[str]
    near: frozenset[str]
    level: int
    height: int
    box: int
    colors: tuple[str, ...]  # of the whole box, from the base to the top
    friends: frozenset[str]  # colours of the blocks this one touches


def view(scene: Scene) -> list[list[Block]]:
    """The three lists of blocks of a scatter or tower scene."""
    result = []
    for index, items in enumerate(box_items(scene)):
        x0 = scene.boxes[index][0]
        colors = tuple(i.color for i in items)
        blocks = []
        for level, i in enumerate(items):
            distance = {"left": i.x - x0, "top": i.y, "right": x0 + 100 - i.x - i.size, "bottom": 100 - i.y - i.size}
            near = frozenset(side for side, d in distance.items() if d <= 5)
            friends = frozenset(o.color for o in items if o is not i and gap(i, o) <= 1)
            touched = frozenset(walls(scene, i))
            size = size_name(scene, i)
            blocks.append(Block(i.color, i.shape, size, touched, near, level, len(items), index, colors, friends))
        result.append(blocks)
    return result


Rule = tuple[str, Callable[..., Any]]
Blocks = list[Block]


def _all(world: list[Blocks]) -> Blocks:
    return [b for box in world for b in box]


def _count(q: tuple[int, int], p: Callable[[Block], bool]) -> Callable[[Blocks], bool]:
    return lambda blocks: q[0] <= sum(map(p, blocks)) <= q[1]


def _boxes(q: tuple[int, int], *props: Callable[[Blocks], bool]) -> Callable[[list[Blocks]], bool]:
    return lambda world: q[0] <= sum(all(p(box) for p in props) for box in world) <= q[1]


def _both(*props: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: all(p(x) for p in props)


def _true(_: Any) -> bool:
    return True


def _runs(p: Callable[[Block], bool], q: tuple[int, int]) -> Callable[[Blocks], bool]:
    """The longest run of neighbours in a tower that satisfy ``p`` has a length in ``q``."""

    def longest(blocks: Blocks) -> bool:
        best = now = 0
        for block in blocks:
            now = now + 1 if p(block) else 0
            best = max(best, now)
        return q[0] <= best <= q[1]

    return longest


def _same(blocks: Blocks, p: Callable[[Block], bool], q: tuple[int, int], trait: Callable[[Block], str]) -> bool:
    """``q`` of the blocks that satisfy ``p`` share a trait."""
    values = [trait(b) for b in blocks if p(b)]
    return any(q[0] <= values.count(v) <= q[1] for v in set(values))


def _position(level: Callable[[Block], bool]) -> Callable[[Block], bool]:
    return level


def _above(p_color: Callable[[Block], bool], immediate: bool) -> Callable[[Block], bool]:
    def test(b: Block) -> bool:
        below = b.colors[max(0, b.level - 1) if immediate else 0 : b.level]
        return any(p_color(_painted(b, c)) for c in below)

    return test


def _below(p_color: Callable[[Block], bool], immediate: bool) -> Callable[[Block], bool]:
    def test(b: Block) -> bool:
        above = b.colors[b.level + 1 : b.level + 2 if immediate else None]
        return any(p_color(_painted(b, c)) for c in above)

    return test


def _painted(b: Block, color: str) -> Block:
    """A neighbour of ``b`` in its tower, of which only the colour matters."""
    return Block(color, b.shape, b.size, b.walls, b.near, b.level, b.height, b.box, b.colors, b.friends)


def _colors_are(*colors: Callable[[Block], bool]) -> Callable[[Blocks], bool]:
    """Every block has one of the colours, and every colour occurs."""
    return lambda blocks: all(any(c(b) for c in colors) for b in blocks) and all(any(map(c, blocks)) for c in colors)


def _distinct(q: tuple[int, int], trait: Callable[[Block], str]) -> Callable[[Blocks], bool]:
    return lambda blocks: q[0] <= len({trait(b) for b in blocks}) <= q[1]


def _color(b: Block) -> str:
    return b.color


def _shape(b: Block) -> str:
    return b.shape


def _exact(n: int) -> tuple[int, int]:
    return n, n


def _has(name: str) -> Callable[[Block], bool]:
    return lambda b: name in (b.color, b.shape, b.size)


_box, _grey = "box|square|tower", "grey|~"
_WITH = "with|having|has|containing|contains|have"

GRAMMAR: dict[str, list[Rule]] = {
    "S": [
        ("there is|are|isa <QNP>", lambda p: lambda w: p(_all(w))),
        ("there is|are|isa <QNP> and|, <QNP>", lambda p, r: lambda w: p(_all(w)) and r(_all(w))),
        ("<QNP>", lambda p: lambda w: p(_all(w))),
        ("there is|are|isa <QBOX>", lambda p: p),
        ("<QBOX>", lambda p: p),
        ("<SUBJ> is|are <TOUCH>", lambda qp, t: lambda w: _count(qp[0], _both(qp[1], t))(_all(w))),
        ("none of the <PNP> are|is|~ <TOUCH>", lambda p, t: lambda w: not any(p(b) and t(b) for b in _all(w))),
        ("there is|are <QNP> in each|every|all box|boxes|tower|towers", lambda p: _boxes((3, 3), p)),
        ("there is|are <QNP> in|inside a|one|1|the|same grey|same|~ box|tower|square", lambda p: _boxes((1, 3), p)),
        ("there is|are <QNP> on top", lambda p: lambda w: p([b for b in _all(w) if b.level == b.height - 1])),
        ("the <POS> <END1> a|the tower|towers is|are <COLOR>", lambda l, _, c: lambda w: any(l(b) and c(b) for b in _all(w))),
        ("the <POS> of a|the <BLOCKN> tower is|are <COLOR>",
         lambda l, n, c: lambda w: any(l(b) and c(b) and n[0] <= b.height <= n[1] for b in _all(w))),
        ("the <POS> of the two towers is|are <COLOR>", lambda l, c: lambda w: sum(l(b) and c(b) for b in _all(w)) >= 2),
        ("all the <POS> of the tower|towers are|is <COLOR>", lambda l, c: lambda w: sum(l(b) and c(b) for b in _all(w)) == 3),
        ("the <COLOR> item|block is on top", lambda c: lambda w: any(c(b) and b.level == b.height - 1 for b in _all(w))),
        ("<PQ> towers has|have the same <TRAIT>", lambda q, t: lambda w: _share(w, q, t)),
        ("there are <PQ> towers with|that|which has|have|~ the same <TRAIT>", lambda q, t: lambda w: _share(w, q, t)),
        ("<PQ> towers are|is the same in <TRAIT>", lambda q, t: lambda w: _share(w, q, t)),
        ("there are <PQ> boxes|towers that|which has|have the same number of items|objects|blocks",
         lambda q: lambda w: _share(w, q, len)),
    ],
    "TRAIT": [
        ("height", lambda: len),
        ("base color|~", lambda: lambda box: box[0].color),
        ("top color|~", lambda: lambda box: box[-1].color),
    ],
    "POS": [
        ("top|roof block|~", lambda: lambda b: b.level == b.height - 1),
        ("base|bottom|bases block|~", lambda: lambda b: b.level == 0),
        ("second block|blocks|~ from|~ the|~ base|~", lambda: lambda b: b.level == 1),
        ("third block|blocks|~ from|~ the|~ base|~", lambda: lambda b: b.level == 2),
        ("middle block|~", lambda: lambda b: 0 < b.level < b.height - 1),
    ],
    "END1": [("of|in|from", lambda: None)],
    "SUBJ": [
        ("<SQ> <SNP>", lambda q, p: (q, p)),
        ("<PQ> <PNP>", lambda q, p: (q, p)),
        ("the <SNP>", lambda p: ((1, MANY), p)),
        ("the|~ <PNP>", lambda p: ((1, MANY), p)),
        ("<SNP>", lambda p: ((1, MANY), p)),
    ],
    "QNP": [
        ("<SQ> <SNP>", _count),
        ("<PQ> <PNP>", _count),
        ("<SQ> <PNP>", _count),
        ("<PQ> <SNP>", _count),
        ("<PNP>", lambda p: _count((1, MANY), p)),
        ("<SNP>", lambda p: _count((1, MANY), p)),
        ("<PQ> <PNP> stacked|stack together", lambda q, p: _runs(p, q)),
        ("<PQ> <PNP> attached|attach|touching with|~ each other", lambda q, p: _runs(p, q)),
        ("<PQ> items|blocks|objects stacked|stack together of the same color|colour", lambda q: lambda x: any(_runs(_has(c), q)(x) for c in ("black", "blue", "yellow"))),
        ("<PQ> <PNP> of the same color|colour", lambda q, p: lambda x: _same(x, p, q, _color)),
        ("<PQ> <PNP> of the same shape", lambda q, p: lambda x: _same(x, p, q, _shape)),
        ("<PNP> of the same color|colour", lambda p: lambda x: len({b.color for b in x if p(b)}) == 1),
    ],
    "SQ": [
        ("a|an|as|another", lambda: (1, MANY)),
        ("one|1", lambda: ONE),
        ("exactly one|1", lambda: (1, 1)),
        ("only one|1|a", lambda: (1, 1)),
        ("at least one|1", lambda: (1, MANY)),
        ("atleast one|1", lambda: (1, MANY)),
        ("at most one|1", lambda: (0, 1)),
        ("no", lambda: (0, 0)),
        ("a single", lambda: (1, 1)),
        ("more than one|1", lambda: (2, MANY)),
    ],
    "PQ": [
        ("<NUM>", lambda n: (n, PLAIN(n))),
        ("exactly|just <NUM>", _exact),
        ("only <NUM>", _exact),
        ("at least <NUM>", lambda n: (n, MANY)),
        ("atleast <NUM>", lambda n: (n, MANY)),
        ("at most <NUM>", lambda n: (0, n)),
        ("more than <NUM>", lambda n: (n + 1, MANY)),
        ("less than <NUM>", lambda n: (0, n - 1)),
        ("not more than <NUM>", lambda n: (0, n)),
        ("no", lambda: (0, 0)),
        ("many|multiple", lambda: (5, MANY)),
        ("a lot of", lambda: (5, MANY)),
    ],
    "NUM": [(f"{word}|{digit}", lambda n=digit: n) for digit, word in enumerate(("two", "three", "four", "five", "six", "seven"), 2)],
    "COLOR": [(c, lambda c=c: _has(c)) for c in ("black", "blue", "yellow")],
    "COL": [
        ("", lambda: _true),
        ("<COLOR>", lambda c: c),
        ("<COLOR> color", lambda c: c),
        ("<COLOR> or <COLOR>", lambda c, d: lambda b: c(b) or d(b)),
    ],
    "SIZE": [("", lambda: _true), ("small", lambda: _has("small")), ("big", lambda: _has("big"))],
    "SNOUN": [
        ("item|object|block|shape|one|~", lambda: _true),
        *[(n, lambda n=n: _has(n)) for n in ("circle", "square", "triangle")],
    ],
    "PNOUN": [
        ("items|objects|blocks|shapes", lambda: _true),
        *[(n + "s", lambda n=n: _has(n)) for n in ("circle", "square", "triangle")],
    ],
    "SNP": [("<SIZE> <COL> <SNOUN> <POST>", lambda s, c, n, p: _both(s, c, n, p))],
    "PNP": [("<SIZE> <COL> <PNOUN> <POST>", lambda s, c, n, p: _both(s, c, n, p))],
    "POST": [
        ("", lambda: _true),
        ("<TOUCH>", lambda t: t),
        ("that|which is|are <TOUCH>", lambda t: t),
        ("of medium size", lambda: _has("medium")),
        ("of medium size <TOUCH>", lambda t: _both(_has("medium"), t)),
        ("in it", lambda: _true),
        ("that|which is|are a|~ <COL> <SNOUN>", _both),
        ("that|which is|are not <COLOR>", lambda c: lambda b: not c(b)),
        ("that|which is|are of <COLOR> color", lambda c: c),
        ("of <COLOR> color", lambda c: c),
        ("at|on the|~ top|roof", lambda: lambda b: b.level == b.height - 1),
        ("at|on the|its|~ base|bottom", lambda: lambda b: b.level == 0),
        ("in the middle", lambda: lambda b: 0 < b.level < b.height - 1),
        ("as a|the middle block", lambda: lambda b: 0 < b.level < b.height - 1),
        ("as the <POS> of|~ a|the|~ tower|towers", lambda l: l),
        ("as the <POS> of a|the|~ tower with <QNP>", lambda l, q: lambda b: l(b) and q(_tower(b))),
        ("above|over of|~ a|the|an <COL> <SNOUN>", lambda c, n: _above(c, False)),
        ("on top of a|the|an <COL> <SNOUN>", lambda c, n: _above(c, True)),
        ("right|directly on top of a|the|an <COL> <SNOUN>", lambda c, n: _above(c, True)),
        ("on a|the|an <COL> <SNOUN>", lambda c, n: _above(c, True)),
        ("bellow|below|under|beneath|underneath a|the <COL> <SNOUN>", lambda c, n: _below(c, False)),
        ("attached|attach|touching to|with|~ a|the <COL> <SNOUN>", lambda c, n: lambda b: any(c(_painted(b, f)) for f in b.friends)),
        ("that is attached|attach to a|the <COL> <SNOUN>", lambda c, n: lambda b: any(c(_painted(b, f)) for f in b.friends)),
        ("between two|2 <COL> blocks|items", lambda c: lambda b: _below(c, True)(b) and _above(c, True)(b)),
    ],
    "TOUCH": [
        ("closely|~ touching <WALL>", lambda t: lambda b: t(b.walls)),
        ("nearly|almost touching <WALL>", lambda t: lambda b: t(b.near)),
        ("not touching <WALL>", lambda t: lambda b: not t(b.walls)),
    ],
    "WALL": [
        ("the|a|any|an|~ edge|wall|side|line|sides|edges <OF>", lambda _: bool),
        ("the|a|any|~ base|bottom|floor base|edge|wall|~ <OF>", lambda _: lambda w: "bottom" in w),
        ("the|a|any|~ box|~ corner|corners <OF>", lambda _: lambda w: len(w) >= 2),
        ("the|~ right wall|side|edge edge|~ <OF>", lambda _: lambda w: "right" in w),
        ("the|~ left wall|side|edge <OF>", lambda _: lambda w: "left" in w),
        ("the|~ roof|top|ceiling <OF>", lambda _: lambda w: "top" in w),
        ("the|a|~ bottom-right|lower corner <OF>", lambda _: lambda w: {"bottom", "right"} <= w),
    ],
    "OF": [("", lambda: None), ("of a|the|grey box|square", lambda: None), ("of a|the grey box|square", lambda: None), ("with its side|top", lambda: None)],
    "QBOX": [
        (f"<SQ> {_grey} {_box} <WITH> <BP>", lambda q, _, p: _boxes(_some(q), p)),
        ("<PQ> grey|~ boxes|squares|towers|tower|box <WITH> <BP> each|~", lambda q, _, p: _boxes(q, p)),
        (f"{_grey} {_box} <WITH> <BP>", lambda _, p: _boxes((1, 3), p)),
        (f"<SQ> of the three|~ grey|~ boxes|{_box}|squares|towers <WITH> <BP>", lambda q, _, p: _boxes(_some(q), p)),
        ("two|2 of the three|~ boxes|towers <WITH> <BP>", lambda _, p: _boxes((2, 3), p)),
        (f"each|every grey|~ {_box} <WITH> <BP>", lambda _, p: _boxes((3, 3), p)),
        ("all of|~ the|~ three|~ grey|~ boxes|towers|squares <WITH> <BP>", lambda _, p: _boxes((3, 3), p)),
        (f"the grey|~ {_box} <WITH> <BP>", lambda _, p: _boxes((1, 3), p)),
        ("<SQ> <COLOR> tower <WITHT>", lambda q, c, p: _boxes(_some(q), _colors_are(c), p)),
        ("<SQ> of the three|~ towers|tower is|are <COLOR>", lambda q, c: _boxes(_some(q), _colors_are(c))),
        ("<PQ> <COLOR> towers <WITHT>", lambda q, c, p: _boxes(q, _colors_are(c), p)),
        ("<SQ> <BLOCKN> tower", lambda q, n: _boxes(_some(q), lambda x: n[0] <= len(x) <= n[1])),
        ("<SQ> <BLOCKN> tower and|that|which|where the <POS> is <COLOR>",
         lambda q, n, l, c: _boxes(_some(q), lambda x: n[0] <= len(x) <= n[1] and any(l(b) and c(b) for b in x))),
        ("<SQ> tower with|and|that|which|where a|the|~ <POS> is <COLOR>",
         lambda q, l, c: _boxes(_some(q), lambda x: any(l(b) and c(b) for b in x))),
        ("<SQ> tower with|that has|~ a|~ <COLOR> <POS>", lambda q, c, l: _boxes(_some(q), lambda x: any(l(b) and c(b) for b in x))),
        ("<PQ> towers with|that|~ have|has|~ a|~ <COLOR> <POS>", lambda q, c, l: _boxes(q, lambda x: any(l(b) and c(b) for b in x))),
    ],
    "BLOCKN": [("<NUM> block|blocks", lambda n: (n, n)), ("one|single block", lambda: (1, 1))],
    "WITHT": [("", lambda: _true), ("with|that|which|has|~ has|have|~ <BP>", lambda p: p)],
    "WITH": [
        (_WITH, lambda: None),
        (",|~ that|which has|have|contains|contain|only|~", lambda: None),
        ("where|and there is|are", lambda: None),
        ("that|which is|are made of", lambda: None),
        ("where|that|in", lambda: None),
        ("with has", lambda: None),
    ],
    "BP": [
        ("<BP1>", lambda p: p),
        ("<BP1> <JOIN> <BP1>", lambda p, _, r: _both(p, r)),
        ("<BP1> , <BP1> <JOIN> <BP1>", lambda p, r, _, s: _both(p, r, s)),
        ("<BP1> , <BP1> , <BP1> <JOIN> <BP1>", lambda p, r, s, _, t: _both(p, r, s, t)),
    ],
    "JOIN": [
        ("and|, and|~ with|which|a|~", lambda: None),
        ("having|has|with|where|that|which|including|and which|that|has|~", lambda: None),
        (",|~ of which|~ there|~ is|are|~", lambda: None),
        ("and|where there is|are", lambda: None),
        ("not|but having|not", lambda: None),
    ],
    "BP1": [
        ("<QNP>", lambda p: p),
        ("<SUBJ> is|are <TOUCH>", lambda qp, t: _count(qp[0], _both(qp[1], t))),
        ("<SUBJ> is|are a|~ <COL> <SNOUN>", lambda qp, c, n: _count(qp[0], _both(qp[1], c, n))),
        ("the <POS> is|are <COLOR>", lambda l, c: lambda x: any(l(b) and c(b) for b in x)),
        ("it|they is|are a|~ <COL> <SNOUN>", lambda c, n: lambda x: all(c(b) and n(b) for b in x)),
        ("only <COLOR> <PNOUN>", lambda c, n: lambda x: all(c(b) and n(b) for b in x)),
        ("<PNOUN> of only|~ <COLOR> color", lambda n, c: _colors_are(c)),
        ("<COLOR> <PNOUN> only", lambda c, n: lambda x: all(c(b) and n(b) for b in x)),
        ("only <COLOR> and <COLOR> items|blocks|color|objects|squares <IN>", lambda c, d, _: _colors_are(c, d)),
        ("<COLOR> and <COLOR> items|blocks|objects|~ only", _colors_are),
        ("<COLOR> and <COLOR> items|blocks|objects", lambda c, d: lambda x: any(map(c, x)) and any(map(d, x))),
        ("items|blocks|objects of only <COLOR> and <COLOR> color|colors <IN>", lambda c, d, _: _colors_are(c, d)),
        ("items|blocks|objects of <COLOR> and <COLOR> color|colors", _colors_are),
        ("<PQ> items|blocks|objects of|with only|~ <COLOR> and <COLOR> color|colors", lambda q, c, d: _both(_count(q, _true), _colors_are(c, d))),
        ("only <NUM> <COLOR> and <COLOR> items", lambda n, c, d: _both(_count((n, n), _true), _colors_are(c, d))),
        ("items|blocks|objects|~ of|~ all|only|the|~ the|~ <NUM> different|~ colors|color", lambda n: _distinct((n, n), _color)),
        ("<QNP> of all|only|the|~ <NUM> different|~ colors|color", lambda p, n: _both(p, _distinct((n, n), _color))),
        ("<QNP> of different colors|color", lambda p: lambda x: p(x) and len({b.color for b in x}) == len(x)),
        ("items|blocks of different colors|color", lambda: lambda x: len({b.color for b in x}) > 1),
        ("<PNOUN> of the|~ same color|colour", lambda n: _distinct((1, 1), _color)),
        ("<PQ> items at most", lambda q: _count((0, q[0]), _true)),
        ("<PQ> items at most of only|~ one color", lambda q: _both(_count((0, q[0]), _true), _distinct((1, 1), _color))),
        ("<PQ> items at most of all|only|~ <NUM> different|~ colors", lambda q, n: _both(_count((0, q[0]), _true), _distinct((n, n), _color))),
        ("<PQ> <COLOR> items at most", lambda q, c: _count((0, q[0]), c)),
        ("only one color|shape", lambda: _distinct((1, 1), _color)),
        ("<PQ> colors", lambda q: _distinct(q, _color)),
        ("<CN> and <CN> item|items|block|blocks", _both),
        ("<CN> , <CN> ,|~ and <CN> item|items", _both),
        ("a <COLOR> and <COLOR> <SNOUN>", lambda c, d, n: lambda x: any(c(b) and n(b) for b in x) and any(d(b) and n(b) for b in x)),
        ("the same color|colour", lambda: _distinct((1, 1), _color)),
        ("without|no a|an|~ <COLOR> item|items|color|block", lambda c: _count((0, 0), c)),
        ("the <SNP>", lambda p: _count((1, MANY), p)),
    ],
    "CN": [("<SQ> <COLOR>", _count), ("<PQ> <COLOR>", _count)],
    "IN": [("", lambda: None), ("in it", lambda: None)],
}  # fmt: skip

ONE = (1, MANY)


def PLAIN(n: int) -> int:
    """The upper bound of a bare number: "two items" of two or more."""
    return MANY


def _some(q: tuple[int, int]) -> tuple[int, int]:
    return q


def _share(world: list[Blocks], q: tuple[int, int], trait: Callable[[Blocks], Any]) -> bool:
    values = [trait(box) for box in world if box]
    return any(q[0] <= values.count(v) <= q[1] for v in values)


def _tower(b: Block) -> Blocks:
    return [Block(c, b.shape, b.size, b.walls, b.near, k, b.height, b.box, b.colors, b.friends) for k, c in enumerate(b.colors)]
