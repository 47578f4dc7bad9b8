"""What the embedded assistant is to let be heard: wishes, dialogues, and the training of its sound generator."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

import sound_data
import sound_judge
import sound_talk
import sound_wishes
import train_sound_generator
from real_sets import Writer
from sound_wishes import FACTS, SAMPLES, SoundWish, Voices
from sounds import PARTS, SAMPLE_RATE, Sound

from mmllm.config.base import BuildContext
from mmllm.generators.audio import AudioDiffusionConfig


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of "recordings" in the layout of training/prepare_fsdd.py: two speakers, tones instead of digits."""
    folder = tmp_path_factory.mktemp("voices")
    (folder / "audio").mkdir()
    rows = []
    for index, digit in enumerate(sound_wishes.DIGITS):
        for speaker in ("anna", "bert"):
            name = f"audio/{index}_{speaker}_0.wav"
            wave = np.sin(np.arange(3200) * 0.02 * (index + 3)).astype(np.float32) * 0.5
            soundfile.write(folder / name, np.pad(wave, 2000), 8000)
            asked = f'[{{"type": "audio", "path": "{name}"}}, {{"type": "text", "text": "Which digit?"}}]'
            rows.append(
                f'{{"messages": [{{"role": "user", "content": {asked}}}, {{"role": "assistant", "content": "{digit}"}}]}}'
            )
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def captions(message: dict[str, Any]) -> Iterator[str]:
    for part in message["content"] if isinstance(message["content"], list) else []:
        if part["type"] == "audio" and "caption" in part:
            yield part["caption"]


def test_every_wish_can_be_heard_in_time(voices: Path) -> None:
    rng, people = random.Random(0), Voices(voices)
    wanted = [SoundWish(sound=Sound("sequence", parts=(a, b))) for a in PARTS for b in PARTS if a != b]
    wanted += [sound_wishes.sample_wish(rng) for _ in range(200)]
    for wish in wanted:
        wave = sound_wishes.perform(wish, rng, people)
        assert wave.shape == (SAMPLES,)
        assert wave.dtype == np.float32
        assert 0.005 < np.abs(wave).max() <= 1, sound_wishes.caption(wish)
        assert np.abs(wave[-2:]).max() < 0.02, "the end is faded out"


def test_digits_are_said_in_order_by_one_voice(voices: Path) -> None:
    wave = Voices(voices).say(("nine", "zero"), random.Random(1))
    heard = np.flatnonzero(np.abs(wave) > 0.2)
    split = int(heard[np.diff(heard, append=heard[-1]).argmax()]) + 1
    assert 0.2 < split / len(wave) < 0.8
    crossings = [np.abs(np.diff(np.sign(part[np.abs(part) > 0.1]))).sum() for part in (wave[:split], wave[split:])]
    assert crossings[0] > 2.5 * crossings[1], "nine is the higher tone here"


def test_a_caption_says_every_fact_and_no_other_wish_has_it() -> None:
    rng, known = random.Random(2), dict[str, tuple[int, ...]]()
    silent = [name for name, _ in FACTS].index("loudness")
    for _ in range(3000):
        wish = sound_wishes.sample_wish(rng)
        facts = sound_wishes.classes(wish)
        # "loud" is not said: only "quiet" is.
        kept = tuple(0 if index == silent and value == 2 else value for index, value in enumerate(facts))
        assert known.setdefault(sound_wishes.caption(wish), kept) == kept


def test_no_dialogue_of_the_training_asks_for_a_wish_of_the_test(voices: Path, tmp_path: Path) -> None:
    rng, writer = random.Random(3), Writer(tmp_path, "x")
    test = {sound_wishes.caption(sound_wishes.wishes(rng, test=True)) for _ in range(300)}
    makers = (sound_data.sounding, sound_data.echoed, sound_data.said_count, sound_data.drawn_and_said)
    rows = [maker(rng, writer) for maker in makers for _ in range(60)]
    rows += sound_data.echoed_digits(voices, tmp_path, rng, 0.5)
    made = [caption for row in rows for message in row["messages"] for caption in captions(message)]
    assert len(made) > 200
    assert not test & set(made)
    forms = {form for forms in (sound_talk.HELD_OUT_SPEECH, sound_talk.HELD_OUT_SOUNDS) for form in forms}
    assert not forms & {*sound_talk.SPEECH, *sound_talk.SOUNDS}


def test_a_change_changes_what_it_says() -> None:
    rng = random.Random(4)
    beeps = SoundWish(sound=Sound("beeps", loudness="loud", count=2, pitch="low"))
    seen = dict(change for change in (sound_talk.edit(beeps, rng) for _ in range(80)) if change)
    assert seen["Make it quieter."].sound == Sound("beeps", loudness="quiet", count=2, pitch="low")
    assert any(wish.sound.count != 2 and wish.sound.pitch == "low" for wish in seen.values() if wish.sound)
    turned = {
        (parts, change[1].sound.parts)
        for parts in (("bell", "buzz"), ("siren", "drum"), ("noise", "beep"))
        if (change := sound_talk.edit(SoundWish(sound=Sound("sequence", parts=parts)), rng)) and change[1].sound
    }
    assert turned, "not all of these are kept for the test"
    assert all(before == after[::-1] for before, after in turned)


def test_the_judge_learns_and_knows_what_is_right(voices: Path) -> None:
    bell, siren = SoundWish(sound=Sound("bell", loudness="loud")), SoundWish(sound=Sound("siren", loudness="loud"))
    heard = {name: values[k] for (name, values), k in zip(FACTS, sound_wishes.classes(bell), strict=True)}
    assert sound_judge.right(bell, heard) == {"kind": True, "facts of a sound": True, "all": True}
    assert sound_judge.right(siren, heard) == {"kind": False, "facts of a sound": False, "all": False}
    assert sound_judge.right(bell, heard | {"loudness": "quiet"})["all"], "only what is said counts"
    judge = sound_judge.train(Voices(voices), steps=2, seed=0)
    (found,) = sound_judge.heard_in(judge, [np.zeros(1000, np.float32)])
    assert set(found) == {name for name, _ in FACTS}


def test_the_generator_is_trained_resumed_and_loaded_by_the_library(
    voices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_sound_generator, "WIDTHS", (32, 32))
    monkeypatch.setattr(train_sound_generator, "BANK", 128)
    output = tmp_path / "sing"
    argv = ["x", "--output", str(output), "--fsdd", str(voices), "--text-steps", "2", "--resume", "--minutes", "0.02"]
    monkeypatch.setattr(sys, "argv", [*argv, "--only", "vocoder"])
    train_sound_generator.main()
    made = load_file(output / "training" / "vocoder.safetensors")
    monkeypatch.setattr(sys, "argv", argv)
    train_sound_generator.main()
    again = load_file(output / "training" / "vocoder.safetensors")
    assert all(torch.equal(again[name], value) for name, value in made.items()), "its time was over"
    generator: Any = AudioDiffusionConfig(pretrained=str(output), steps=2, guidance=2.0, seed=0).build(BuildContext())
    assert generator.condition_shape == {"text": (1, train_sound_generator.TEXT_WIDTH)}
    (sound,) = generator.generate(generator.encode_text(["a voice that says seven"]))
    assert sound.sample_rate == SAMPLE_RATE
    assert sound.samples.shape == (SAMPLES,)
    # What the library makes of a target is what the training saw.
    target = AudioDiffusionConfig(pretrained=str(output)).target(BuildContext())
    wave = sound_wishes.perform(SoundWish(("seven",)), random.Random(0), Voices(voices))
    own = train_sound_generator.Sounds(Voices(voices), 0).mel(wave)
    assert torch.equal(target(wave), own)
