"""The sounds of the embedded assistant: the facts must be in the samples, and the words must say the facts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
import sounds


def generators(n: int) -> list[np.random.Generator]:
    return [np.random.default_rng((7, i)) for i in range(n)]


@pytest.mark.parametrize("kind", sounds.KINDS)
def test_samples_are_bounded_and_reproducible(kind: str) -> None:
    for i in range(20):
        rng, again = np.random.default_rng(i), np.random.default_rng(i)
        sound = sounds.sample_sound(rng, kind)
        wave = sounds.synthesize(sound, rng)
        assert sound.kind == kind
        assert wave.dtype == np.float32
        assert wave.ndim == 1
        assert 0.2 < len(wave) / sounds.SAMPLE_RATE < 4.7
        assert np.abs(wave).max() <= 1
        np.testing.assert_array_equal(wave, sounds.synthesize(sounds.sample_sound(again, kind), again))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind of sound 'trumpet'; expected one of beeps"):
        sounds.sample_sound(np.random.default_rng(0), "trumpet")


def envelope(wave: np.ndarray) -> np.ndarray:
    """RMS of 10 ms frames."""
    frames = wave[: len(wave) // 160 * 160].reshape(-1, 160)
    return np.sqrt((frames**2).mean(axis=1))


def test_the_counted_events_are_heard() -> None:
    for rng in generators(60):
        sound = sounds.sample_sound(rng, "beeps")
        level = envelope(sounds.synthesize(sound, rng))
        loud = level > 0.3 * level.max()
        assert int(loud[0]) + int((np.diff(loud.astype(int)) == 1).sum()) == sound.count


def peak_frequency(wave: np.ndarray) -> float:
    return float(np.fft.rfftfreq(len(wave), 1 / sounds.SAMPLE_RATE)[np.abs(np.fft.rfft(wave)).argmax()])


def test_pitch_and_direction_are_in_the_spectrum() -> None:
    for rng in generators(40):
        beeps = sounds.sample_sound(rng, "beeps")
        low, high = sounds.PITCHES[beeps.pitch]
        assert low * 0.9 < peak_frequency(sounds.synthesize(beeps, rng)) < high * 1.1
        sweep = sounds.sample_sound(rng, "sweep")
        wave, [(start, end, event)] = sounds.render(sweep, rng)
        third = (end - start) // 3
        rises = peak_frequency(wave[end - third : end]) > peak_frequency(wave[start : start + third])
        assert event == sweep.direction == ("rising" if rises else "falling")


def test_loudness_duration_and_silence_are_in_the_samples() -> None:
    for rng in generators(40):
        sound = sounds.sample_sound(rng, "buzz")
        wave, [(start, end, _)] = sounds.render(sound, rng)
        assert (np.abs(wave).max() > 0.3) == (sound.loudness == "loud")
        assert ((end - start) / sounds.SAMPLE_RATE > 1) == (sound.duration == "long")
        assert np.abs(sounds.synthesize(sounds.sample_sound(rng, "silence"), rng)).max() < 0.01


def test_events_lie_where_the_sound_is() -> None:
    for rng in generators(60):
        sound = sounds.sample_sound(rng, "sequence")
        wave, events = sounds.render(sound, rng)
        names = ["sweep" if name in ("rising", "falling") else name for _, _, name in events]
        assert tuple(dict.fromkeys(names)) == sound.parts
        inside = np.zeros(len(wave), bool)
        for start, end, _ in events:
            inside[start:end] = True
        assert np.abs(wave[~inside]).max() < 0.01 < np.abs(wave[inside]).max()


def test_questions_are_answered_by_the_facts() -> None:
    vocabulary = {
        "which-sound": set(sounds.KINDS) - {"sequence"},
        "count-beeps": set(sounds.NUMBERS),
        "count-hits": set(sounds.NUMBERS),
        "pitch": set(sounds.PITCHES),
        "direction": {"rising", "falling"},
        "duration": set(sounds.DURATIONS),
        "loudness": set(sounds.PEAKS),
        "speed": {"slow", "fast"},
        "order-first": set(sounds.PARTS),
        "order-second": set(sounds.PARTS),
        "presence": {"yes", "no"},
    }
    seen: dict[str, set[str]] = {name: set() for name in vocabulary}
    for rng in generators(1500):
        sound = sounds.sample_sound(rng)
        asked = sounds.questions(sound, rng, 10)
        assert len({name for name, _, _ in asked}) == len(asked)
        for name, question, answer in asked:
            assert question != "Which digit is spoken?"
            assert question != "What do you hear?" or (name == "which-sound" and answer == sound.kind)
            seen[name].add(answer)
        facts = {name: answer for name, _, answer in asked}
        if sound.kind == "sequence":
            assert (facts["order-first"], facts["order-second"]) == sound.parts
        else:
            assert facts["which-sound"] == sound.kind
    assert seen == vocabulary


def test_presence_is_balanced_and_right() -> None:
    answers = []
    for rng in generators(300):
        sound = sounds.sample_sound(rng, "bell")
        (question, answer), *_ = [(q, a) for name, q, a in sounds.questions(sound, rng, 10) if name == "presence"]
        assert (answer == "yes") == ("bell" in question)
        answers.append(answer)
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_at_most_n_questions() -> None:
    rng = np.random.default_rng(0)
    assert len(sounds.questions(sounds.sample_sound(rng, "beeps"), rng, 2)) == 2


def test_captions_name_the_facts() -> None:
    for rng in generators(200):
        sound = sounds.sample_sound(rng)
        words = sounds.caption(sound, rng)
        assert words == words.lower()
        for fact in (sound.pitch, sound.direction, sound.duration, sound.speed):
            assert fact in words
        if sound.count:
            assert words.startswith(sounds.NUMBERS[sound.count - 1])
            assert words.endswith("s") == (sound.count > 1)
        if sound.kind == "sequence":
            places = [re.search(part, words) for part in sound.parts]
            assert all(places)
            assert places[0].start() < places[1].start()
