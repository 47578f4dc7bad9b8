"""What the embedded assistant lets be heard: spoken digits and the sounds of `sounds`, asked for in words.

A `SoundWish` says what must be heard and nothing else; `caption` puts it into words, `perform` makes one of the many sounds
that fulfil it, `SECONDS` long. Digits are spoken by the people of a set of recordings (`Voices`).
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soxr
from audio_windows import DIGITS
from real_sets import parts_of, read_rows, read_wave
from sounds import KINDS, NUMBERS, PARTS, PITCHES, SAMPLE_RATE, Sound, render, sample_sound, words

SAMPLES = 32_768  # of every sound; what is shorter ends in silence
SECONDS = SAMPLES / SAMPLE_RATE
MOST_DIGITS = 3
MADE = tuple(kind for kind in KINDS if kind != "silence")
WHOLE = ("beeps", "drum", "sequence")  # kinds whose last event must be heard, or this much of it:
SHORTEST_PART = int(0.4 * SAMPLE_RATE)
HELD_OUT_EVERY = 10
TRIES = 60  # to find a wish of a kind that is held out


@dataclass(frozen=True)
class SoundWish:
    """Either ``digits``, one to three of `DIGITS` spoken one after the other, or a ``sound``."""

    digits: tuple[str, ...] = ()
    sound: Sound | None = None


def sample_wish(rng: random.Random) -> SoundWish:
    """Any wish; sounds are loud unless they are said to be quiet."""
    if rng.random() < 0.5:
        return SoundWish(tuple(rng.choices(DIGITS, k=rng.choices((1, 2, 3), (6, 3, 1))[0])))
    return sample_of(rng.choice(MADE), rng)


def sample_of(kind: str, rng: random.Random) -> SoundWish:
    """A wish for a sound of this kind."""
    sound = sample_sound(np.random.default_rng(rng.getrandbits(63)), kind)
    if sound.loudness and rng.random() < 0.6:
        sound = replace(sound, loudness="loud")
    return SoundWish(sound=sound)


def caption(wish: SoundWish) -> str:
    """The wish in words: "a voice that says four two", "three quiet high beeps", "a bell, then a buzz"."""
    if wish.sound is None:
        return f"a voice that says {' '.join(wish.digits)}"
    return words(wish.sound, "quiet " if wish.sound.loudness == "quiet" else "")


def held_out(wish: SoundWish) -> bool:
    """Whether this wish is for the test only. Single digits and what has no other wording than its name never are."""
    text = caption(wish)
    if len(wish.digits) == 1 or (wish.sound is not None and len(text.split()) < 3):
        return False
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT_EVERY == 0


def wishes(rng: random.Random, test: bool) -> SoundWish:
    """A wish of the training side or of the test side."""
    while held_out(wish := sample_wish(rng)) != test:
        pass
    return wish


def test_wish(rng: random.Random) -> SoundWish:
    """A wish to test with: digits, three in four of them single, or a sound of any kind, all kinds alike.

    Sequences of digits are held out, and half of the sounds, where their kind has a wording that is.
    """
    if rng.random() < 0.4:
        return SoundWish((rng.choice(DIGITS),)) if rng.random() < 0.75 else held_out_digits(rng)
    kind = rng.choice(MADE)
    tries = [sample_of(kind, rng) for _ in range(TRIES)]
    return next(filter(held_out, tries), tries[0]) if rng.random() < 0.5 else tries[0]


def held_out_digits(rng: random.Random) -> SoundWish:
    while not held_out(wish := SoundWish(tuple(rng.choices(DIGITS, k=rng.choice((2, 3)))))):
        pass
    return wish


# --- classes of everything a caption says -----------------------------------------------------------------------------

FACTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("kind", ("", *MADE)),
    ("count", ("", *NUMBERS)),
    ("pitch", ("", *PITCHES)),
    ("direction", ("", "rising", "falling")),
    ("duration", ("", "short", "long")),
    ("speed", ("", "slow", "fast")),
    ("loudness", ("", "quiet", "loud")),
    ("first", ("", *PARTS)),
    ("second", ("", *PARTS)),
    *((f"digit {place + 1}", ("", *DIGITS)) for place in range(MOST_DIGITS)),
)
CLASSES = tuple(len(values) for _, values in FACTS)


def facts(wish: SoundWish) -> dict[str, str]:
    """Everything that a caption says, "" where it says nothing of that kind."""
    sound = wish.sound or Sound("")
    known = {name: "" for name, _ in FACTS} | {f"digit {i + 1}": digit for i, digit in enumerate(wish.digits)}
    known |= {"kind": sound.kind, "pitch": sound.pitch, "direction": sound.direction, "duration": sound.duration}
    known |= {
        "speed": sound.speed,
        "loudness": sound.loudness,
        "count": NUMBERS[sound.count - 1] if sound.count else "",
    }
    return known | dict(zip(("first", "second"), sound.parts, strict=False))


def classes(wish: SoundWish) -> tuple[int, ...]:
    """`facts` as the numbers of classes, in the order of `CLASSES`."""
    known = facts(wish)
    return tuple(values.index(known[name]) for name, values in FACTS)


# --- sounds -----------------------------------------------------------------------------------------------------------


class Voices:
    """Recordings of spoken digits, by speaker and digit; float32 at 16 kHz, the silence around them cut off."""

    def __init__(self, folder: Path, split: str = "train") -> None:
        self.clips: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        for row in read_rows(folder, split):
            path, _, digit = parts_of(row)
            speaker = Path(path).stem.split("_")[1]
            self.clips[speaker][digit].append(trimmed(read_wave(folder / path)))

    def say(self, digits: tuple[str, ...], rng: random.Random) -> np.ndarray:
        """One speaker's recordings of the digits, a little faster or slower, one after the other: float32 (T,)."""
        clips, tempo = self.clips[rng.choice(sorted(self.clips))], rng.uniform(0.9, 1.12)
        pieces = [np.zeros(int(rng.uniform(0.02, 0.1) * SAMPLE_RATE), np.float32)]
        for digit in digits:
            wave = soxr.resample(rng.choice(clips[digit]), SAMPLE_RATE * tempo, SAMPLE_RATE)
            pieces += [wave / np.abs(wave).max(), np.zeros(int(rng.uniform(0.05, 0.12) * SAMPLE_RATE), np.float32)]
        return np.concatenate(pieces).astype(np.float32) * np.float32(rng.uniform(0.5, 0.9))


def trimmed(wave: np.ndarray) -> np.ndarray:
    """From the first to the last 10 ms in which there is more than a hundredth of the loudest power; short fades."""
    power = np.convolve(wave.astype(np.float64) ** 2, np.ones(160) / 160, mode="same")
    heard = np.flatnonzero(power > 0.005 * power.max())
    cut = wave[max(0, heard[0] - 240) : heard[-1] + 480].copy()
    ramp = np.linspace(0, 1, min(120, len(cut) // 2), dtype=np.float32)
    cut[: len(ramp)] *= ramp
    cut[len(cut) - len(ramp) :] *= ramp[::-1]
    return cut


def perform(wish: SoundWish, rng: random.Random, voices: Voices) -> np.ndarray:
    """One sound that fulfils the wish: float32 (SAMPLES,) at 16 kHz, peak at most 1."""
    numbers = np.random.default_rng(rng.getrandbits(63))
    while True:
        if wish.sound is None:
            wave = voices.say(wish.digits, rng)
            end = needed = len(wave)
        else:
            wave, events = render(wish.sound, numbers)
            start = max(0, events[0][0] - int(rng.uniform(0.0, 0.05) * SAMPLE_RATE))
            wave, end = wave[start:], events[-1][1] - start
            needed = min(end, events[-1][0] - start + SHORTEST_PART) if wish.sound.kind in WHOLE else 0
        if needed <= SAMPLES:
            break
    wave = wave[: min(end, SAMPLES)].copy()
    ramp = np.linspace(1, 0, min(160, len(wave)), dtype=np.float32)
    wave[len(wave) - len(ramp) :] *= ramp
    return np.pad(wave, (0, SAMPLES - len(wave))).astype(np.float32)
