"""Training dialogues in which the assistant is heard: rows of messages. What it lets be heard is given by captions alone,
which is all that the `condition` objective needs.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import drawing_talk
import drawings
import numpy as np
import text_worlds
from audio_windows import DIGITS
from dialogues import system_prompt, vary
from real_sets import Row, Writer, parts_of, read_rows, read_wave
from scene_model import SHAPES
from scenes import render, sample_scene
from sound_talk import BOTH, ECHO, ECHO_SPEECH, SAY_COUNT, reply, request, sound_turns
from sound_wishes import MADE, SoundWish, caption, held_out, wishes
from sounds import SAMPLE_RATE, sample_sound, synthesize


def answer(wish: SoundWish) -> dict[str, Any]:
    """An assistant's message that says what is heard and lets it be heard."""
    parts = [{"type": "text", "text": reply(wish)}, {"type": "audio", "caption": caption(wish)}]
    return {"role": "assistant", "content": parts}


def sounding(rng: random.Random, writer: Writer) -> Row:
    """Requests and changes."""
    messages: list[dict[str, Any]] = list(system_prompt(rng, 0.05))
    for question, text, wish in sound_turns(rng):
        messages.append({"role": "user", "content": question})
        messages.append(answer(wish) if wish else {"role": "assistant", "content": text})
    return {"messages": messages}


def echoed(rng: random.Random, writer: Writer) -> Row:
    """A sound from the user that the assistant imitates; loudness and exact pitch are left out."""
    numbers = text_worlds.numpy_rng(rng)
    while True:
        sound = sample_sound(numbers, rng.choice(MADE))
        if sound.loudness != "quiet" and not held_out(SoundWish(sound=sound)):
            break
    content = [writer.audio(synthesize(sound, numbers)), {"type": "text", "text": vary(rng.choice(ECHO), rng, 0.2)}]
    return {
        "messages": [*system_prompt(rng, 0.1), {"role": "user", "content": content}, answer(SoundWish(sound=sound))]
    }


def said_count(rng: random.Random, writer: Writer) -> Row:
    """A picture in which the assistant counts, aloud."""
    scene = sample_scene(rng, rng.choice(("canvas", "scatter")))
    shape = rng.choice(sorted({item.shape for item in scene.items} or set(SHAPES)))
    count = sum(item.shape == shape for item in scene.items)
    if count >= len(DIGITS):
        return said_count(rng, writer)
    question = vary(rng.choice(SAY_COUNT).format(shape + ("es" if shape == "cross" else "s")), rng, 0.2)
    content = [writer.image(render(scene)), {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, answer(SoundWish((DIGITS[count],)))]}


def drawn_and_said(rng: random.Random, writer: Writer) -> Row:
    """A request for a picture and a sound in one reply, in the order asked for; half the pictures of one kind of shape."""
    sound, few = wishes(rng, test=False), rng.random() < 0.5
    while len((wish := drawings.wishes(rng, test=False)).groups) > 1 and few:
        pass
    asked = [drawing_talk.request(wish, rng)[0], request(sound, rng)[0]]
    made = [
        [{"type": "text", "text": drawing_talk.reply(wish)}, {"type": "image", "caption": drawings.caption(wish)}],
        [{"type": "text", "text": reply(sound)}, {"type": "audio", "caption": caption(sound)}],
    ]
    if rng.random() < 0.35:
        asked, made = asked[::-1], made[::-1]
    question = rng.choice(BOTH).format(asked[0].rstrip(".?!") + ".", asked[1][0].lower() + asked[1][1:])
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": made[0] + made[1]}]}


def echoed_digits(folder: Path, output: Path, rng: random.Random, share: float) -> list[Row]:
    """Recordings of spoken digits that the assistant repeats: a ``share`` of the set's training rows."""
    writer, rows = Writer(output, f"{folder.name}-echoed"), []
    for row in read_rows(folder, "train"):
        if rng.random() >= share:
            continue
        path, _, digit = parts_of(row)
        wave = read_wave(folder / path)
        silence = [np.zeros(int(rng.uniform(0, 0.25) * SAMPLE_RATE), np.float32) for _ in range(2)]
        wave = np.concatenate([silence[0], wave, silence[1]]) * rng.uniform(0.3, 1.0)
        content = [writer.audio(wave), {"type": "text", "text": vary(rng.choice(ECHO_SPEECH), rng, 0.2)}]
        rows.append({"messages": [{"role": "user", "content": content}, answer(SoundWish((digit,)))]})
    return rows
