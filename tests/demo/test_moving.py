"""Clips: what is asked for, what is animated, what the parser reads, and what is said about it agree."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

import clip_trials
import drawings
import evaluate_clips
import make_data
import moving
import moving_data
import moving_talk
import train_video_generator
from caption_encoder import build_tokenizer
from clip_parser import parse_clip
from moving import Motion
from real_sets import Writer

from mmllm.config.base import BuildContext
from mmllm.generators.base import Clip
from mmllm.generators.video import VideoDiffusionConfig
from mmllm.processing.sources import Limits
from mmllm.processing.video import decode_video


def shot(motion: Motion, seed: int = 0) -> list[Image.Image]:
    return moving.animate(motion, random.Random(seed))


def judged(motion: Motion, frames: list[Image.Image]) -> dict[str, bool]:
    return clip_trials.facts(motion, clip_trials.read(Clip(frames, 4.0)))


def test_the_parser_reads_every_true_clip_without_fault() -> None:
    rng = random.Random(5)
    for _ in range(150):
        motion = moving.sample_motion(rng)
        assert all(judged(motion, moving.animate(motion, rng)).values()), moving.caption(motion)
    for move in moving.MOVES:
        for pace in moving.PACES[1:] if move in moving.DIRECTIONS else ("",):
            motion = Motion("star", "blue", move, pace, "grey")
            parsed = parse_clip([np.asarray(frame) for frame in moving.animate(motion, rng)])
            assert (parsed.move, parsed.pace) == (move, pace)


def test_the_parser_reads_through_a_generators_blur_and_noise() -> None:
    rng, numbers = random.Random(6), np.random.default_rng(6)
    for _ in range(30):
        motion = moving.sample_motion(rng)
        soft = [frame.resize((40, 40), Image.Resampling.BILINEAR).resize((64, 64)) for frame in shot(motion)]
        noisy = [np.asarray(frame) + numbers.normal(0, 5, (64, 64, 3)) for frame in soft]
        found = judged(motion, [Image.fromarray(frame.clip(0, 255).astype(np.uint8)) for frame in noisy])
        assert found["direction and shape"], moving.caption(motion)


def test_the_parser_sees_what_is_wrong() -> None:
    motion = Motion("triangle", "red", "left", "quickly")
    frames = shot(motion)
    backwards = judged(motion, frames[::-1])
    assert backwards["shape"]
    assert backwards["color"]
    assert not backwards["direction"]
    assert not backwards["all"]
    assert not judged(motion, shot(replace(motion, move="left and back", pace="")))["direction"]
    assert not judged(motion, shot(replace(motion, pace="slowly")))["pace"]
    assert not judged(motion, shot(replace(motion, color="blue")))["color"]
    assert not judged(motion, shot(replace(motion, shape="square")))["shape"]
    assert not judged(motion, [frames[0]] * moving.FRAMES)["direction"]
    shuffled = [frames[k] for k in (0, 3, 1, 6, 2, 5, 4, 7)]
    assert not judged(motion, shuffled)["direction"]
    turned = [frame.rotate(45, fillcolor="white") for frame in shot(replace(motion, shape="circle"))]
    assert not judged(replace(motion, shape="circle"), turned)["direction"]
    vanished = [*frames[:3], Image.new("RGB", (64, 64), "white"), *frames[4:]]
    assert not judged(motion, vanished)["alone"]
    two = [frame.copy() for frame in frames]
    two[2].paste((0, 0, 255), (2, 2, 14, 14))
    assert not judged(motion, two)["alone"]
    assert not any(clip_trials.facts(motion, clip_trials.read(None)).values())


def test_a_motion_without_pace_may_take_any() -> None:
    motion = Motion("circle", "green", "up")
    assert all(judged(motion, shot(replace(motion, pace=pace)))["all"] for pace in ("slowly", "quickly"))
    assert moving.caption(motion) == "a green circle moving upwards"


def test_every_caption_says_everything_and_a_twelfth_is_held_out() -> None:
    rng = random.Random(7)
    sampled = [moving.sample_motion(rng) for _ in range(3000)]
    assert len({moving.caption(motion) for motion in sampled}) == len(set(sampled))
    assert 0.05 < sum(map(moving.held_out, sampled)) / len(sampled) < 0.12
    tokenizer = build_tokenizer([moving.caption(motion) for motion in sampled], 77)
    longest = max(len(tokenizer(moving.caption(motion)).input_ids) for motion in sampled)
    assert longest <= train_video_generator.LENGTH


def test_no_dialogue_of_the_training_asks_for_a_motion_of_the_test() -> None:
    rng = random.Random(8)
    turns = [turn for _ in range(800) for turn in moving_talk.moving_turns(rng)]
    assert not any(moving.held_out(motion) for _, _, motion in turns if motion is not None)
    assert {text for _, text, motion in turns if motion is None}
    for _, text, motion in turns:
        assert motion is None or moving.caption(motion) in text
    asked = [form.format("X") for form in moving_talk.REQUESTS]
    assert not {form.format("X") for form in moving_talk.HELD_OUT_REQUESTS} & set(asked)


def test_a_change_changes_what_it_says() -> None:
    rng, changed = random.Random(9), set()
    for _ in range(3000):
        motion = moving.motions(rng, test=False)
        result = moving_talk.edit(motion, rng)
        if result is None:
            continue
        text, after = result
        assert after != motion
        assert after.color != after.background
        assert after.pace == "" or after.move in moving.DIRECTIONS
        differs = {name for name in ("shape", "color", "background") if getattr(after, name) != getattr(motion, name)}
        assert len(differs) <= 1
        for name in differs:
            assert getattr(after, name) in text
            assert (after.move, after.pace) == (motion.move, motion.pace)
            changed.add(name)
        if not differs:
            changed.add((after.move == motion.move, after.pace == motion.pace))
    assert {"shape", "color", "background", (False, True), (True, False)} <= changed


def test_the_files_of_the_dialogues_are_the_clips_that_they_say(tmp_path: Path) -> None:
    rng, writer = random.Random(10), Writer(tmp_path, "clips")
    makers = (moving_data.animation, moving_data.drawn_and_animated, moving_data.animated_and_drawn)
    rows = [maker(rng, writer) for maker in makers for _ in range(6)]
    rows.append(moving_data.animation_words(rng, writer))
    parts = [
        part for row in rows for m in row["messages"] if not isinstance(m["content"], str) for part in m["content"]
    ]
    seen = {(part["type"], "path" in part) for part in parts}
    assert {("video", True), ("image", True)} <= seen
    for part in parts:
        if part["type"] == "video" and "path" in part:
            decoded = decode_video((tmp_path / part["path"]).read_bytes(), Limits(), frames=moving.FRAMES)
            parsed = parse_clip([np.asarray(frame) for frame in decoded])
            assert f"{parsed.color} {parsed.shape} " in part["caption"]
            assert moving.moving(parsed.move) in part["caption"].replace("slowly ", "").replace("quickly ", "")
    assert {"animation", "animation_words", "drawn_and_animated", "animated_and_drawn"} <= set(make_data.MAKERS)


def test_what_is_drawn_of_a_clip_is_no_wish_of_the_test(tmp_path: Path) -> None:
    rng, writer = random.Random(11), Writer(tmp_path, "both")
    held_out = {drawings.caption(wish) for wish in (drawings.wishes(rng, test=True) for _ in range(4000))}
    for _ in range(25):
        for maker in (moving_data.drawn_and_animated, moving_data.animated_and_drawn):
            replies = [m["content"] for m in maker(rng, writer)["messages"] if m["role"] == "assistant"]
            drawn = [parts[1] for parts in replies if not isinstance(parts, str)]
            assert {part["type"] for part in drawn} == {"image", "video"}
            assert not held_out & {part["caption"] for part in drawn if part["type"] == "image"}


def test_the_generator_is_trained_resumed_loaded_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_video_generator, "WIDTHS", (16, 16))
    monkeypatch.setattr(train_video_generator, "BANK", 8)
    monkeypatch.setattr(train_video_generator, "BATCH", 8)
    output = tmp_path / "clips"
    argv = ["train_video_generator.py", "--output", str(output), "--text-steps", "3", "--resume", "--minutes"]
    monkeypatch.setattr(sys, "argv", [*argv, "0.02"])
    train_video_generator.main()
    steps = json.loads((output / "training.json").read_text())["step"]
    monkeypatch.setattr(sys, "argv", [*argv, "0.08"])
    train_video_generator.main()
    assert json.loads((output / "training.json").read_text())["step"] > steps
    generator = VideoDiffusionConfig(pretrained=str(output), num_frames=moving.FRAMES).build(BuildContext())
    assert generator is not None
    assert generator.condition_shape == {"text": (train_video_generator.LENGTH, train_video_generator.TEXT_WIDTH)}
    scores = tmp_path / "scores"
    argv = ["evaluate_clips.py", "--model", str(output), "--output", str(scores), "--count", "3", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    evaluate_clips.main()
    report = json.loads((scores / "clips.json").read_text())
    assert report["ceiling"]["direction and shape"]["n"] == 3
    with Image.open(scores / "clips-ceiling.png") as rows:
        assert rows.size == (moving.FRAMES * (moving.SIDE + 4), 3 * (moving.SIDE + 4))
