"""The gallery's sections about sounds: those asked for, as files and as spectrograms, and failures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from gallery_page import Choice, Page, escape, verdict
from PIL import Image
from sound_judge import BINS, HOP, in_words, load
from sound_trials import Played, at_rate, held_out_sounds, played
from sound_wishes import caption

from mmllm.generators.base import Sound
from mmllm.generators.targets import MelTarget

SUFFIX = ".mp3"  # every browser plays it, and unlike Ogg's its bytes depend on nothing but the sound
QUIETEST, LOUDEST = -9.0, 1.0  # natural logarithms of mel magnitudes that are white and black
FEWEST_FRAMES = 4  # the edges of a spectrogram are mirrored, and need so much sound


@dataclass(frozen=True)
class Shown:
    """What the page shows of one reply. Needs one with a sound."""

    one: Played

    @cached_property
    def file(self) -> Sound:
        assert self.one.sound is not None
        return at_rate(self.one.sound)

    @cached_property
    def picture(self) -> Image.Image:
        return spectrogram(self.file)


def spectrogram(sound: Sound) -> Image.Image:
    """The log-mel spectrogram in grey: time from left to right, HOP samples a pixel; low tones below; black is loud."""
    frames = max(FEWEST_FRAMES, len(sound.samples) // HOP)
    mel = MelTarget(sound.sample_rate, HOP, frames, BINS)(sound.samples)[0].numpy()
    grey = 255 * (1 - np.clip((mel - QUIETEST) / (LOUDEST - QUIETEST), 0, 1))
    return Image.fromarray(grey.T[::-1].astype(np.uint8))


def write(assistant: Any, page: Page, choice: Choice) -> None:
    """All sections about sounds."""
    judge = load(choice.judge) if choice.judge else None
    made = [Shown(one) for one in played(assistant, held_out_sounds(choice.count, choice.seed), choice.seed, judge)]
    page.add("## Sounds")
    asked_for(page, made, choice.shown, judge is not None)
    failures(page, made, choice.shown, judge is not None)


def shown(page: Page, name: str, made: Shown) -> tuple[str, str]:
    """The link to the file, and the spectrogram."""
    if made.one.sound is None:
        return "no sound", ""
    shows = f"Spectrogram of the assistant's sound of {caption(made.one.wish)}"
    link = f"[listen]({page.file(f'{name}{SUFFIX}', made.file)})"
    return link, page.picture(f"{name}.png", made.picture, shows, made.picture.width)


def heard(made: Shown) -> tuple[str, ...]:
    """What the judge heard and what is wrong with it; nothing without a judge."""
    return () if made.one.heard is None else (escape(in_words(made.one.heard)), verdict(made.one.wrong))


def asked_for(page: Page, made: list[Shown], most: int, judged: bool) -> None:
    right = sum(not one.one.wrong for one in made)
    says = (
        f"of all {len(made)}, {right} are what was asked for, as `demo/sound_judge.py` hears them: a classifier of true sounds, "
        "which errs too"
        if judged
        else "nobody judges them here (`--judge`)"
    )
    page.add(
        "### Asked for and played",
        f"The first {min(most, len(made))} of {len(made)} requests; {says}. Three in ten are single digits, which "
        "every training has, in wordings that none has. *Listen* is the sound as a file. Beside it is its "
        "log-mel spectrogram: from left to right, low tones below, black is loud.",
    )
    rows = [
        (escape(one.one.request), *shown(page, f"sound-{number:02d}", one), escape(one.one.words), *heard(one))
        for number, one in enumerate(made[:most], start=1)
    ]
    page.table(
        ("request", "sound", "spectrogram", "its words", *(("what the judge hears", "") if judged else ())), rows
    )


def failures(page: Page, made: list[Shown], most: int, judged: bool) -> None:
    """Without a judge all that can be said is which replies have no sound."""

    def row(number: int, one: Shown) -> tuple[str, ...]:
        return escape(one.one.request), *shown(page, f"sound-failure-{number:02d}", one), *heard(one)

    head = ("request", "sound", "spectrogram", *(("what the judge hears", "") if judged else ()))
    names = ("The judge", "sounds") if judged else ("A look for replies without a sound", "replies")
    page.failures(made, lambda one: one.one.wrong, most, names, head, row)
