"""Questions about two pictures, or about a picture and a sound together, with exact answers.

Answers: `the first`, `the second`, `the same` (comparisons), `yes` / `no`, and numbers in words.
"""

from __future__ import annotations

import random

from scene_model import COLORS, SHAPES, Scene
from scene_text import NUMBERS, plural
from sounds import COUNTED, Sound

Question = tuple[str, str, str]  # type, question, answer
_ITEMS = "shapes"
_HEARD = {
    "beeps": "a beep", "sweep": "a sweep", "noise": "noise", "siren": "a siren", "clicks": "clicks", "chirps": "chirps",
    "drum": "a drum", "bell": "a bell", "buzz": "a buzz",
}  # fmt: skip


def _topic(scenes: tuple[Scene, ...], rng: random.Random) -> str:
    """Something to count: all shapes, a colour or a shape; mostly one that is really there."""
    seen = [word for scene in scenes for item in scene.items for word in (item.color, item.shape)]
    roll = rng.random()
    if roll < 0.2:
        return _ITEMS
    return rng.choice(seen) if roll < 0.85 else rng.choice((*SHAPES, *COLORS))


def _count(scene: Scene, topic: str) -> int:
    return sum(topic in (item.color, item.shape, _ITEMS) for item in scene.items)


def _many(topic: str) -> str:
    """The topic in the plural: `circles`, `red shapes`, `shapes`."""
    if topic == _ITEMS:
        return topic
    return f"{topic} shapes" if topic in COLORS else plural(2, topic).split(" ", 1)[1]


def _single(topic: str) -> str:
    if topic == _ITEMS:
        return "a shape"
    noun = f"{topic} shape" if topic in COLORS else topic
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def two_picture_questions(first: Scene, second: Scene, rng: random.Random, count: int) -> list[Question]:
    """`count` different questions about two pictures, (type, question, answer)."""
    found: dict[str, Question] = {}
    for _ in range(4 * count):
        topic = _topic((first, second), rng)
        a, b = _count(first, topic), _count(second, topic)
        kind = rng.choice(("more", "more", "fewer", "sum", "both", "which", "same", "each"))
        if kind in ("more", "fewer"):
            answer = "the same" if a == b else "the first" if (a > b) == (kind == "more") else "the second"
            question = f"Which picture has {kind} {_many(topic)}?"
        elif kind == "sum":
            question, answer = f"How many {_many(topic)} are there in both pictures together?", NUMBERS[min(a + b, 24)]
            if a + b > 12:
                continue
        elif kind == "both":
            question, answer = f"Do both pictures show {_single(topic)}?", "yes" if a and b else "no"
        elif kind == "which":
            if bool(a) == bool(b):
                continue
            question, answer = f"Which picture shows {_single(topic)}?", "the first" if a else "the second"
        elif kind == "same":
            question = f"Do both pictures have the same number of {_many(topic)}?"
            answer = "yes" if a == b else "no"
        else:
            which, number = rng.choice((("first", a), ("second", b)))
            question, answer = f"How many {_many(topic)} are there in the {which} picture?", NUMBERS[number]
        found[question] = (f"two-pictures/{kind}", question, answer)
    return list(found.values())[:count]


def picture_sound_questions(scene: Scene, sound: Sound, rng: random.Random, count: int) -> list[Question]:
    """`count` different questions about a picture and a sound together, (type, question, answer)."""
    found: dict[str, Question] = {}
    for _ in range(4 * count):
        topic = _topic((scene,), rng)
        shown, kind = _count(scene, topic), rng.choice(("and", "more", "equal"))
        if kind == "and" or sound.kind not in COUNTED:
            heard = sound.kind if sound.kind in _HEARD and rng.random() < 0.6 else rng.choice(tuple(_HEARD))
            if sound.kind == "sequence":  # its parts have names of their own
                continue
            question = f"Do you see {_single(topic)} and hear {_HEARD[heard]}?"
            found[question] = ("picture+sound/and", question, "yes" if shown and heard == sound.kind else "no")
            continue
        noise = "beeps" if sound.kind == "beeps" else "drum hits"
        if kind == "more":
            question, right = f"Are there more {_many(topic)} than {noise}?", shown > sound.count
        else:
            question, right = f"Are there as many {_many(topic)} as {noise}?", shown == sound.count
        found[question] = (f"picture+sound/{kind}", question, "yes" if right else "no")
    return list(found.values())[:count]
