"""Scenes and sounds put into words, with questions about them: what the language model learns to reason on.

A complete description stands where the picture or the sound will stand later; questions and answers have exactly the
wording that the assistant meets with real pictures and sounds.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from dialogues import (
    INTENTS,
    NO_PICTURE,
    NO_SOUND,
    Exchange,
    Message,
    small_talk,
    split_phrasings,
    to_messages,
    vary,
)
from drills import dense_drill, drill, tally, thinned
from joint_questions import picture_sound_questions, two_picture_questions
from real_wordings import WordedScenes
from scene_model import BOX_NAMES, SHAPES, Item, gap
from scenes import Scene, describe, part_captions, questions, sample_scene, size_name, walls
from sounds import Sound, sample_sound
from sounds import questions as sound_questions
from statements import grounded_statement, statement

from mmllm.encoders.vit import fit_grid

PATCHES = (
    "\x00"  # encloses the patches in a message: `train_llm.encode` turns each line between two of them into one vector
)

DESCRIBE_PICTURE = (
    "Describe the picture.", "What do you see?", "What is in the picture?", "Describe the image.", "What does the picture show?",
    "Tell me what you see.", "Describe what you see.", "What is in this image?",
)  # fmt: skip
DESCRIBE_SOUND = (
    "Describe the sound.",
    "Describe what you hear.",
    "What does the recording contain?",
    "Tell me what you hear.",
)
# Things that never appear in a scene: the answer to "Is there a ...?" is "no", and to anything else that it is not there.
ABSENT = [
    "cat",
    "dog",
    "person",
    "car",
    "tree",
    "house",
    "bird",
    "horse",
    "flower",
    "boat",
    "child",
    "woman",
    "man",
    "fish",
    "apple",
    "table",
    "chair",
    "phone",
    "book",
    "cow",
    "bike",
    "cup",
    "ball",
    "hat",
]
_ABSENT_FORMS = (
    "What is the {x} doing?", "What colour is the {x}?", "Where is the {x}?", "How old is the {x}?", "What is the {x} called?",
    "Describe the {x}.", "How big is the {x}?",
)  # fmt: skip


def describe_sound(sound: Sound) -> str:
    """All facts about a sound in a few words: what the language model reads instead of hearing."""
    if sound.kind == "sequence":
        return f"first {sound.parts[0]}, then {sound.parts[1]}"
    counts = ("", "one", "two", "three", "four", "five", "six")
    facts = (counts[sound.count], sound.loudness, sound.duration, sound.speed, sound.pitch, sound.direction, sound.kind)
    return " ".join(fact for fact in facts if fact)


def patch_words(scene: Scene, rows: int, cols: int) -> list[str]:
    """The scene as a grid of patches, row by row, each in words without order: what its features say later.

    Every patch names its place (a letter for the column, one for the row, the box it lies in); a patch that holds the
    centre of a shape adds size, colour and shape, the walls it touches, and whether it touches another shape.
    """
    words: list[str] = []
    for row in range(rows):
        for col in range(cols):
            x, y = (col + 0.5) * scene.width / cols, (row + 0.5) * scene.height / rows
            patch = f"{chr(97 + int(20 * x / scene.width))} {chr(65 + int(10 * y / scene.height))}"
            if scene.kind != "canvas":
                inside = [
                    name
                    for name, (left, _, width, _) in zip(BOX_NAMES, scene.boxes, strict=True)
                    if left <= x <= left + width
                ]
                patch += "".join(f" {name}" for name in inside)
            words.append(patch)
    for item in scene.items:
        row = min(rows - 1, int((item.y + item.size / 2) / scene.height * rows))
        col = min(cols - 1, int((item.x + item.size / 2) / scene.width * cols))
        words[row * cols + col] += f" {size_name(scene, item)} {item.color} {item.shape}{_contacts(scene, item)}"
    return words


def _contacts(scene: Scene, item: Item) -> str:
    if scene.kind != "scatter":
        return ""
    near = any(other is not item and gap(item, other) <= 1 for other in scene.items)
    return "".join(f" {side} wall" for side in walls(scene, item)) + (" touching" if near else "")


def numpy_rng(rng: random.Random) -> np.random.Generator:
    """A numpy generator seeded from `rng`, for the functions that want one."""
    return np.random.default_rng(rng.getrandbits(64))


def statement_exchange(scene: Scene, rng: random.Random) -> Exchange:
    """`Is this true? …` with `yes` or `no`."""
    text, truth = statement(scene, rng)
    return f"Is this true? {text}", "yes" if truth else "no"


def scene_and_statement(rng: random.Random, kind: str) -> tuple[Scene, list[Exchange]]:
    """A scene; a box scene comes with one statement that was there first, so that its words say nothing of its truth."""
    if kind == "canvas":
        return sample_scene(rng, kind), []
    scene, text, truth = grounded_statement(rng, kind)
    return scene, [(f"Is this true? {text}", "yes" if truth else "no")]


def absent_exchange(rng: random.Random) -> Exchange:
    """A question about something that no picture shows."""
    thing = rng.choice(ABSENT)
    if rng.random() < 0.4:
        return rng.choice(
            (f"Is there a {thing}?", f"Do you see a {thing}?", f"Is there a {thing} in the picture?")
        ), "no"
    return rng.choice(_ABSENT_FORMS).format(x=thing), f"I can't see a {thing}."


def part_exchanges(scene: Scene, rng: random.Random, count: int) -> list[Exchange]:
    """Exact captions of single parts, asked for by their first words: "left box kinds:" -> "small blue circle, …"."""
    captions = (text.split(": ", 1) for text in part_captions(scene, rng, count))
    return list({f"{part}:": words for part, words in captions}.items())


def picture_exchanges(scene: Scene, rng: random.Random, count: int, statements: float = 0.5) -> list[Exchange]:
    """`count` different questions about a scene with their answers.

    `statements` is the share of `Is this true?` questions about box scenes; they are not asked about a canvas.
    """
    share = statements if scene.kind != "canvas" else 0.0
    num_statements = sum(rng.random() < share for _ in range(count))
    exchanges = [
        (vary(question, rng, 0.15), reply) for _, question, reply in questions(scene, rng, count - num_statements)
    ]
    exchanges += [statement_exchange(scene, rng) for _ in range(num_statements)]
    if rng.random() < 0.08:
        exchanges.append(absent_exchange(rng))
    if rng.random() < 0.06:
        exchanges.append((rng.choice((*DESCRIBE_SOUND, "Which digit is spoken?", "What do you hear?")), NO_SOUND))
    rng.shuffle(exchanges)
    return list(dict(exchanges).items())


def two_scenes(rng: random.Random) -> tuple[Scene, Scene]:
    """What two pictures in one question show: mostly canvases."""
    kinds = ("canvas", "canvas", "canvas", "scatter") if rng.random() < 0.8 else ("tower", "scatter", "canvas")
    return sample_scene(rng, rng.choice(kinds)), sample_scene(rng, rng.choice(kinds))


def sound_exchanges(sound: Sound, rng: random.Random, count: int) -> list[Exchange]:
    """Up to `count` different questions about a sound with their answers."""
    exchanges = [
        (vary(question, rng, 0.15), reply) for _, question, reply in sound_questions(sound, numpy_rng(rng), count)
    ]
    if rng.random() < 0.06:
        exchanges.append((rng.choice(DESCRIBE_PICTURE), NO_PICTURE))
        rng.shuffle(exchanges)
    return list(dict(exchanges).items())


def scene_and_sound_exchanges(scene: Scene, sound: Sound, rng: random.Random) -> list[Exchange]:
    """Questions about a picture and a sound, some about both at once."""
    asked = picture_sound_questions(scene, sound, rng, rng.randint(3, 6))
    exchanges = [(question, reply) for _, question, reply in asked]
    exchanges += picture_exchanges(scene, rng, 2, statements=0.2) + sound_exchanges(sound, rng, 2)
    exchanges = [exchange for exchange in exchanges if exchange[1] not in (NO_PICTURE, NO_SOUND)]
    rng.shuffle(exchanges)
    return list(dict(exchanges).items())


def with_context(context: str, exchanges: list[Exchange], rng: random.Random) -> list[Message]:
    """The exchanges as messages, `context` put before the first question (where a picture or sound will be)."""
    messages = to_messages(exchanges, rng, system_chance=0.15)
    first = next(message for message in messages if message["role"] == "user")
    first["content"] = f"{context}{first['content']}"
    return messages


def as_context(scene: Scene, rng: random.Random, described: float = 0.15) -> str:
    """The scene as patches (between two `PATCHES`, one line per patch) or, less often, as a plain description.

    Empty patches say nothing; mostly they are left out, which makes the texts short.
    """
    if rng.random() < described:
        return describe(scene) + "\n"
    words = patch_words(scene, *fit_grid(scene.width, scene.height, 20, 100))
    if rng.random() < 0.85:
        words = [patch for patch in words if any(f" {shape}" in patch for shape in SHAPES)]
    return PATCHES + "\n".join(words) + PATCHES + "\n"


def scene_dialogue(rng: random.Random, ease: float = 0.0, worded: WordedScenes | None = None) -> list[Message]:
    """A scene in words and 10 to 18 questions about it, after some exact captions of its parts.

    With `ease` from 1 down to 0, scenes have few items at first and all of them in the end. `worded` gives some, with
    statements by people.
    """
    kind = rng.choices(("canvas", "scatter", "tower"), (3, 5, 2))[0]
    if rng.random() < ease:
        scene, exchanges = thinned(sample_scene(rng, kind), rng, 1 + round(7 * (1 - ease))), []
    elif worded and kind != "canvas" and rng.random() < 0.6:
        scene, exchanges = worded.invented(6) if rng.random() < 0.6 else worded.original()
    else:
        scene, exchanges = scene_and_statement(rng, kind)
    exchanges += picture_exchanges(scene, rng, rng.randint(10, 18), statements=0.5 * (1 - ease))
    if rng.random() < 0.5:
        exchanges = part_exchanges(scene, rng, rng.randint(2, 6)) + exchanges
    tallies = [tally([scene], rng) for _ in range(rng.randint(0, 3))]
    exchanges = list(dict(tallies + exchanges).items())
    if rng.random() < 0.05:
        exchanges += small_talk(rng)
    return with_context(as_context(scene, rng), exchanges, rng)


def joint_dialogue(rng: random.Random, ease: float = 0.0) -> list[Message]:
    """Two scenes, or a scene and a sound, in words, and questions about both; `ease` as in `scene_dialogue`."""
    first, second = two_scenes(rng)
    if rng.random() < ease:
        first, second = (thinned(scene, rng, 1 + round(7 * (1 - ease))) for scene in (first, second))
    if rng.random() < 0.75:
        contexts = [as_context(scene, rng, 0.0) for scene in (first, second)]
        asked = two_picture_questions(first, second, rng, rng.randint(8, 14))
        exchanges = [tally([first, second], rng) for _ in range(rng.randint(0, 3))]
        exchanges += [(question, reply) for _, question, reply in asked]
        return with_context("".join(contexts), list(dict(exchanges).items()), rng)
    sound = sample_sound(numpy_rng(rng))
    contexts = [as_context(first, rng), describe_sound(sound) + "\n"]
    rng.shuffle(contexts)
    return with_context("".join(contexts), scene_and_sound_exchanges(first, sound, rng), rng)


def drill_dialogue(rng: random.Random, ease: float) -> list[Message]:
    """A drill, its items as patches or as plain words."""
    items, exchanges = rng.choice((drill, dense_drill, dense_drill))(rng, 6 + round(8 * (1 - ease)))
    context = PATCHES + "\n".join(items) + PATCHES + "\n" if rng.random() < 0.6 else f"Items: {', '.join(items)}\n"
    return with_context(context, exchanges, rng)


def sound_dialogue(rng: random.Random) -> list[Message]:
    """A sound in words and the questions about it."""
    sound = sample_sound(numpy_rng(rng))
    exchanges = sound_exchanges(sound, rng, 5)
    if rng.random() < 0.05:
        exchanges += small_talk(rng)
    return with_context(describe_sound(sound) + "\n", exchanges, rng)


def question_without_media(rng: random.Random, sentences: list[str]) -> list[Message]:
    """A question about a picture or a sound that was never given, and the honest answer."""
    if rng.random() < 0.3:
        sound = sample_sound(numpy_rng(rng))
        question, reply = sound_questions(sound, numpy_rng(rng), 1)[0][1], NO_SOUND
        if rng.random() < 0.3:
            question = rng.choice(split_phrasings(INTENTS["sound_missing"][0], False))
    else:
        scene = sample_scene(rng)
        if sentences and rng.random() < 0.4:
            question, reply = f"Is this true? {rng.choice(sentences)}", NO_PICTURE
        elif scene.kind != "canvas" and rng.random() < 0.6:
            question, reply = statement_exchange(scene, rng)[0], NO_PICTURE
        else:
            question, reply = questions(scene, rng, 1)[0][1], NO_PICTURE
    exchanges: list[Exchange] = small_talk(rng)[:1] if rng.random() < 0.3 else []
    return to_messages([*exchanges, (vary(question, rng, 0.2), reply)], rng)


def probe_questions(rng: random.Random, scenes: int) -> list[tuple[str, list[Message], tuple[str, ...]]]:
    """Single questions for the test: (type, messages that end with the question, acceptable answers)."""
    asked: list[tuple[str, list[Message], tuple[str, ...]]] = []

    def ask(kind: str, context: str, question: str, reply: Any) -> None:
        asked.append((kind, [{"role": "user", "content": context + question}], (reply,)))

    for index in range(scenes):
        scene = sample_scene(rng, ("canvas", "scatter", "tower")[index % 3])
        for kind, question, reply in questions(scene, rng, 4):
            ask(f"{scene.kind}/{kind}", as_context(scene, rng, 0.0), question, reply)
        for _ in range(4 * (scene.kind != "canvas")):
            told, exchanges = scene_and_statement(rng, scene.kind)
            ask(f"{scene.kind}/statement", as_context(told, rng, 0.0), *exchanges[0])
        pair = sample_scene(rng, "canvas"), sample_scene(rng, "canvas")
        for kind, question, reply in two_picture_questions(*pair, rng, 2):
            ask(kind, "".join(as_context(one, rng, 0.0) for one in pair), question, reply)
        sound = sample_sound(numpy_rng(rng))
        for kind, question, reply in sound_questions(sound, numpy_rng(rng), 2):
            ask(f"sound/{kind}", describe_sound(sound) + "\n", question, reply)
    return asked
