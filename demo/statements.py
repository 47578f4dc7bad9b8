"""True/false statements about box scenes with their exact truth, in the wordings people used for NLVR.

    python demo/statements.py --nlvr DIR          # coverage and agreement with people's judgements
    python demo/statements.py --nlvr DIR --fit    # refit the rule weights on the train sentences

The rules are in ``statement_grammar.py``; ``statement_weights.json`` holds how often each rule and wording occurs in
the train sentences of NLVR (CC BY 4.0, Suhr et al. 2017), so that sampled statements follow people's habits.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from functools import lru_cache
from pathlib import Path

from grammar_engine import Node, Weights, fitted, generate, meaning, mutated, normal, parse, text
from scene_model import Scene, sample_scene, scene_from_nlvr
from statement_grammar import Block, view

WEIGHTS = Path(__file__).with_name("statement_weights.json")
LONGEST = 24  # words
DETAILS = ("NUM", "COLOR", "COL", "SNOUN", "PNOUN", "SQ", "PQ", "WALL", "POS", "POST", "SIZE")
LOOSE = ("touching", "circle", "triangle", "small", "big", "medium", "corner", "edge", "wall", "side")
STACKED = ("tower", "stack", "above", "over", "on top", "top", "below", "bellow", "under", "base")


def statement(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    """A statement about a scatter or tower scene and whether it is true; both truths are equally likely.

    Half of the time the statement is a near miss: one detail of another statement was drawn again until the truth
    came out as wanted. For training, :func:`grounded_statement` is better balanced.
    Raises ``ValueError`` on a canvas scene, which has no boxes.
    """
    if scene.kind == "canvas":
        raise ValueError("found a canvas scene, expected scatter or tower: statements speak of three boxes")
    world, wanted = view(scene), rng.random() < 0.5
    while True:
        node = _draw(scene.kind, rng)
        for _ in range(12):
            if _truth(node, world) == wanted:
                return _spoken(node, rng), wanted
            node = _fresh(mutated(node, rng, weights(), DETAILS), scene.kind) or node


def grounded_statement(rng: random.Random, kind: str | None = None) -> tuple[Scene, str, bool]:
    """A statement first, then a scene in which it has a truth decided by a fair coin.

    Every wording is thus true exactly half of the time, as in NLVR itself, and its words alone tell nothing.
    ``kind`` is "scatter", "tower" or None for either.
    """
    kind = kind or rng.choice(("scatter", "tower"))
    while True:
        node, wanted = _draw(kind, rng), rng.random() < 0.5
        for _ in range(60):
            scene = sample_scene(rng, kind)
            if _truth(node, view(scene)) == wanted:
                return scene, _spoken(node, rng), wanted


def judge(sentence: str, scene: Scene) -> bool | None:
    """Truth of any statement the grammar can read, None for the others."""
    node = parse(normal(sentence))
    return None if node is None else _truth(node, view(scene))


@lru_cache(maxsize=1)
def weights() -> Weights:
    stored = json.loads(WEIGHTS.read_text())
    return Weights(stored["rules"], stored["words"])


def _draw(kind: str, rng: random.Random) -> Node:
    while True:
        node = _fresh(generate(rng, weights()), kind)
        if node is not None:
            return node


def _fresh(node: Node, kind: str) -> Node | None:
    """The node if it suits the kind of scene and is no monster, else None."""
    words = text(node)
    wrong = LOOSE if kind == "tower" else STACKED
    return None if len(words.split()) > LONGEST or any(w in words for w in wrong) and not _shared(words, kind) else node


def _shared(words: str, kind: str) -> bool:
    """Towers do stand on the wall: people say "a black square touching the wall" of a base."""
    return kind == "tower" and not any(w in words for w in ("circle", "triangle", "small", "big", "medium", "corner"))


def _truth(node: Node, world: list[list[Block]]) -> bool:
    return bool(meaning(node)(world))


def _spoken(node: Node, rng: random.Random) -> str:
    """Agreement, capitals and stops as in the corpus."""
    words = text(node)
    if words.startswith(("there is two", "there is three", "there is four")):
        words = words.replace("there is", "there are", 1)
    result = words[0].upper() + words[1:]
    return result + "." if rng.random() < 0.2 else result


def report(folder: Path, fit: bool) -> None:
    train = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    dev = [json.loads(line) for line in (folder / "dev.jsonl").read_text().splitlines()]
    trees = {s: parse(s) for s in {normal(r["sentence"]) for r in train + dev}}
    read = [t for r in train if (t := trees[normal(r["sentence"])]) is not None]
    print(f"train: {len(read) / len(train):.1%} of {len(train)} rows can be read")
    if fit:
        found = fitted(read)
        rounded = {k: {n: [round(x, 2) for x in v] for n, v in getattr(found, k).items()} for k in ("rules", "words")}
        WEIGHTS.write_text(json.dumps(rounded) + "\n")
        print(f"wrote {WEIGHTS}")
    kinds: dict[str, Counter[str]] = {}
    for row in dev:
        scene = scene_from_nlvr(row["structured_rep"])
        tree = trees[normal(row["sentence"])]
        counts = kinds.setdefault(scene.kind, Counter())
        counts["rows"] += 1
        if tree is not None:
            counts["read"] += 1
            counts["right"] += _truth(tree, view(scene)) == row["label"]
    for kind, counts in kinds.items():
        print(f"dev {kind}: {counts['read'] / counts['rows']:.1%} of {counts['rows']} rows can be read, "
              f"{counts['right'] / counts['read']:.1%} of those agree with the label")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nlvr", type=Path, required=True, help="folder with train.jsonl and dev.jsonl")
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    report(arguments.nlvr, arguments.fit)
