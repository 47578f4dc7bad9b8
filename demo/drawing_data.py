"""Training dialogues in which the assistant draws, sees drawings, and both: rows of messages with their pictures."""

from __future__ import annotations

import random
from typing import Any

import text_worlds
from dialogues import system_prompt, vary
from drawing_talk import Turn, changing_turns, drawing_turns, edit, reply
from drawings import Group, Wish, caption, held_out, place_items, wishes
from drills import tally
from real_sets import Part, Row, Writer, conversation
from scene_model import COLORS, SHAPES, Scene
from scenes import describe, render
from sounds import Sound, pick, sample_sound, synthesize

DESCRIBE_OWN = ("What did you draw?", "Describe your picture.", "What is in your picture?", "Tell me what you drew.")
SAME = ("Draw this again.", "Draw the same picture.", "Copy this picture.", "Make a picture like this.")
AS_MANY = (
    "Draw as many {} as you hear {}.", "Listen, and draw one {} for each of the {}.", "How many {1} do you hear? Draw as many {0}.",
)  # fmt: skip


def answer(text: str, wish: Wish, picture: Part) -> dict[str, Any]:
    """An assistant's message that says what it draws and shows it."""
    return {
        "role": "assistant",
        "content": [{"type": "text", "text": text}, {**picture, "caption": caption(wish)}],
    }


def spoken(turns: list[Turn], rng: random.Random, writer: Writer) -> tuple[list[dict[str, Any]], Scene | None]:
    """Turns as messages, with a picture for every wish; and the last picture's scene."""
    messages: list[dict[str, Any]] = list(system_prompt(rng, 0.15))
    scene = None
    for question, text, wish in turns:
        messages.append({"role": "user", "content": question})
        if wish is None:
            messages.append({"role": "assistant", "content": text})
        else:
            scene = place_items(wish, rng)
            messages.append(answer(text, wish, writer.image(render(scene))))
    return messages, scene


def drawing(rng: random.Random, writer: Writer) -> Row:
    """Requests, changes, and questions about what was drawn."""
    turns = drawing_turns(rng)
    messages, scene = spoken(turns, rng, writer)
    if scene is not None and turns[-1][2] is not None and rng.random() < 0.4:
        asked = text_worlds.picture_exchanges(scene, rng, rng.randint(1, 4))
        if rng.random() < 0.5:
            asked.insert(0, (rng.choice(DESCRIBE_OWN), describe(scene)))
        for question, text in asked:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return {"messages": messages}


def in_captions(turns: list[Turn], rng: random.Random) -> Row:
    """Turns without files: captions alone, which is all that the `condition` objective needs."""
    messages: list[dict[str, Any]] = list(system_prompt(rng, 0.05))
    for question, text, wish in turns:
        messages.append({"role": "user", "content": question})
        drawn = answer(text, wish, {"type": "image"}) if wish else {"role": "assistant", "content": text}
        messages.append(drawn)
    return {"messages": messages}


def drawing_words(rng: random.Random, writer: Writer) -> Row:
    """Requests, changes and questions, in captions."""
    return in_captions(drawing_turns(rng), rng)


def drawing_changes(rng: random.Random, writer: Writer) -> Row:
    """A request and one change after another, in captions."""
    return in_captions(changing_turns(rng), rng)


def seen_drawing(rng: random.Random, writer: Writer) -> Row:
    """A drawing from the user, with questions about it as about any picture."""
    scene = place_items(wishes(rng, test=False), rng)
    exchanges = text_worlds.picture_exchanges(scene, rng, rng.randint(4, 7))
    exchanges += [tally([scene], rng), (vary(rng.choice(text_worlds.DESCRIBE_PICTURE), rng, 0.15), describe(scene))]
    rng.shuffle(exchanges)
    return {"messages": conversation([writer.image(render(scene))], exchanges, rng)}


def redrawn(rng: random.Random, writer: Writer) -> Row:
    """A drawing from the user that the assistant copies or changes. Places are left out: what is copied are the kinds."""
    while True:
        wish = wishes(rng, test=False)
        if wish.relation or any(group.place for group in wish.groups):
            continue
        changed = edit(wish, rng) if rng.random() < 0.6 else (rng.choice(SAME), wish)
        if changed is not None:
            break
    shown = writer.image(render(place_items(wish, rng)))
    question, after = changed
    content = [shown, {"type": "text", "text": vary(question, rng, 0.2)}]
    made = writer.image(render(place_items(after, rng)))
    messages = [*system_prompt(rng, 0.15), {"role": "user", "content": content}, answer(reply(after), after, made)]
    return {"messages": messages}


def drawing_by_ear(rng: random.Random, writer: Writer) -> Row:
    """A sound with something to count in it, and as many shapes to draw."""
    numbers = text_worlds.numpy_rng(rng)
    sound = sample_sound(numbers, pick(numbers, ["beeps", "drum"]))
    while held_out(wish := counted_wish(sound, rng)):
        pass
    group = wish.groups[0]
    nouns = Group(2, group.color, group.shape).words().split(maxsplit=1)[1]
    noise = "beeps" if sound.kind == "beeps" else "drum hits"
    form = rng.choice(AS_MANY)
    text = form.format(nouns if "one {}" not in form else f"{group.color} {group.shape}", noise)
    content = [writer.audio(synthesize(sound, numbers)), {"type": "text", "text": text}]
    made = writer.image(render(place_items(wish, rng)))
    return {"messages": [{"role": "user", "content": content}, answer(reply(wish), wish, made)]}


def counted_wish(sound: Sound, rng: random.Random) -> Wish:
    """As many shapes of one kind as there are beeps or hits; both go up to six."""
    color = rng.choice([name for name in COLORS if name != "white"])
    return Wish((Group(sound.count, color, rng.choice(SHAPES)),))
