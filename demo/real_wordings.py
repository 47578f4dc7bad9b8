"""The sentences that people wrote for NLVR, about their own pictures and about new scenes.

Each training sentence that the grammar of ``statements.py`` reads gets scenes of its own kind in which a fair coin decides
whether it is true, so its words alone tell nothing. Statements are gathered by scene: one picture, several questions.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from dialogues import Exchange
from grammar_engine import Node, meaning, normal, parse
from nlvr_pictures import read_picture
from PIL import Image
from scene_model import Scene, sample_scene
from statement_world import view

TRIES = 40  # scenes looked at for a sentence's wanted truth
POOL = 200  # scenes filling up at a time, of each kind


@dataclass(frozen=True)
class Written:
    """NLVR's training statements: scene, sentence and truth; and those the grammar reads, by the kind of their scene."""

    statements: list[tuple[Scene, str, bool]]
    readable: dict[str, list[tuple[str, Node]]]

    @cached_property
    def sentences(self) -> list[str]:
        return sorted({sentence for _, sentence, _ in self.statements})


@lru_cache(maxsize=1)
def read_written(folder: Path) -> Written:
    """The training split of a folder of ``training/prepare_nlvr.py``, its scenes read back from the pixels."""
    statements: list[tuple[Scene, str, bool]] = []
    readable: dict[str, list[tuple[str, Node]]] = {"scatter": [], "tower": []}
    parsed: dict[str, Node | None] = {}
    for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines():
        question, reply = json.loads(line)["messages"]
        path = next(part["path"] for part in question["content"] if part["type"] == "image")
        text = next(part["text"] for part in question["content"] if part["type"] == "text")
        sentence = text.removeprefix("Is this true? ")
        answer = reply["content"] if isinstance(reply["content"], str) else reply["content"][0]["text"]
        with Image.open(folder / path) as image:
            scene = read_picture(image)
        statements.append((scene, sentence, answer == "yes"))
        if sentence not in parsed:
            parsed[sentence] = parse(normal(sentence))
        node = parsed[sentence]
        if node is not None:
            readable[scene.kind].append((sentence, node))
    return Written(statements, readable)


class WordedScenes:
    """Scenes with people's statements about them, drawn with ``rng``."""

    def __init__(self, written: Written, rng: random.Random) -> None:
        self.written, self.rng = written, rng
        self._kinds = [kind for kind, sentences in written.readable.items() for _ in sentences]
        self._distinct = {kind: len(dict(sentences)) for kind, sentences in written.readable.items()}
        self._pools: dict[str, list[tuple[Scene, Any, list[Exchange]]]] = {}

    def original(self) -> tuple[Scene, list[Exchange]]:
        """One of NLVR's own scenes with the statement that was written about it."""
        scene, sentence, truth = self.rng.choice(self.written.statements)
        return scene, [(f"Is this true? {sentence}", "yes" if truth else "no")]

    def invented(self, count: int) -> tuple[Scene, list[Exchange]]:
        """A new scene with ``count`` different questions ``Is this true? …`` about it, fewer if too few are known.

        Raises ``ValueError`` when the grammar reads no sentence at all.
        """
        if not self._kinds:
            raise ValueError("found no sentence that the grammar reads, expected NLVR's training sentences")
        while True:
            kind = self.rng.choice(self._kinds)
            if kind not in self._pools:
                self._pools[kind] = [self._fresh(kind) for _ in range(POOL)]
            sentence, node = self.rng.choice(self.written.readable[kind])
            test, wanted, pool = meaning(node), self.rng.random() < 0.5, self._pools[kind]
            question = f"Is this true? {sentence}"
            for place in self.rng.sample(range(POOL), TRIES):
                scene, world, asked = pool[place]
                if bool(test(world)) == wanted and all(question != earlier for earlier, _ in asked):
                    asked.append((question, "yes" if wanted else "no"))
                    if len(asked) >= min(count, self._distinct[kind]):
                        pool[place] = self._fresh(kind)
                        return scene, asked
                    break

    def _fresh(self, kind: str) -> tuple[Scene, Any, list[Exchange]]:
        scene = sample_scene(self.rng, kind)
        return scene, view(scene), []
