"""Training dialogues in which the assistant animates, and draws in between: rows of messages with their clips."""

from __future__ import annotations

import random
from typing import Any

import drawing_data
import drawing_talk
import drawings
from dialogues import system_prompt, vary
from drawings import place_items
from moving import FRAMES_PER_SECOND, Motion, animate, caption, motions
from moving_talk import Turn, moving_turns, reply, request, set_moving, still
from real_sets import Part, Row, Writer
from scenes import render

DRAW_IT = ("Draw it.", "Now draw it.", "Draw a picture of it.", "Only a picture of it, please.", "Now a picture of it.")


def answer(text: str, motion: Motion, clip: Part) -> dict[str, Any]:
    """An assistant's message that says what it animates and shows it."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}, {**clip, "caption": caption(motion)}]}


def said(turns: list[Turn], rng: random.Random, writer: Writer | None) -> list[dict[str, Any]]:
    """Turns as messages, with a clip for every motion: a file, or without a writer its caption alone."""
    messages: list[dict[str, Any]] = []
    for question, text, motion in turns:
        messages.append({"role": "user", "content": question})
        if motion is None:
            messages.append({"role": "assistant", "content": text})
        else:
            clip = writer.video(animate(motion, rng), FRAMES_PER_SECOND) if writer else {"type": "video"}
            messages.append(answer(text, motion, clip))
    return messages


def animation(rng: random.Random, writer: Writer) -> Row:
    """Requests for clips, and changes."""
    return {"messages": [*system_prompt(rng, 0.15), *said(moving_turns(rng), rng, writer)]}


def animation_words(rng: random.Random, writer: Writer) -> Row:
    """Requests and changes without files: captions alone, which is all that the `condition` objective needs."""
    return {"messages": [*system_prompt(rng, 0.05), *said(moving_turns(rng), rng, None)]}


def drawn_and_animated(rng: random.Random, writer: Writer) -> Row:
    """A drawing that is then set in motion."""
    while (changed := set_moving(wish := drawings.wishes(rng, test=False), rng)) is None:
        pass
    question, motion = changed
    asked, text, _ = drawing_talk.request(wish, rng)
    messages: list[dict[str, Any]] = [*system_prompt(rng, 0.1), {"role": "user", "content": asked}]
    messages.append(drawing_data.answer(text, wish, writer.image(render(place_items(wish, rng)))))
    turns: list[Turn] = [(vary(question, rng, 0.2), reply(motion), motion)]
    if rng.random() < 0.4:
        turns += moving_turns(rng, motion)
    return {"messages": messages + said(turns, rng, writer)}


def animated_and_drawn(rng: random.Random, writer: Writer) -> Row:
    """A clip of whose shape a picture is asked for."""
    while drawings.held_out(wish := still(motion := motions(rng, test=False))):
        pass
    messages = [*system_prompt(rng, 0.1), *said([request(motion, rng)], rng, writer)]
    shown = drawing_data.answer(drawing_talk.reply(wish), wish, writer.image(render(place_items(wish, rng))))
    return {"messages": [*messages, {"role": "user", "content": vary(rng.choice(DRAW_IT), rng, 0.2)}, shown]}
