"""Requests of all kinds, to see whether an assistant answers each of them in the right modality."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import dialogues
import drawing_talk
import drawings
import moving
import moving_talk
import sound_talk
import sound_wishes
import text_worlds
from drawing_trials import replies, user

Asked = tuple[str, list[str]]  # a request, and the modalities of what the reply is to make


def drawing(rng: random.Random, unseen: bool) -> Asked:
    return drawing_talk.request(drawings.wishes(rng, test=True), rng, unseen)[0], ["image"]


def sounding(rng: random.Random, unseen: bool) -> Asked:
    return sound_talk.request(sound_wishes.test_wish(rng), rng, unseen)[0], ["audio"]


def moving_clip(rng: random.Random, unseen: bool) -> Asked:
    return moving_talk.request(moving.motions(rng, test=True), rng, unseen)[0], ["video"]


def words(rng: random.Random, unseen: bool) -> Asked:
    """Small talk, or a question about a picture or a sound that is not there."""
    if rng.random() < 0.5:
        return dialogues.simple_exchange(rng)[0], []
    talk = text_worlds.question_without_media(rng, [])
    return [turn["content"] for turn in talk if turn["role"] == "user"][-1], []


def drawing_and_sound(rng: random.Random, unseen: bool) -> Asked:
    first, second = drawing(rng, unseen)[0], sounding(rng, unseen)[0]
    both = rng.choice(sound_talk.BOTH).format(first.rstrip(".?!") + ".", second[0].lower() + second[1:])
    return both, ["image", "audio"]


# What is asked of an assistant that makes all of these modalities, and how often beside the others.
REQUESTS: tuple[tuple[tuple[str, ...], Callable[[random.Random, bool], Asked], float], ...] = (
    ((), words, 1.0),
    (("image",), drawing, 0.5),
    (("audio",), sounding, 0.5),
    (("video",), moving_clip, 0.5),
    (("image", "audio"), drawing_and_sound, 0.1),
)


def mixed_requests(makes: tuple[str, ...], count: int, seed: int) -> list[Asked]:
    """Requests for text and for every modality in ``makes``, half of those for media in wordings that no training has."""
    rng = random.Random(f"decisions-{seed}")
    kinds = [(ask, often) for needed, ask, often in REQUESTS if set(needed) <= set(makes)]
    chosen = rng.choices([ask for ask, _ in kinds], [often for _, often in kinds], k=count)
    return [ask(rng, rng.random() < 0.5) for ask in chosen]


def decisions(assistant: Any, count: int, seed: int) -> tuple[list[dict[str, bool]], list[str]]:
    """For each of ``count`` mixed requests whether the reply makes just what it is to make, under the name of its
    modalities and as ``right modality``; and the texts that look like signal tokens.
    """
    asked = mixed_requests(tuple(assistant.makes), count, seed)
    found = replies(assistant, [[user(text)] for text, _ in asked], seed)
    results = []
    for (_, wanted), reply in zip(asked, found, strict=True):
        right = [media.type for media in reply.media] == wanted
        results.append({"right modality": right, " and ".join(wanted) or "text alone": right})
    signs = ("<", *(f"{modality}:" for modality in assistant.makes))
    return results, [str(reply) for reply in found if any(sign in reply for sign in signs)]
