"""What `evaluate_sounds.py` and `gallery.py` ask an assistant to let be heard, and what a judge hears in it.

Which wishes are held out from every training, `sound_wishes.test_wish` says; the wordings of all requests are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import soxr
from drawing_trials import BATCH, replies, user
from sound_judge import Judge, asked_for, heard_in, right
from sound_talk import request
from sound_wishes import FACTS, SoundWish, test_wish
from sounds import SAMPLE_RATE

from mmllm.generators.base import Sound

NOTHING = {name: "" for name, _ in FACTS}  # what is heard where there is no sound: no wish is fulfilled


@dataclass(frozen=True)
class Played:
    """A reply to ``request``, which asks for ``wish``: its words, its sound if it has just one, and what a judge ``heard``
    in it, None without a judge.
    """

    wish: SoundWish
    request: str
    words: str
    sound: Sound | None
    heard: dict[str, str] | None = None

    @cached_property
    def facts(self) -> dict[str, bool]:
        """Those of `facts`. Needs a judge."""
        if self.heard is None:
            raise ValueError("nothing is known of a sound that no judge has heard")
        return facts(self.wish, self.heard)

    @cached_property
    def wrong(self) -> str:
        """What is wrong with it, as far as is known; "" when nothing is."""
        if self.sound is None:
            return "no sound"
        return "" if self.heard is None else wrong(self.wish, self.heard)


def held_out_sounds(count: int, seed: int) -> list[SoundWish]:
    """The first ``count`` wishes of the test, always in the same order under a seed."""
    rng = random.Random(f"sounds-test-{seed}")
    return [test_wish(rng) for _ in range(count)]


def sound_of(reply: Any) -> Sound | None:
    """The sound of a reply that has just one medium."""
    return reply.media[0].result() if [media.type for media in reply.media] == ["audio"] else None


def at_rate(sound: Sound, rate: int = SAMPLE_RATE) -> Sound:
    """The sound at another sampling rate."""
    if sound.sample_rate == rate:
        return sound
    return Sound(soxr.resample(sound.samples, sound.sample_rate, rate).astype(np.float32), rate)


def hear(judge: Judge, sounds: Sequence[Sound | None]) -> list[dict[str, str]]:
    """What is heard in each, NOTHING where there is no sound."""
    found = iter(heard_in(judge, [at_rate(sound).samples for sound in sounds if sound is not None]))
    return [NOTHING if sound is None else next(found) for sound in sounds]


def played(
    assistant: Any, wanted: list[SoundWish], seed: int, judge: Judge | None = None, batch: int = BATCH
) -> list[Played]:
    """The wishes asked for in wordings that no training has."""
    rng = random.Random(f"sounds-words-{seed}")
    asked = [request(wish, rng, unseen=True)[0] for wish in wanted]
    found = replies(assistant, [[user(text)] for text in asked], seed, batch)
    sounds = [sound_of(reply) for reply in found]
    heard = hear(judge, sounds) if judge else [None] * len(sounds)
    return [Played(w, t, str(r), s, h) for w, t, r, s, h in zip(wanted, asked, found, sounds, heard, strict=True)]


def facts(wish: SoundWish, heard: dict[str, str]) -> dict[str, bool]:
    """Those of `sound_judge.right`, and a kind of sound also under its own name."""
    found = right(wish, heard)
    return found if wish.sound is None else {**found, wish.sound.kind: found["kind"]}


def wrong(wish: SoundWish, heard: dict[str, str]) -> str:
    """The names of what is not heard as asked for, "" when all is."""
    return ", ".join(name for name, value in asked_for(wish).items() if heard[name] != value)
