"""The gallery's sections about sounds and clips: held-out requests in their order, what is heard and read, failures."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parents[2] / "demo"), str(Path(__file__).parent)]

import gallery
import gallery_clips
import gallery_sounds
import moving
import sound_wishes
from clip_trials import NOTHING as NO_CLIP
from clip_trials import Animated, animated, held_out_motions, read_back
from gallery_page import Page
from gallery_sounds import Shown
from moving_talk import HELD_OUT_REQUESTS
from scripted import WORDS, answers, tiny_assistant
from sound_judge import Judge, asked_for
from sound_talk import HELD_OUT_SOUNDS, HELD_OUT_SPEECH
from sound_trials import NOTHING, Played, at_rate, hear, held_out_sounds, played, wrong
from sound_wishes import SAMPLES, SoundWish
from sounds import SAMPLE_RATE
from sounds import Sound as Facts

import mmllm
from mmllm.assistant import Assistant
from mmllm.generators.base import Clip, Sound

DRUM = SoundWish(sound=Facts("drum", "quiet", count=2))


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return tiny_assistant("audio", "video")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a judge that has learnt nothing."""
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    save_file(Judge().state_dict(), path)
    return path


def make(folder: Path, assistant: Assistant, monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """The page that the command writes into ``folder``."""
    with monkeypatch.context() as patch:
        patch.setattr(mmllm, "load", lambda name: assistant, raising=False)
        patch.setattr("mmllm.assistant.model_folder", Path)
        page = folder / "page.md"
        argv = ["x", "--model", "tiny", "--count", "3", "--shown", "2", "--seed", "4", "--output", str(page), *options]
        patch.setattr(sys, "argv", argv)
        folder.mkdir(exist_ok=True)
        gallery.main()
    return page.read_text(encoding="utf-8")


def shown_on(text: str) -> set[str]:
    return set(re.findall(r'(?:src="|\]\()page/([^")]+)', text))


def tone(seconds: float, rate: int, pitch: float) -> Sound:
    return Sound(0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate).astype(np.float32), rate)


def test_sounds_are_shown_in_order_with_a_file_a_spectrogram_and_what_the_judge_hears(
    tmp_path: Path, assistant: Assistant, judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(assistant, monkeypatch, "audio")
    text = make(tmp_path / "one", assistant, monkeypatch, "--judge", str(judge))
    section = text.split("## Sounds")[1].split("## Clips")[0]
    rows = [line for line in section.split("### Failures")[0].splitlines() if line.startswith("| ")][2:]
    asked = [one.request for one in played(assistant, held_out_sounds(3, 4), 4)]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == asked[:2]
    for number, row in enumerate(rows, start=1):
        assert f"[listen](page/sound-0{number}.mp3)" in row
        assert f'src="page/sound-0{number}.png"' in row
        assert f"| {WORDS} |" in row
        assert "as asked" in row or "**wrong: " in row
    assert "what the judge hears" in section
    files = {path.name: path for path in (tmp_path / "one" / "page").iterdir()}
    assert shown_on(text) == set(files)
    assert soundfile.info(files["sound-01.mp3"]).samplerate == SAMPLE_RATE
    assert soundfile.info(files["sound-01.mp3"]).channels == 1
    assert make(tmp_path / "two", assistant, monkeypatch, "--judge", str(judge)) == text
    for name, path in files.items():
        assert path.read_bytes() == (tmp_path / "two" / "page" / name).read_bytes(), name


def test_without_a_judge_its_columns_are_left_out_and_missing_sounds_still_count(
    tmp_path: Path, assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        answers(assistant, patch, "audio")
        section = make(tmp_path, assistant, monkeypatch).split("## Sounds")[1].split("## Clips")[0]
        assert "judge hears" not in section
        assert "found none in 3 replies" in section
    answers(assistant, monkeypatch)
    text = make(tmp_path, assistant, monkeypatch)
    section = text.split("## Sounds")[1].split("## Clips")[0]
    assert "3 of 3 replies; here are the first 2." in section
    assert section.count("| no sound |") == 2 * 2
    assert not shown_on(text)
    assert not list((tmp_path / "page").iterdir()), "the earlier page's files are gone"


def test_failures_of_sounds_are_those_that_the_judge_hears(tmp_path: Path) -> None:
    page, sound = Page(tmp_path / "page.md"), tone(2.0, SAMPLE_RATE, 400)
    right = Played(DRUM, "Play it.", "Listen.", sound, asked_for(DRUM) | {"loudness": "quiet"})
    missed = Played(DRUM, "Play | that.", "Listen.", sound, asked_for(DRUM) | {"count": "five"})
    none = Played(DRUM, "Play nothing.", "Listen.", None, NOTHING)
    gallery_sounds.failures(page, [Shown(right), Shown(missed), Shown(none)], 5, judged=True)
    assert page.blocks[1].startswith("2 of 3 sounds")
    assert "Play it." not in page.blocks[2]
    assert "kind drum, count five, loudness quiet | **wrong: count** |" in page.blocks[2]
    assert "| Play nothing. | no sound |  | nothing | **wrong: no sound** |" in page.blocks[2]
    assert "Play &#124; that." in page.blocks[2]


def test_a_sound_of_any_rate_becomes_a_small_file_and_its_spectrogram_has_low_tones_below(tmp_path: Path) -> None:
    for rate in (8000, 16_000, 44_100):
        shown = Shown(Played(DRUM, "", "", tone(2.048, rate, 200)))
        assert shown.file.sample_rate == SAMPLE_RATE
        assert len(shown.file.samples) == pytest.approx(SAMPLES, abs=2)
        pixels = np.asarray(shown.picture).astype(int)
        assert pixels.shape == (64, 128)
        assert pixels.sum(axis=1).argmin() > 50, "the darkest row is that of 200 Hz"
        shown.file.save(tmp_path / "x.mp3")
        shown.picture.save(tmp_path / "x.png")
        assert sum((tmp_path / name).stat().st_size for name in ("x.mp3", "x.png")) < 25_000
    short = gallery_sounds.spectrogram(Sound(np.zeros(10, np.float32), SAMPLE_RATE))
    assert np.asarray(short).min() == 255, "silence is white"


def test_what_is_heard_is_compared_with_what_was_asked_for() -> None:
    spoken = SoundWish(("four", "two"))
    assert wrong(spoken, asked_for(spoken)) == ""
    assert wrong(spoken, asked_for(spoken) | {"digit 2": "", "kind": "bell"}) == "kind, digit 2"
    loud = SoundWish(sound=Facts("bell", "loud"))
    assert wrong(loud, NOTHING | {"kind": "bell", "loudness": "quiet"}) == "", "only quiet is asked for in words"
    assert wrong(DRUM, NOTHING | asked_for(DRUM) | {"loudness": "loud"}) == "loudness"
    found = hear(Judge().eval(), [None, tone(0.5, 8000, 300), None])
    assert [one == NOTHING for one in found] == [True, False, True]
    assert not any(Played(spoken, "", "", None, NOTHING).facts.values())


def test_what_is_asked_for_is_held_out_and_does_not_depend_on_how_much_is_asked(assistant: Assistant) -> None:
    assert held_out_sounds(5, 1) == held_out_sounds(9, 1)[:5]
    assert held_out_motions(5, 1) == held_out_motions(9, 1)[:5]
    wishes = held_out_sounds(40, 1)
    assert all(sound_wishes.held_out(wish) for wish in wishes if len(wish.digits) > 1)
    assert any(sound_wishes.held_out(wish) for wish in wishes if wish.sound)
    assert len({wish.sound.kind for wish in wishes if wish.sound}) > 5
    assert {len(wish.digits) for wish in wishes} >= {0, 1, 2}
    assert all(map(moving.held_out, held_out_motions(9, 1)))
    forms = [form.split("{}")[0] for form in (*HELD_OUT_SOUNDS, *HELD_OUT_SPEECH)]
    three = played(assistant, held_out_sounds(3, 1), 1)
    assert all(one.request.startswith(tuple(forms)) for one in three)
    assert [one.request for one in played(assistant, held_out_sounds(2, 1), 1)] == [one.request for one in three[:2]]
    shown = animated(assistant, held_out_motions(3, 1), 1)
    assert all(one.request.startswith(tuple(form.split("{}")[0] for form in HELD_OUT_REQUESTS)) for one in shown)


def test_clips_move_on_the_page_with_what_the_parser_reads(
    tmp_path: Path, assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        answers(assistant, patch, "video")
        text = make(tmp_path, assistant, monkeypatch)
    section = text.split("## Clips")[1]
    first, second, third = map(moving.caption, held_out_motions(3, 4))
    asked = section.split("### Failures")[0]
    assert asked.index(first) < asked.index(second)
    assert third not in asked
    assert "3 of 3 clips; here are the first 2." in section
    assert shown_on(section) == {"clip-01.webp", "clip-02.webp"}, "a failure is not written twice"
    with Image.open(tmp_path / "page" / "clip-01.webp") as clip:
        assert clip.n_frames > 1
    answers(assistant, monkeypatch)
    section = make(tmp_path, assistant, monkeypatch).split("## Clips")[1]
    assert section.count(" no clip |") == 2 * (2 + 2)  # shown and read, in both tables


def test_failures_of_clips_are_those_of_the_parser(tmp_path: Path) -> None:
    page, rng = Page(tmp_path / "page.md"), random.Random(3)
    motions = held_out_motions(4, 3)
    true = [Animated(m, f"Show {i}.", "", Clip(moving.animate(m, rng), 4.0)) for i, m in enumerate(motions)]
    asked = moving.Motion("circle", "red", "left", "", "grey")
    backwards = moving.animate(asked, rng)[::-1]
    made = Animated(asked, "Show it.", "", Clip(backwards, 4.0))
    gallery_clips.failures(page, [*true, made], 3)
    assert page.blocks[1].startswith("1 of 5 clips")
    assert f"{read_back(made.parsed)} | **wrong: direction** |" in page.blocks[2]
    assert read_back(made.parsed).startswith("red circle, moving ")
    assert read_back(made.parsed).endswith("to the right; grey background")
    gallery_clips.failures(page, true, 3)
    assert page.blocks[-1] == "The parser found none in 4 clips."


def test_what_a_clip_shows_is_said_even_where_it_is_unclear() -> None:
    assert read_back(NO_CLIP) == "no clip"
    white = Image.new("RGB", (64, 64), "white")
    still = [moving.picture([("star", "blue", 32, 32, 22)], "white")] * 4
    said = {
        read_back(Animated(moving.Motion("star", "blue", "up"), "", "", Clip(frames, 4.0)).parsed)
        for frames in (still, [*still, white])
    }
    assert said == {"blue star, still; white background", "no shape in some frames; white background"}


def test_the_files_of_a_page_are_small(tmp_path: Path) -> None:
    """Noise is the worst case of every format; the real page shows at most 24 sounds and 24 clips."""
    noise = np.random.default_rng(0)
    sound = Sound(noise.uniform(-0.5, 0.5, SAMPLES).astype(np.float32), SAMPLE_RATE)
    pixels = [Image.fromarray(noise.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(moving.FRAMES)]
    sizes = []
    for name, made in (
        ("a.mp3", at_rate(sound)),
        ("a.png", gallery_sounds.spectrogram(sound)),
        ("a.webp", Clip(pixels, 4.0)),
    ):
        made.save(tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    assert 24 * sum(sizes) < 1_200_000
