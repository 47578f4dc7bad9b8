"""Procedural sounds with exact ground truth: beeps, sweeps, sirens, drums, ... and questions about them.

Everything is numpy, 16 kHz mono float32, and a function of the random generator it is given. A `Sound` is the list of
facts; `synthesize` turns it into samples; `caption` and `questions` talk about the facts and nothing else.

Answer vocabulary (lower case):
    which-sound   beeps, sweep, noise, siren, clicks, chirps, drum, bell, buzz, silence
    count         one ... six
    pitch         low, middle, high             beeps around 220, 650 and 2000 Hz
    direction     rising, falling               sweeps
    order         the names of the parts: beep, noise, siren, drum, bell, buzz, chirp, sweep
    duration      short, long                   under 0.7 s, over 1.8 s
    loudness      quiet, loud                   peak under 0.06, over 0.5 of full scale
    speed         slow, fast                    clicks
    presence      yes, no
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SAMPLE_RATE = 16_000
NUMBERS = ("one", "two", "three", "four", "five", "six")
KINDS = ("beeps", "sweep", "noise", "siren", "clicks", "chirps", "drum", "bell", "buzz", "silence", "sequence")
# The sounds a sequence is made of, and the word that answers "which comes first?".
PARTS = ("beep", "noise", "siren", "drum", "bell", "buzz", "chirp", "sweep")
# Names of the events inside a sound, see `render`.
EVENTS = ("beep", "rising", "falling", "noise", "siren", "click", "chirp", "drum", "bell", "buzz")
PITCHES = {"low": (170.0, 280.0), "middle": (500.0, 820.0), "high": (1500.0, 2600.0)}  # Hz
DURATIONS = {"short": (0.3, 0.7), "long": (1.8, 3.4)}  # seconds
PEAKS = {"quiet": (0.02, 0.06), "loud": (0.5, 0.9)}  # of full scale
COUNTED = ("beeps", "drum")
TIMED = ("sweep", "noise", "buzz")


@dataclass(frozen=True)
class Sound:
    """What is true of one sound. A fact that the kind does not have is "" (or 0, or ())."""

    kind: str  # one of KINDS
    loudness: str = ""  # "quiet" | "loud"; every kind but silence and sequence
    count: int = 0  # 1-6; beeps and drum
    pitch: str = ""  # "low" | "middle" | "high"; beeps
    direction: str = ""  # "rising" | "falling"; sweep
    duration: str = ""  # "short" | "long"; sweep, noise, buzz
    speed: str = ""  # "slow" | "fast"; clicks
    parts: tuple[str, ...] = ()  # two different PARTS; sequence


def pick(rng: np.random.Generator, options: tuple[str, ...] | list[str] | dict[str, tuple[float, float]]) -> str:
    """One of the options, all equally likely."""
    return list(options)[int(rng.integers(len(options)))]


def sample_sound(rng: np.random.Generator, kind: str | None = None) -> Sound:
    """A random sound; `kind` fixes what it is (one of KINDS, else ValueError)."""
    if kind is None:
        kind = pick(rng, KINDS)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of sound {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "silence":
        return Sound(kind)
    if kind == "sequence":
        first, second = rng.choice(len(PARTS), size=2, replace=False)
        return Sound(kind, parts=(PARTS[first], PARTS[second]))
    return Sound(
        kind,
        loudness=pick(rng, PEAKS),
        count=int(rng.integers(1, 7)) if kind in COUNTED else 0,
        pitch=pick(rng, PITCHES) if kind == "beeps" else "",
        direction=pick(rng, ["rising", "falling"]) if kind == "sweep" else "",
        duration=pick(rng, DURATIONS) if kind in TIMED else "",
        speed=pick(rng, ["slow", "fast"]) if kind == "clicks" else "",
    )


# --- single events: float32 samples with a peak of about 1 ------------------------------------------------------------


def _tone(phase: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A sine with a random amount of second and third harmonic, `phase` in radians."""
    second, third = rng.uniform(0, 0.3, size=2)
    return (np.sin(phase) + second * np.sin(2 * phase) + third * np.sin(3 * phase)) / (1 + second + third)


def _fade(wave: np.ndarray, seconds: float = 0.008) -> np.ndarray:
    """Linear fade in and out, against clicks at the edges."""
    n = min(int(seconds * SAMPLE_RATE), len(wave) // 2)
    ramp = np.linspace(0, 1, n)
    wave[:n] *= ramp
    wave[len(wave) - n :] *= ramp[::-1]
    return wave


def _time(seconds: float) -> np.ndarray:
    return np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def _phase(frequency: np.ndarray) -> np.ndarray:
    return 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE


def _beep(rng: np.random.Generator, pitch: str, seconds: float) -> np.ndarray:
    return _fade(_tone(2 * np.pi * rng.uniform(*PITCHES[pitch]) * _time(seconds), rng))


def _sweep(rng: np.random.Generator, direction: str, seconds: float) -> np.ndarray:
    low, ratio = rng.uniform(180, 500), rng.uniform(3.0, 7.0)
    octave = np.linspace(0, 1, int(seconds * SAMPLE_RATE))
    exponent = octave if direction == "rising" else 1 - octave
    return _fade(_tone(_phase(low * ratio**exponent), rng))


def _noise(rng: np.random.Generator, seconds: float) -> np.ndarray:
    white = rng.standard_normal(int(seconds * SAMPLE_RATE))
    if rng.random() < 0.5:  # a darker noise: moving average of a few samples
        width = int(rng.integers(2, 9))
        white = np.convolve(white, np.ones(width) / np.sqrt(width), mode="same")
    return _fade(np.clip(white / 3.0, -1, 1), 0.02)


def _siren(rng: np.random.Generator, seconds: float) -> np.ndarray:
    wobble = np.sin(2 * np.pi * (rng.uniform(1.2, 3.0) * _time(seconds) + rng.random()))
    return _fade(_tone(_phase(rng.uniform(600, 1000) * (1 + rng.uniform(0.25, 0.45) * wobble)), rng), 0.02)


def _click(rng: np.random.Generator) -> np.ndarray:
    t = _time(0.012)
    return np.sin(2 * np.pi * rng.uniform(1800, 3200) * t) * np.exp(-t / 0.002)


def _chirp(rng: np.random.Generator) -> np.ndarray:
    """A bird-like call: a fast upward flick between 2.5 and 5.5 kHz, under 0.1 s."""
    n = int(rng.uniform(0.05, 0.09) * SAMPLE_RATE)
    low = rng.uniform(2500, 3300)
    return _fade(np.sin(_phase(np.linspace(low, low * rng.uniform(1.4, 1.7), n))), 0.012)


def _drum(rng: np.random.Generator) -> np.ndarray:
    """A membrane hit: a decaying low tone that drops in pitch, with a short noise burst on top."""
    t = _time(0.22)
    body = np.sin(_phase(rng.uniform(70, 110) * (1 + 0.8 * np.exp(-t / 0.03)))) * np.exp(-t / 0.06)
    return 0.8 * body + 0.2 * rng.standard_normal(len(t)) * np.exp(-t / 0.012)


def _bell(rng: np.random.Generator) -> np.ndarray:
    """Inharmonic partials, each with its own decay."""
    t, base = _time(rng.uniform(0.9, 1.5)), rng.uniform(600, 1100)
    partials = zip((0.56, 1.0, 1.19, 1.71, 2.74), (0.4, 1.0, 0.6, 0.5, 0.35), (0.7, 0.45, 0.4, 0.3, 0.2), strict=True)
    wave = sum(a * np.sin(2 * np.pi * base * r * t) * np.exp(-t / d) for r, a, d in partials)
    return _fade(np.asarray(wave) / 2.4, 0.003)


def _buzz(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """A rough low square wave, like a doorbell or a mains hum."""
    hum = np.sign(np.sin(2 * np.pi * rng.uniform(70, 140) * _time(seconds)))
    return _fade(hum * (0.8 + 0.2 * np.sin(2 * np.pi * rng.uniform(15, 30) * _time(seconds))), 0.01)


def _part(rng: np.random.Generator, part: str) -> list[tuple[float, str, np.ndarray]]:
    """One element of a sequence as [(start second, event, samples)]."""
    if part == "beep":
        return [(0.0, "beep", _beep(rng, pick(rng, PITCHES), rng.uniform(0.2, 0.5)))]
    if part == "sweep":
        direction = pick(rng, ["rising", "falling"])
        return [(0.0, direction, _sweep(rng, direction, rng.uniform(0.6, 1.2)))]
    if part == "noise":
        return [(0.0, "noise", _noise(rng, rng.uniform(0.4, 1.0)))]
    if part == "siren":
        return [(0.0, "siren", _siren(rng, rng.uniform(1.0, 1.6)))]
    if part == "drum":
        return [(0.0, "drum", _drum(rng))]
    if part == "bell":
        return [(0.0, "bell", _bell(rng))]
    if part == "buzz":
        return [(0.0, "buzz", _buzz(rng, rng.uniform(0.4, 1.0)))]
    return [(0.13 * i, "chirp", _chirp(rng)) for i in range(3)]


def _layout(sound: Sound, rng: np.random.Generator) -> list[tuple[float, str, np.ndarray]]:
    """The events of a sound as [(start second, event name, samples)]."""
    if sound.kind == "beeps":
        length, step = rng.uniform(0.09, 0.2), rng.uniform(0.3, 0.5)
        tone = _beep(rng, sound.pitch, length)
        return [(i * step, "beep", tone) for i in range(sound.count)]
    if sound.kind == "drum":
        step = rng.uniform(0.33, 0.55)
        return [(i * step, "drum", _drum(rng)) for i in range(sound.count)]
    if sound.kind == "clicks":
        step = rng.uniform(0.45, 0.65) if sound.speed == "slow" else rng.uniform(0.08, 0.14)
        total = rng.uniform(2.0, 3.2) if sound.speed == "slow" else rng.uniform(1.0, 2.2)
        click = _click(rng)
        return [(i * step, "click", click) for i in range(int(total / step))]
    if sound.kind == "chirps":
        starts = np.cumsum(rng.uniform(0.11, 0.3, size=int(rng.integers(4, 10))))
        return [(float(start), "chirp", _chirp(rng)) for start in starts - starts[0]]
    if sound.kind == "siren":
        return [(0.0, "siren", _siren(rng, rng.uniform(1.4, 3.2)))]
    if sound.kind == "bell":
        return [(0.0, "bell", _bell(rng))]
    if sound.kind == "sequence":
        first, second = (_part(rng, part) for part in sound.parts)
        offset = max(start + len(wave) / SAMPLE_RATE for start, _, wave in first) + rng.uniform(0.1, 0.4)
        return first + [(start + offset, name, wave) for start, name, wave in second]
    if sound.kind == "silence":
        return []
    seconds = rng.uniform(*DURATIONS[sound.duration])
    if sound.kind == "sweep":
        return [(0.0, sound.direction, _sweep(rng, sound.direction, seconds))]
    if sound.kind == "noise":
        return [(0.0, "noise", _noise(rng, seconds))]
    return [(0.0, "buzz", _buzz(rng, seconds))]


def render(sound: Sound, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, int, str]]]:
    """Samples, float32 (T,) in [-1, 1] at 16 kHz and T under 4.7 s, and where each event lies in them:
    [(first sample, last sample + 1, one of EVENTS)]."""
    lead, tail = rng.uniform(0.02, 0.25, size=2)
    layout = _layout(sound, rng)
    seconds = max((start + len(wave) / SAMPLE_RATE for start, _, wave in layout), default=rng.uniform(0.6, 2.5))
    samples = np.zeros(int((lead + seconds + tail) * SAMPLE_RATE) + 1)
    events = []
    for start, name, wave in layout:
        first = int((lead + start) * SAMPLE_RATE)
        samples[first : first + len(wave)] += wave
        events.append((first, first + len(wave), name))
    peak = np.abs(samples).max()
    if peak > 0:
        samples *= rng.uniform(*PEAKS[sound.loudness or "loud"]) / peak
    # A microphone is never at zero: a noise floor 20 dB and more below the quietest sound.
    samples += rng.uniform(0, 5e-4) * rng.standard_normal(len(samples))
    return np.clip(samples, -1, 1).astype(np.float32), events


def synthesize(sound: Sound, rng: np.random.Generator) -> np.ndarray:
    """The samples of `render`: float32 (T,), 16 kHz, peak at most 1."""
    return render(sound, rng)[0]


# --- words ----------------------------------------------------------------------------------------

PART_PHRASES = {
    "beep": "a beep",
    "noise": "a burst of noise",
    "siren": "a siren",
    "drum": "a drum hit",
    "bell": "a bell",
    "buzz": "a buzz",
    "chirp": "a few chirps",
    "sweep": "a sweeping tone",
}


def caption(sound: Sound, rng: np.random.Generator) -> str:
    """A short lower-case description, e.g. "three high beeps", "a quiet rising sweep", "a bell, then a buzz"."""
    if sound.kind == "sequence":
        first, second = (PART_PHRASES[part] for part in sound.parts)
        return pick(rng, [f"{first}, then {second}", f"first {first}, then {second}", f"{first} followed by {second}"])
    return words(sound, f"{sound.loudness} " if sound.loudness and rng.random() < 0.5 else "")


def words(sound: Sound, loud: str) -> str:
    """The one description that names the facts in a fixed form; ``loud`` ("quiet ", "loud " or "") goes where it belongs."""
    many = "" if sound.count == 1 else "s"
    if sound.kind == "beeps":
        return f"{NUMBERS[sound.count - 1]} {loud}{sound.pitch} beep{many}"
    if sound.kind == "drum":
        return f"{NUMBERS[sound.count - 1]} {loud}drum hit{many}"
    if sound.kind == "sweep":
        return f"a {loud}{sound.duration} {sound.direction} sweep"
    if sound.kind in TIMED:
        return f"a {loud}{sound.duration} {'burst of noise' if sound.kind == 'noise' else 'buzz'}"
    if sound.kind == "clicks":
        return f"{loud}{sound.speed} clicks"
    if sound.kind == "chirps":
        return f"{loud}bird-like chirps"
    if sound.kind == "sequence":
        return ", then ".join(PART_PHRASES[part] for part in sound.parts)
    return "silence" if sound.kind == "silence" else f"a {loud}{sound.kind}"


PHRASINGS = {
    "which-sound": (
        "Which sound is this?",
        "What kind of sound is this?",
        "What is making this sound?",
        "Name this sound.",
        "What do you hear?",
    ),
    "count-beeps": ("How many beeps are there?", "How many beeps do you hear?", "Count the beeps."),
    "count-hits": ("How many drum hits are there?", "How often is the drum hit?", "Count the drum hits."),
    "pitch": ("Is the pitch low, middle or high?", "How high are the beeps?", "What is the pitch of the beeps?"),
    "direction": ("Does the pitch rise or fall?", "Is the tone rising or falling?", "Which way does the sweep go?"),
    "duration": ("Is the sound short or long?", "Is it a short or a long sound?", "How long is the sound?"),
    "loudness": ("Is the sound loud or quiet?", "How loud is it?", "Is this loud or quiet?"),
    "speed": ("Are the clicks slow or fast?", "How fast are the clicks?", "Is the clicking slow or fast?"),
    "order-first": ("Which sound comes first?", "What do you hear first?", "What is the first sound?"),
    "order-second": ("Which sound comes second?", "What do you hear last?", "What is the second sound?"),
}
_PRESENCE = ("Is there {}?", "Can you hear {}?", "Do you hear {}?")
# The part that a kind counts as, where "is there a ...?" has a clear answer.
_CONTAINS = {
    "beeps": "beep",
    "sweep": "sweep",
    "noise": "noise",
    "siren": "siren",
    "chirps": "chirp",
    "drum": "drum",
    "bell": "bell",
    "buzz": "buzz",
}
_PRESENCE_PHRASES = PART_PHRASES | {"noise": "noise", "drum": "a drum", "chirp": "chirping", "buzz": "a buzz"}


def facts(sound: Sound) -> dict[str, str]:
    """{question type of PHRASINGS: answer} for all that can be asked about a sound."""
    known = {
        "pitch": sound.pitch,
        "direction": sound.direction,
        "duration": sound.duration,
        "loudness": sound.loudness,
        "speed": sound.speed,
    }
    if sound.kind == "sequence":
        known |= {"order-first": sound.parts[0], "order-second": sound.parts[1]}
    else:
        known["which-sound"] = sound.kind
    if sound.count:
        known["count-beeps" if sound.kind == "beeps" else "count-hits"] = NUMBERS[sound.count - 1]
    return {name: answer for name, answer in known.items() if answer}


def questions(sound: Sound, rng: np.random.Generator, n: int) -> list[tuple[str, str, str]]:
    """Up to n different (question type, question, answer) about a sound; fewer where less can be asked."""
    asked = [(name, pick(rng, PHRASINGS[name]), answer) for name, answer in facts(sound).items()]
    present = sound.parts or tuple(_CONTAINS[kind] for kind in [sound.kind] if kind in _CONTAINS)
    absent = tuple(part for part in PARTS if part not in present)
    wanted = present if present and rng.random() < 0.5 else absent
    part = pick(rng, wanted)
    question = pick(rng, _PRESENCE).format(_PRESENCE_PHRASES[part])
    asked.append(("presence", question, "yes" if part in present else "no"))
    return [asked[i] for i in rng.permutation(len(asked))[:n]]
