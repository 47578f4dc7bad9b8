"""Training windows for the audio encoder: stretches of digits, environmental sounds and procedural sounds, changed at
random, each with what is true of it and where."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import soundfile
import sounds
import soxr

RATE = sounds.SAMPLE_RATE
SECONDS = 5
WINDOW = SECONDS * RATE
FRAME = 320  # samples per encoder frame: mel hop 160, then a convolution of stride 2
FRAMES = WINDOW // FRAME
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CATEGORIES = ("dog bark", "rain", "sea waves", "baby cry", "clock tick", "person sneeze", "helicopter", "chainsaw",
              "rooster", "fire crackling")  # fmt: skip
EVENTS = DIGITS + CATEGORIES + sounds.EVENTS
HEADS = {
    "label": DIGITS + CATEGORIES + sounds.KINDS,
    "count": sounds.NUMBERS,
    "pitch": tuple(sounds.PITCHES),
    "direction": ("rising", "falling"),
    "duration": tuple(sounds.DURATIONS),
    "loudness": tuple(sounds.PEAKS),
    "speed": ("slow", "fast"),
    "order-first": sounds.PARTS,
    "order-second": sounds.PARTS,
}
HARD_KINDS = ("beeps", "drum", "sweep", "sequence")
UNKNOWN = -100  # cross_entropy's ignore_index
Clips = list[tuple[np.ndarray, str]]  # (float32 samples at 16 kHz, label)


def read_clips(path: Path) -> Clips:
    """The sounds of a messages JSONL file of one-question dialogues, at 16 kHz, with their answers."""
    clips = []
    for line in path.read_text().splitlines():
        question, answer = (turn["content"] for turn in json.loads(line)["messages"])
        media = next(part["path"] for part in question if part["type"] == "audio")
        wave, rate = soundfile.read(path.parent / media, dtype="float32", always_2d=True)
        clips.append((soxr.resample(wave.mean(axis=1), rate, RATE).astype(np.float32), answer[0]["text"]))
    return clips


class Window:
    """One clip at the start of a stretch of silence, with what is true of it."""

    def __init__(self, length: int = WINDOW) -> None:
        self.samples = np.zeros(length, np.float32)
        self.end = 0  # of the clip, in samples
        self.events = np.full((2, length // FRAME), UNKNOWN)  # the event of each frame, and of the clip mixed into it
        self.facts: dict[str, str] = {}  # {head: answer}
        self.second, self.share = "", 1.0  # the label of the clip mixed into it; the share of the first in the mixture

    def add(self, wave: np.ndarray, events: list[tuple[int, int, str]], facts: dict[str, str]) -> None:
        """Put in the clip, whose `events` are (first sample, end sample, name)."""
        self.samples[: len(wave)] = wave
        self.end = len(wave)
        for first, end, name in events:
            self.events[:, first // FRAME : -(-end // FRAME)] = EVENTS.index(name)
        self.facts, self.second = facts, facts["label"]

    def noise(self, rng: np.random.Generator, decibels: float) -> None:
        """Add noise of a random colour under all that sounds, `decibels` below its mean power."""
        n = self.end
        colour = np.convolve(rng.standard_normal(n), np.ones(int(rng.integers(1, 12))), mode="same").astype(np.float32)
        power = np.mean(self.samples[:n] ** 2) / np.mean(colour**2)
        self.samples[:n] += colour * np.sqrt(power * 10 ** (-decibels / 10)).astype(np.float32)


def gain(rng: np.random.Generator, low: float, high: float) -> np.float32:
    return np.float32(10 ** (rng.uniform(low, high) / 20))


def stretch(wave: np.ndarray, factor: float) -> np.ndarray:
    """Play faster (factor > 1) or slower: speed and pitch change together. Linear interpolation."""
    positions = np.arange(0, len(wave) - 1, factor, dtype=np.float32)
    return np.interp(positions, np.arange(len(wave)), wave).astype(np.float32)


def digit_window(rng: np.random.Generator, clips: Clips, short: bool) -> Window:
    """One digit with some silence around it, in a window; short: in one second."""
    window = Window(RATE if short else WINDOW)
    wave, word = clips[rng.integers(len(clips))]
    wave = stretch(wave, rng.uniform(0.85, 1.18)) * gain(rng, -14, 6)
    before, after = rng.integers(0, 5000 if short else 32000, size=2) * (rng.random(2) < 0.4)
    before = min(before, max(0, len(window.samples) - len(wave)))
    padded = np.pad(wave, (before, after))[: len(window.samples)]
    window.add(padded, [(before, before + len(wave), word)], {"label": word})
    if rng.random() < 0.5:
        window.noise(rng, rng.uniform(5, 40))
    return window


def crop(rng: np.random.Generator, wave: np.ndarray, length: int) -> np.ndarray:
    """A random part that is not (nearly) silent: these clips are padded with zeros after short events."""
    for _ in range(5):
        start = rng.integers(max(1, len(wave) - length + 1))
        part = wave[start : start + length]
        if np.mean(part**2) > 0.2 * np.mean(wave**2):
            break
    return part


def scene_clip(rng: np.random.Generator, clips: Clips, length: int) -> tuple[np.ndarray, str]:
    """One environmental sound, changed in speed, rotated in time, cut to at most `length` samples, at unit power."""
    wave, label = clips[rng.integers(len(clips))]
    wave = stretch(wave, rng.uniform(0.8, 1.25))
    if rng.random() < 0.5:
        wave = np.roll(wave, rng.integers(len(wave)))
    wave = crop(rng, wave, length)
    return wave / np.sqrt(np.mean(wave**2) + 1e-9), label


def scene_window(rng: np.random.Generator, clips: Clips, short: bool) -> Window:
    """One environmental sound, or two mixed with labels in proportion (between-class learning, Tokozume et al., ICLR
    2018), in a window; short: in half a window."""
    length = WINDOW // 2 if short else WINDOW
    window = Window(length)
    wave, label = scene_clip(rng, clips, length if short else int(rng.uniform(0.5, 1.0) * length))
    other, second, share = np.zeros_like(wave), label, 1.0
    if rng.random() < 0.5:
        other, second = scene_clip(rng, clips, len(wave))
        other = np.pad(other, (0, len(wave) - len(other)))
        share = rng.uniform(0.5, 1.0)
    mixed = (share * wave + (1 - share) * other) / math.hypot(share, 1 - share)
    window.add(mixed.astype(np.float32) * gain(rng, -40, -12), [(0, len(mixed), label)], {"label": label})
    window.events[1, window.events[0] != UNKNOWN] = EVENTS.index(second)
    window.second, window.share = second, share
    if rng.random() < 0.3:
        window.noise(rng, rng.uniform(10, 40))
    np.clip(window.samples, -1, 1, out=window.samples)
    return window


def sound_facts(sound: sounds.Sound) -> dict[str, str]:
    """{head: answer} for a procedural sound."""
    named = {"which-sound": "label", "count-beeps": "count", "count-hits": "count"}
    return {"label": sound.kind} | {named.get(name, name): answer for name, answer in sounds.facts(sound).items()}


def procedural_window(rng: np.random.Generator) -> Window:
    """One procedural sound in a window; half of them of the kinds that take longest to learn."""
    window = Window()
    sound = sounds.sample_sound(rng, sounds.pick(rng, HARD_KINDS) if rng.random() < 0.5 else None)
    wave, events = sounds.render(sound, rng)
    window.add(wave, events, sound_facts(sound))
    return window
