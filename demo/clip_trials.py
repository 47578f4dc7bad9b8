"""What `evaluate_clips.py` and `gallery.py` have an assistant animate, all of it held out, and which facts of it hold."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from clip_parser import ParsedClip, parse_clip
from drawing_trials import BATCH, replies, user
from moving import Motion, motions, moving
from moving_talk import request

from mmllm.generators.base import Clip

NOTHING = ParsedClip("", "", "", "unclear", "", False)  # what is read where there is no clip: no fact holds


@dataclass(frozen=True)
class Animated:
    """A reply to ``request``, which asks for ``motion``: its words, and its clip if it has just one."""

    motion: Motion
    request: str
    words: str
    clip: Clip | None

    @cached_property
    def parsed(self) -> ParsedClip:
        return read(self.clip)

    @cached_property
    def facts(self) -> dict[str, bool]:
        return facts(self.motion, self.parsed)


def held_out_motions(count: int, seed: int) -> list[Motion]:
    """The first ``count`` motions of the test, always in the same order under a seed."""
    rng = random.Random(f"clips-test-{seed}")
    return [motions(rng, test=True) for _ in range(count)]


def read(clip: Clip | None) -> ParsedClip:
    return NOTHING if clip is None else parse_clip([np.asarray(frame.convert("RGB")) for frame in clip.frames])


def facts(motion: Motion, parsed: ParsedClip) -> dict[str, bool]:
    """Which of the motion's facts hold in a clip; only those that the motion has."""
    found = {
        "direction": parsed.move == motion.move,
        "shape": parsed.shape == motion.shape,
        "color": parsed.color == motion.color,
        "background": parsed.background == motion.background,
        "alone": parsed.alone,
    }
    if motion.pace:
        found["pace"] = parsed.pace == motion.pace
    return {**found, "direction and shape": found["direction"] and found["shape"], "all": all(found.values())}


def read_back(parsed: ParsedClip) -> str:
    """What a clip shows, in words."""
    if parsed == NOTHING:
        return "no clip"
    if not parsed.shape:
        return f"no shape in some frames; {parsed.background} background"
    move = moving(parsed.move, parsed.pace)
    words = f"{parsed.color} {parsed.shape}, {'no clear move' if move == 'unclear' else move}"
    return f"{words}; {parsed.background} background" + ("" if parsed.alone else "; not one shape in every frame")


def clip_of(reply: Any) -> Clip | None:
    """The clip of a reply that has just one medium."""
    return reply.media[0].result() if [media.type for media in reply.media] == ["video"] else None


def animated(assistant: Any, wanted: list[Motion], seed: int, batch: int = BATCH) -> list[Animated]:
    """The motions asked for in wordings that no training has."""
    rng = random.Random(f"clips-words-{seed}")
    asked = [request(motion, rng, unseen=True)[0] for motion in wanted]
    found = replies(assistant, [[user(text)] for text in asked], seed, batch)
    return [Animated(w, t, str(r), clip_of(r)) for w, t, r in zip(wanted, asked, found, strict=True)]
