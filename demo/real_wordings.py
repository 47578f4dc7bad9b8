"""More pictures for the sentences that people wrote for NLVR: new scenes, with the truth worked out by the grammar.

Each training sentence that the grammar of ``statements.py`` reads gets scenes of its own kind in which a fair coin decides
whether it is true, so its words alone tell nothing. Statements are gathered by scene: one picture, several questions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from dialogues import Exchange
from grammar_engine import Node, meaning, normal, parse
from nlvr_pictures import read_picture
from PIL import Image
from scene_model import Scene, sample_scene
from statement_world import view

Wordings = dict[str, list[tuple[str, Node]]]
TRIES = 40  # scenes looked at for a sentence's wanted truth
POOL = 200  # scenes filling up at a time


def wordings(pairs: list[tuple[Path, str]]) -> Wordings:
    """The readable sentences among (picture, sentence) pairs, by the kind of scene they speak of, as often as they occur."""
    found: Wordings = {"scatter": [], "tower": []}
    for path, sentence in pairs:
        node = parse(normal(sentence))
        if node is not None:
            with Image.open(path) as image:
                found[read_picture(image).kind].append((sentence, node))
    return found


def statement_scenes(
    written: Wordings, rng: random.Random, count: int, per_scene: int = 8
) -> Iterator[tuple[Scene, list[Exchange]]]:
    """``count`` scenes with ``per_scene`` questions ``Is this true? …`` each."""
    pools = {kind: [_fresh(kind, rng) for _ in range(POOL)] for kind in written}
    kinds = [kind for kind in written for _ in written[kind]]
    while count:
        kind = rng.choice(kinds)
        sentence, node = rng.choice(written[kind])
        test, wanted, pool = meaning(node), rng.random() < 0.5, pools[kind]
        for place in rng.sample(range(POOL), TRIES):
            scene, world, asked = pool[place]
            question = f"Is this true? {sentence}"
            if bool(test(world)) == wanted and all(question != earlier for earlier, _ in asked):
                asked.append((question, "yes" if wanted else "no"))
                if len(asked) == per_scene:
                    yield scene, asked
                    count -= 1
                    pool[place] = _fresh(kind, rng)
                break


def _fresh(kind: str, rng: random.Random) -> tuple[Scene, list, list[Exchange]]:
    scene = sample_scene(rng, kind)
    return scene, view(scene), []
