"""What `evaluate_drawing.py` and `gallery.py` have an assistant do: draw, change, describe. All of it held out."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from drawing_facts import facts, read
from drawing_talk import edit, request
from drawings import Wish, caption, wishes
from picture_parser import Parsed
from PIL import Image

BATCH = 25
DESCRIBE = "Describe the picture."
TRIES = 100  # to find a change of a wish that leads to another wish of the test


@dataclass(frozen=True)
class Drawn:
    """A reply to ``request``, which asks for ``wish``: its words, and its picture if it has just one."""

    wish: Wish
    request: str
    words: str
    picture: Image.Image | None

    @cached_property
    def parsed(self) -> Parsed:
        return read(self.picture)

    @cached_property
    def facts(self) -> dict[str, bool]:
        return facts(self.wish, self.parsed)


@dataclass(frozen=True)
class Changed:
    """A drawing, and what was made of it in the next turn."""

    before: Drawn
    after: Drawn


def held_out_wishes(count: int, seed: int) -> list[Wish]:
    """The first ``count`` wishes of the test, always in the same order under a seed."""
    rng = random.Random(f"drawing-test-{seed}")
    return [wishes(rng, test=True) for _ in range(count)]


def ceiling(generator: Any, wanted: list[Wish], seed: int) -> list[Image.Image]:
    """The generator's pictures from its own text condition; picture i has the noise of ``seed + i``."""
    return from_captions(generator, [caption(wish) for wish in wanted], seed)


def from_captions(generator: Any, captions: list[str], seed: int) -> list[Any]:
    """A generator's media from its own text condition; medium i has the noise of ``seed + i``."""
    media: list[Any] = []
    for start in range(0, len(captions), BATCH):
        condition = generator.encode_text(captions[start : start + BATCH])
        media += generator.generate(condition, generator.sampling.with_(seed=seed + start))
    return media


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def replies(assistant: Any, asked: list[list[dict[str, Any]]], seed: int, batch: int = BATCH) -> list[Any]:
    """The assistant's replies to conversations; with a ``batch`` of one, picture i has the noise of ``seed + i``."""
    found: list[Any] = []
    for start in range(0, len(asked), batch):
        found += assistant.generate(asked[start : start + batch], max_new_tokens=160, seed=seed + start)
    return found


def picture_of(reply: Any) -> Image.Image | None:
    """The picture of a reply that has just one medium."""
    if [media.type for media in reply.media] != ["image"]:
        return None
    made: Image.Image = reply.media[0].result().convert("RGB")
    return made


def drawn(assistant: Any, wanted: list[Wish], seed: int, batch: int = BATCH) -> list[Drawn]:
    """The wishes asked for in wordings that no training has."""
    rng = random.Random(f"drawing-words-{seed}")
    asked = [request(wish, rng, unseen=True)[0] for wish in wanted]
    found = replies(assistant, [[user(text)] for text in asked], seed, batch)
    return [Drawn(w, t, str(r), picture_of(r)) for w, t, r in zip(wanted, asked, found, strict=True)]


def changed(assistant: Any, first: list[Drawn], seed: int, folder: Path, batch: int = BATCH) -> list[Changed]:
    """A change asked for after each drawing, in the same conversation, to a wish that is held out too.

    Drawings without a picture and wishes that no change was found for are left out. The pictures go to ``folder``, from
    where the assistant sees them.
    """
    rng = random.Random(f"drawing-changes-{seed}")
    asked, before, after = [], [], []
    folder.mkdir(parents=True, exist_ok=True)
    for index, one in enumerate(first):
        change = next(filter(None, (edit(one.wish, rng, test=True) for _ in range(TRIES))), None)
        if one.picture is None or change is None:
            continue
        path = folder / f"{index:04d}.png"
        one.picture.save(path)
        shown = [{"type": "text", "text": one.words}, {"type": "image", "path": str(path)}]
        asked.append([user(one.request), {"role": "assistant", "content": shown}, user(change[0])])
        before.append(one)
        after.append(change)
    found = replies(assistant, asked, seed, batch)
    return [
        Changed(one, Drawn(wish, text, str(reply), picture_of(reply)))
        for one, (text, wish), reply in zip(before, after, found, strict=True)
    ]


def described(assistant: Any, pictures: list[Image.Image], folder: Path) -> list[str]:
    """The assistant's descriptions of pictures that it is shown, each in a conversation of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = []
    for index, picture in enumerate(pictures):
        path = folder / f"{index:04d}.png"
        picture.save(path)
        asked.append([user([{"type": "image", "path": str(path)}, {"type": "text", "text": DESCRIBE}])])
    return [str(reply) for reply in replies(assistant, asked, 0)]


def told_kinds(description: str) -> Counter[tuple[str, str]]:
    """The colours and shapes in a description: "two items: big red circle left; small blue star top"."""
    words = [item.split() for item in description.rstrip(".").partition(": ")[2].split("; ")]
    return Counter((item[1], item[2]) for item in words if len(item) > 2)
