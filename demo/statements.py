"""True/false statements about box scenes with their exact truth, in the wordings people used for NLVR.

    python demo/statements.py --nlvr DIR          # coverage and agreement with people's judgements
    python demo/statements.py --nlvr DIR --fit    # recount rules and words on the train sentences

The rules are in ``statement_grammar.py``; ``statement_weights.json`` holds how often each rule and wording occurs in
the train sentences of NLVR (CC BY 4.0, Suhr et al. 2017), so that sampled statements follow people's habits.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import tarfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from weakref import WeakKeyDictionary

from grammar_engine import Node, Weights, counted, generate, meaning, mutated, normal, parse, text, weighted
from nlvr_pictures import read_picture
from PIL import Image
from scene_model import Scene, sample_scene
from statement_world import Block, view

WEIGHTS = Path(__file__).with_name("statement_weights.json")
LONGEST = 24  # words
DETAILS = ("NUM", "COLOR", "COL", "SNOUN", "PNOUN", "SQ", "PQ", "WALL", "POS", "POST", "SIZE")
ODD = re.compile(
    r"\b(a|an|as|another|one|1|no|the|single) (touching|closely|nearly|almost|not|which|that|at|on|as|above|over|below|"
    r"bellow|under|beneath|attach\w*|and|with|where|having|has|have|in|is|are|of [a-z]+ (color|size)|,|one|a|$)|"
    r"\b(\w+) (?:that|which) (?:is|are) (?:a )?\4\b|touching .*touching|"
    r"\b(black|blue|yellow)( \w+)? (that|which) (is|are) (of )?(a )?(black|blue|yellow)|(of it|with it)$|"
    r"[a-z]s stacked together (which|that|at|on|as)"
)
Counted = dict[str, dict[str, dict[str, int]]]


class Pool:
    """Recent scenes of one kind, a few of them new at every use: where statements find the truth they want."""

    def __init__(self, kind: str, rng: random.Random, size: int = 300) -> None:
        self.kind = kind
        self.scenes = [self._new(rng) for _ in range(size)]

    def _new(self, rng: random.Random) -> tuple[Scene, list[list[Block]]]:
        scene = sample_scene(rng, self.kind)
        return scene, view(scene)

    def find(self, node: Node, wanted: bool, rng: random.Random, tries: int = 60) -> Scene | None:
        for _ in range(4):
            self.scenes[rng.randrange(len(self.scenes))] = self._new(rng)
        test, start = meaning(node), rng.randrange(len(self.scenes))
        for k in range(tries):
            scene, world = self.scenes[(start + k) % len(self.scenes)]
            if bool(test(world)) == wanted:
                return scene
        return None


# One pool for each generator, so that the generator alone decides what comes out.
_pools: WeakKeyDictionary[random.Random, dict[str, Pool]] = WeakKeyDictionary()


def _pool(kind: str, rng: random.Random) -> Pool:
    pools = _pools.setdefault(rng, {})
    if kind not in pools:
        pools[kind] = Pool(kind, rng)
    return pools[kind]


def statement(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    """A statement about a scatter or tower scene and whether it is true; both truths are equally likely.

    Often the statement is a near miss: one detail of another statement was drawn again until the truth came out as
    wanted. For training, :func:`grounded_statement` is better balanced.
    Raises ``ValueError`` on a canvas scene, which has no boxes.
    """
    if scene.kind == "canvas":
        raise ValueError("found a canvas scene, expected scatter or tower: statements speak of three boxes")
    world, wanted = view(scene), rng.random() < 0.5
    while True:
        node = _draw(scene.kind, rng)
        for _ in range(12):
            if _truth(node, world) == wanted:
                return _spoken(node), wanted
            near = mutated(node, rng, weights(scene.kind), DETAILS)
            node = near if _fine(near) else node


def grounded_statement(rng: random.Random, kind: str | None = None) -> tuple[Scene, str, bool]:
    """A statement first, then a scene in which it has a truth decided by a fair coin.

    Every wording is thus true half of the time, as in NLVR itself, and its words alone tell nothing. Statements
    that are true (or false) of every scene tried are dropped. ``kind`` is "scatter", "tower" or None for either.
    """
    kind = kind or rng.choice(("scatter", "tower"))
    pool = _pool(kind, rng)
    while True:
        node, wanted = _draw(kind, rng), rng.random() < 0.5
        scene = pool.find(node, wanted, rng)
        if scene is not None and pool.find(node, not wanted, rng) is not None:
            return scene, _spoken(node), wanted


def scene_for(sentence: str, kind: str, rng: random.Random) -> tuple[Scene, bool] | None:
    """A new scene for a sentence somebody wrote, in which a fair coin decides its truth; None if that cannot be done.

    None also when the grammar cannot read the sentence, or the sentence holds for all scenes tried, or for none.
    """
    node = parse(normal(sentence))
    if node is None:
        return None
    wanted = rng.random() < 0.5
    scene, other = (_pool(kind, rng).find(node, truth, rng) for truth in (wanted, not wanted))
    return (scene, wanted) if scene is not None and other is not None else None


def judge(sentence: str, scene: Scene) -> bool | None:
    """Truth of any statement the grammar can read, None for the others."""
    node = parse(normal(sentence))
    return None if node is None else _truth(node, view(scene))


@lru_cache(maxsize=2)
def weights(kind: str) -> Weights:
    stored: dict[str, Counted] = json.loads(WEIGHTS.read_text())
    return weighted(stored[kind])


def _draw(kind: str, rng: random.Random) -> Node:
    while True:
        node = generate(rng, weights(kind))
        if _fine(node):
            return node


def _fine(node: Node) -> bool:
    words = text(node)
    return 0 < len(words.split()) <= LONGEST and ODD.search(words) is None


def _truth(node: Node, world: list[list[Block]]) -> bool:
    return bool(meaning(node)(world))


def _spoken(node: Node) -> str:
    """Articles, agreement and a capital, as in the corpus."""
    words = re.sub(r"\b(?:a|an) (?=[aeio])", "an ", text(node))
    words = re.sub(r"\ban (?=[^aeio])", "a ", words)
    limit = r"(?:exactly|only|at least|atleast|at most|more than|less than|just)"
    number = rf"(?:{limit} )*(?:two|three|four|five|six|seven|[2-7]|many|multiple)"
    words = re.sub(rf"^there (?:is|isa) (?={number} |(?:black |blue |yellow |small |big )*\w+s\b)", "there are ", words)
    words = re.sub(
        r"^there are (?=(?:exactly |only |at least |atleast |at most |more than )*(?:a|an|one|1|another) )",
        "there is ",
        words,
    )
    return words[0].upper() + words[1:]


def report(folder: Path, fit: bool) -> None:
    rows = {
        s: [json.loads(line) for line in (folder / f"{s}.jsonl").read_text().splitlines()] for s in ("train", "dev")
    }
    trees = {s: parse(s) for s in {normal(r["sentence"]) for r in rows["train"] + rows["dev"]}}
    kinds: dict[str, list[Node]] = {"scatter": [], "tower": []}
    for split, listed in rows.items():
        counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
        for row, scene in zip(listed, _scenes(folder, split, listed), strict=True):
            tree, seen = trees[normal(row["sentence"])], counts[scene.kind]
            seen["rows"] += 1
            if tree is not None:
                seen["read"] += 1
                seen["right"] += _truth(tree, view(scene)) == row["label"]
                if split == "train":
                    kinds[scene.kind].append(tree)
        for kind, seen in counts.items():
            print(f"{split} {kind}: {seen['read'] / seen['rows']:.1%} of {seen['rows']} rows can be read, "
                  f"{seen['right'] / seen['read']:.1%} of those agree with the label")  # fmt: skip
    if fit:
        WEIGHTS.write_text(json.dumps({kind: counted(nodes) for kind, nodes in kinds.items()}) + "\n")
        print(f"wrote {WEIGHTS}")


def _scenes(folder: Path, split: str, rows: list[dict[str, object]]) -> list[Scene]:
    """What the pictures show, from the pixels: the train rows carry no description."""
    found: dict[str, Scene] = {}
    with tarfile.open(folder / f"{split}-images.tar") as archive:
        for member in archive:
            data = archive.extractfile(member)
            if data is not None:
                found[Path(member.name).name] = read_picture(Image.open(io.BytesIO(data.read())))
    return [found[Path(str(row["image"])).name] for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--nlvr", type=Path, required=True, help="folder with {train,dev}.jsonl and {train,dev}-images.tar"
    )
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    report(arguments.nlvr, arguments.fit)
