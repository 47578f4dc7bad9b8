"""A small grammar of true/false statements about box scenes, in the wordings people used for NLVR.

Each rule is a pattern of words and ``<SYMBOLS>`` with the meaning of the whole as a function of its parts' meanings.
``a|b`` are alternative words, ``~`` is no word. The same rules generate statements and parse them, so what the
generator cannot say can be listed, and the truth it assigns can be compared with people's judgements. Meanings are
explained in :mod:`statement_world`.
"""

from __future__ import annotations

from statement_phrases import PHRASES, Rule
from statement_world import (
    MANY,
    all_of,
    anything,
    boxes_where,
    color_of,
    colors_are,
    counts,
    distinct,
    everything,
    named,
    runs,
    shape_of,
    share,
    sharing,
)

_box, _grey = "box|square|tower", "grey|~"
_WITH = "with|having|has|containing|contains|have"

GRAMMAR: dict[str, list[Rule]] = {
    **PHRASES,
    "S": [
        ("there is|are|isa <QNP>", lambda p: lambda w: p(everything(w))),
        ("there is|are|isa <QNP> and|, <QNP>", lambda p, r: lambda w: p(everything(w)) and r(everything(w))),
        ("<QNP>", lambda p: lambda w: p(everything(w))),
        ("there is|are|isa <QBOX>", lambda p: p),
        ("<QBOX>", lambda p: p),
        (
            "there is|are <QNP> as the <POS> of <SQ> tower|towers",
            lambda p, at, q: boxes_where(q, lambda x: p([b for b in x if at(b)])),
        ),
        (
            "there is|are <QNP> as the <POS> of <PQ> towers|tower",
            lambda p, at, q: boxes_where(q, lambda x: p([b for b in x if at(b)])),
        ),
        ("<SUBJ> is|are <TOUCH>", lambda qp, t: lambda w: counts(qp[0], all_of(qp[1], t))(everything(w))),
        ("none of the <PNP> are|is|~ <TOUCH>", lambda p, t: lambda w: not any(p(b) and t(b) for b in everything(w))),
        ("there is|are <QNP> in each|every|all box|boxes|tower|towers", lambda p: boxes_where((3, 3), p)),
        (
            "there is|are <QNP> in|inside a|one|1|the|same grey|same|~ box|tower|square",
            lambda p: boxes_where((1, 3), p),
        ),
        ("there is|are <QNP> on top", lambda p: lambda w: p([b for b in everything(w) if b.level == b.height - 1])),
        (
            "the <POS> <END1> a|the tower|towers is|are <COLOR>",
            lambda at, _, c: lambda w: any(at(b) and c(b) for b in everything(w)),
        ),
        (
            "the <POS> of a|the <BLOCKN> tower is|are <COLOR>",
            lambda at, n, c: lambda w: any(at(b) and c(b) and n[0] <= b.height <= n[1] for b in everything(w)),
        ),
        (
            "the <POS> of the two towers is|are <COLOR>",
            lambda at, c: lambda w: sum(at(b) and c(b) for b in everything(w)) >= 2,
        ),
        (
            "all the <POS> of the tower|towers are|is <COLOR>",
            lambda at, c: lambda w: sum(at(b) and c(b) for b in everything(w)) == 3,
        ),
        (
            "the <COLOR> item|block is on top",
            lambda c: lambda w: any(c(b) and b.level == b.height - 1 for b in everything(w)),
        ),
        (
            "<PQ> boxes|box has|have the same number of items|objects|blocks each|~",
            lambda q: lambda w: share(w, q, len),
        ),
        (
            "all the|~ boxes|towers has|have the same number of items|objects|blocks",
            lambda: lambda w: len(set(map(len, w))) == 1,
        ),
        ("all the|~ three|~ towers has|have the same <TRAIT>", lambda t: lambda w: share(w, (3, 3), t)),
        ("two of the three towers has|have the same <TRAIT>", lambda t: lambda w: share(w, (2, 2), t)),
        ("<PQ> towers|tower has|have the same <TRAIT>", lambda q, t: lambda w: share(w, q, t)),
        ("there is|are <PQ> towers with|that|which has|have|~ the same <TRAIT>", lambda q, t: lambda w: share(w, q, t)),
        ("<PQ> towers are|is the same in <TRAIT>", lambda q, t: lambda w: share(w, q, t)),
        (
            "there is|are <PQ> boxes|towers that|which|with has|have|~ the same number of items|objects|blocks",
            lambda q: lambda w: share(w, q, len),
        ),
    ],
    "SUBJ": [
        ("<SQ> <SNP>", lambda q, p: (q, p)),
        ("<PQ> <PNP>", lambda q, p: (q, p)),
        ("the <PQ> <PNP>", lambda q, p: (q, p)),
        ("the <SQ> <SNP>", lambda q, p: (q, p)),
        ("the|~ <PQ>", lambda q: (q, anything)),
        ("<SQ> of them|the|these items|objects|item|object|~", lambda q: (q, anything)),
        ("the <SNP>", lambda p: ((1, MANY), p)),
        ("the|~ <PNP>", lambda p: ((1, MANY), p)),
        ("<SNP>", lambda p: ((1, MANY), p)),
    ],
    "QNP": [
        ("<SQ> <SNP>", counts),
        ("<PQ> <PNP>", counts),
        ("<SQ> <PNP>", counts),
        ("<PQ> <SNP>", counts),
        ("<PNP>", lambda p: counts((1, MANY), p)),
        ("<SNP>", lambda p: counts((1, MANY), p)),
        ("<PQ> <PNP> stacked|stack together", lambda q, p: runs(p, q)),
        ("<PQ> <PNP> attached|attach|touching with|~ each other", lambda q, p: runs(p, q)),
        (
            "<PQ> items|blocks|objects stacked|stack together of the same color|colour",
            lambda q: lambda x: any(runs(named(c), q)(x) for c in ("black", "blue", "yellow")),
        ),
        ("<PQ> <PNP> of the same color|colour", lambda q, p: lambda x: sharing(x, p, q, color_of)),
        ("<PQ> <PNP> of the same shape", lambda q, p: lambda x: sharing(x, p, q, shape_of)),
        ("<PNP> of the same color|colour", lambda p: lambda x: len({b.color for b in x if p(b)}) == 1),
    ],
    "QBOX": [
        (f"<SQ> {_grey} {_box} <WITH> <BP>", lambda q, _, p: boxes_where(q, p)),
        ("<PQ> grey|~ boxes|squares|towers|tower|box <WITH> <BP> each|~", lambda q, _, p: boxes_where(q, p)),
        (f"{_grey} {_box} <WITH> <BP>", lambda _, p: boxes_where((1, 3), p)),
        (f"<SQ> of the three|~ grey|~ boxes|{_box}|squares|towers <WITH> <BP>", lambda q, _, p: boxes_where(q, p)),
        ("two|2 of the three|~ boxes|towers <WITH> <BP>", lambda _, p: boxes_where((2, 3), p)),
        ("<SQ> <BLOCKN> tower <WITH> <BP>", lambda q, n, _, p: boxes_where(q, lambda x: n[0] <= len(x) <= n[1], p)),
        (f"<SQ> {_grey} {_box} without a|an|~ <SNP>", lambda q, n: boxes_where(q, counts((0, 0), n))),
        (
            f"<SQ> {_grey} {_box} without a|an|~ <SNP> <JOIN> <BP>",
            lambda q, n, _, p: boxes_where(q, counts((0, 0), n), p),
        ),
        (f"each|every grey|~ {_box} <WITH> <BP>", lambda _, p: boxes_where((3, 3), p)),
        ("all of|~ the|~ three|~ grey|~ boxes|towers|squares <WITH> <BP> each|~", lambda _, p: boxes_where((3, 3), p)),
        (f"the grey|~ {_box} <WITH> <BP>", lambda _, p: boxes_where((1, 3), p)),
        ("<SQ> <COLOR> tower <WITHT>", lambda q, c, p: boxes_where(q, colors_are(c), p)),
        ("<SQ> of the three|~ towers|tower is|are <COLOR>", lambda q, c: boxes_where(q, colors_are(c))),
        ("<PQ> <COLOR> towers <WITHT>", lambda q, c, p: boxes_where(q, colors_are(c), p)),
        ("<SQ> tower with|that|which has|~ only one color", lambda q: boxes_where(q, distinct((1, 1), color_of))),
        ("<SQ> <BLOCKN> tower", lambda q, n: boxes_where(q, lambda x: n[0] <= len(x) <= n[1])),
        (
            "<SQ> <BLOCKN> tower and|that|which|where the <POS> is <COLOR>",
            lambda q, n, at, c: boxes_where(q, lambda x: n[0] <= len(x) <= n[1] and any(at(b) and c(b) for b in x)),
        ),
        (
            "<SQ> tower with|and|that|which|where a|the|~ <POS> is <COLOR>",
            lambda q, at, c: boxes_where(q, lambda x: any(at(b) and c(b) for b in x)),
        ),
        (
            "<SQ> tower with|that has|~ a|~ <COLOR> <POS>",
            lambda q, c, at: boxes_where(q, lambda x: any(at(b) and c(b) for b in x)),
        ),
        (
            "two of the three towers has|have a|~ <COLOR> <POS>",
            lambda c, at: boxes_where((2, 2), lambda x: any(at(b) and c(b) for b in x)),
        ),
        (
            "<PQ> towers with|that|~ have|has|~ a|~ <COLOR> <POS>",
            lambda q, c, at: boxes_where(q, lambda x: any(at(b) and c(b) for b in x)),
        ),
    ],
    "BLOCKN": [("<NUM> block|blocks", lambda n: (n, n)), ("one|single block", lambda: (1, 1))],
    "WITHT": [("", lambda: anything), ("with|that|which|has|~ has|have|~ <BP>", lambda p: p)],
    "WITH": [
        (_WITH, lambda: None),
        ("with|of", lambda: None),
        (",|~ that|which has|have|contains|contain|only|~", lambda: None),
        ("where|and there is|are", lambda: None),
        ("that|which is|are made of", lambda: None),
        ("where|that|in", lambda: None),
        ("with has", lambda: None),
    ],
    "BP": [
        ("<BP1>", lambda p: p),
        ("<BP1> <JOIN> <BP1>", lambda p, _, r: all_of(p, r)),
        ("<BP1> <JOIN> <BP1> <JOIN> <BP1>", lambda p, _, r, __, s: all_of(p, r, s)),
        ("<BP1> , <BP1> <JOIN> <BP1>", lambda p, r, _, s: all_of(p, r, s)),
        ("<BP1> ,|~ one of which is|are a|~ <COL> <SNOUN>", lambda p, c, n: all_of(p, counts((1, MANY), all_of(c, n)))),
        (
            "<BP1> where|and one of the object|objects|item|items is a|~ <COL> <SNOUN>",
            lambda p, c, n: all_of(p, counts((1, MANY), all_of(c, n))),
        ),
        ("<BP1> <JOIN> other items", lambda p, _: p),
        ("<BP1> , <BP1> , <BP1> <JOIN> <BP1>", lambda p, r, s, _, t: all_of(p, r, s, t)),
    ],
    "JOIN": [
        ("and|, and|~ with|which|a|~", lambda: None),
        ("having|has|with|where|that|which|including|and which|that|has|~", lambda: None),
        (",|~ of which|~ there|~ is|are|~", lambda: None),
        ("and|where there is|are", lambda: None),
        ("not|but having|not", lambda: None),
    ],
    "BP1": [
        ("<BQNP>", lambda p: p),
        ("<SUBJ> is|are <TOUCH>", lambda qp, t: counts(qp[0], all_of(qp[1], t))),
        ("<SUBJ> is|are a|~ <COL> <SNOUN>", lambda qp, c, n: counts(qp[0], all_of(qp[1], c, n))),
        ("the <POS> is|are <COLOR>", lambda at, c: lambda x: any(at(b) and c(b) for b in x)),
        ("a|~ <COLOR> <POS>", lambda c, at: lambda x: any(at(b) and c(b) for b in x)),
        (
            "the <POS> and <POS> is|are both|~ <COLOR>",
            lambda at, m, c: lambda x: any(at(b) and c(b) for b in x) and any(m(b) and c(b) for b in x),
        ),
        (
            "the <POS> and <POS> are|is the same in|~ color|colour|~",
            lambda at, m: lambda x: any(at(a) and m(b) and a.color == b.color for a in x for b in x),
        ),
        ("a|~ <COLOR> block at the|~ top|bottom and|, base|top", lambda c: lambda x: c(x[0]) and c(x[-1])),
        ("a|~ <COLOR> block at the|~ top and at the|~ base", lambda c: lambda x: c(x[0]) and c(x[-1])),
        ("<SUBJ> is|are a|~ <COL> <PNOUN> <POST>", lambda qp, c, n, p: counts(qp[0], all_of(qp[1], c, n, p))),
        ("<SUBJ> is|are on|at the|~ top", lambda qp: counts(qp[0], all_of(qp[1], lambda b: b.level == b.height - 1))),
        ("<SUBJ> is|are <COLOR> in color", lambda qp, c: counts(qp[0], all_of(qp[1], c))),
        ("<SUBJ> are|is the same in shape", lambda qp: lambda x: sharing(x, qp[1], qp[0], shape_of)),
        ("<SUBJ> are|is of|~ the same color|colour|~", lambda qp: lambda x: sharing(x, qp[1], qp[0], color_of)),
        ("it|they are the same color|colour", lambda: distinct((1, 1), color_of)),
        ("the color is|are <COLOR>", lambda c: lambda x: all(map(c, x))),
        ("the color is|are <COLOR> and <COLOR>", colors_are),
        ("the color of the blocks|items is|are <COLOR> and <COLOR>", colors_are),
        ("which|that is of <COLOR> color", lambda c: lambda x: any(map(c, x))),
        ("it|they is|are a|~ <COL> <SNOUN>", lambda c, n: lambda x: all(c(b) and n(b) for b in x)),
        ("only <CCOL> <PNOUN>", lambda c, n: lambda x: all(c(b) and n(b) for b in x)),
        ("<PNOUN> of only|~ <COLOR> color", lambda n, c: colors_are(c)),
        ("blocks|objects|items of <COLOR> and <COLOR> color only", colors_are),
        ("blocks|objects|items of <COLOR> color only", colors_are),
        (
            "blocks|objects|items of either <COLOR> or <COLOR> color only|~",
            lambda c, d: lambda x: all(c(b) or d(b) for b in x),
        ),
        ("all blocks|objects|items of the same color|colour", lambda: distinct((1, 1), color_of)),
        (
            "<QNP> of same color|colour",
            lambda p: lambda x: any(p([b for b in x if b.color == c]) for c in ("black", "blue", "yellow")),
        ),
        ("<CCOL> <PNOUN> only", lambda c, n: lambda x: all(c(b) and n(b) for b in x)),
        ("only <COLOR> and <COLOR> items|blocks|color|objects|squares <IN>", lambda c, d, _: colors_are(c, d)),
        ("<COLOR> and <COLOR> items|blocks|objects|~ only", colors_are),
        ("<COLOR> and <COLOR> items|blocks|objects", lambda c, d: lambda x: any(map(c, x)) and any(map(d, x))),
        ("items|blocks|objects of only <COLOR> and <COLOR> color|colors <IN>", lambda c, d, _: colors_are(c, d)),
        ("items|blocks|objects of <COLOR> and <COLOR> color|colors", colors_are),
        (
            "<PQ> items|blocks|objects of|with only|~ <COLOR> and <COLOR> color|colors",
            lambda q, c, d: all_of(counts(q, anything), colors_are(c, d)),
        ),
        ("only <NUM> <COLOR> and <COLOR> items", lambda n, c, d: all_of(counts((n, n), anything), colors_are(c, d))),
        (
            "items|blocks|objects|~ of|~ all|only|the|~ the|~ <NUM> different|~ colors|color",
            lambda n: distinct((n, n), color_of),
        ),
        ("<QNP> of all|only|the|~ <NUM> different|~ colors|color", lambda p, n: all_of(p, distinct((n, n), color_of))),
        ("<QNP> of different colors|color", lambda p: lambda x: p(x) and len({b.color for b in x}) == len(x)),
        ("items|blocks of different colors|color", lambda: lambda x: len({b.color for b in x}) > 1),
        ("<PNOUN> of the|~ same color|colour", lambda n: distinct((1, 1), color_of)),
        ("<PQ> items at most", lambda q: counts((0, q[0]), anything)),
        (
            "<PQ> items at most of only|~ one color",
            lambda q: all_of(counts((0, q[0]), anything), distinct((1, 1), color_of)),
        ),
        (
            "<PQ> items at most of all|only|~ <NUM> different|~ colors",
            lambda q, n: all_of(counts((0, q[0]), anything), distinct((n, n), color_of)),
        ),
        ("<PQ> <COLOR> items at most", lambda q, c: counts((0, q[0]), c)),
        ("only one color", lambda: distinct((1, 1), color_of)),
        ("only one shape", lambda: distinct((1, 1), shape_of)),
        ("<PQ> colors", lambda q: distinct(q, color_of)),
        ("<CN> and <CN> item|items|block|blocks", all_of),
        ("<CN> , <CN> ,|~ and <CN> item|items", all_of),
        (
            "a <COLOR> and <COLOR> <SNOUN>",
            lambda c, d, n: lambda x: any(c(b) and n(b) for b in x) and any(d(b) and n(b) for b in x),
        ),
        ("the same color|colour", lambda: distinct((1, 1), color_of)),
        ("without|no a|an|~ <COLOR> item|items|color|block", lambda c: counts((0, 0), c)),
        ("the <SNP>", lambda p: counts((1, MANY), p)),
    ],
    "CN": [("<BSQ> <COLOR>", counts), ("<PQ> <COLOR>", counts)],
    "IN": [("", lambda: None), ("in it", lambda: None)],
}

# Inside a box "one" means exactly one, elsewhere at least one: so the train labels say.
GRAMMAR["BQNP"] = [(pattern.replace("<SQ>", "<BSQ>"), test) for pattern, test in GRAMMAR["QNP"]]
GRAMMAR["BSQ"] = [(p, (lambda: (1, 1)) if p == "one|1" else test) for p, test in GRAMMAR["SQ"]]
