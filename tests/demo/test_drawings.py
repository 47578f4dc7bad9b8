"""Drawings: what is asked for, what is drawn, what the parser reads, and what is said about it agree."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

import drawing_data
import drawing_facts
import drawing_talk
import drawing_trials
import drawings
import train_image_generator
from drawings import Group, Wish
from picture_parser import parse
from real_sets import Writer
from scene_model import render

from mmllm.config.base import BuildContext
from mmllm.generators.image import StableDiffusionConfig


def test_the_parser_reads_every_true_drawing_without_fault() -> None:
    rng = random.Random(5)
    for _ in range(500):
        wish = drawings.sample_wish(rng)
        picture = np.asarray(render(drawings.place_items(wish, rng)))
        assert all(drawing_facts.facts(wish, parse(picture)).values()), drawings.caption(wish)


def test_the_parser_sees_what_is_wrong() -> None:
    rng = random.Random(6)
    wish = Wish((Group(1, "red", "circle", "on the left"), Group(1, "blue", "star", "on the right")))
    picture = np.asarray(render(drawings.place_items(wish, rng)))
    mirrored = drawing_facts.facts(wish, parse(picture[:, ::-1].copy()))
    assert mirrored["kinds"]
    assert not mirrored["places"]
    assert not mirrored["all"]
    swapped = drawing_facts.facts(wish, parse(picture[:, :, ::-1].copy()))
    assert not swapped["kinds"]
    empty = drawing_facts.facts(wish, parse(np.full((64, 64, 3), 255, np.uint8)))
    assert empty["background"]
    assert not empty["kinds"]
    assert not empty["places"]
    above = Wish(tuple(Group(1, *kind) for kind in (("red", "circle"), ("blue", "star"))), "above")
    found = drawing_facts.facts(above, parse(np.asarray(render(drawings.place_items(above, rng)))[::-1].copy()))
    assert not found["relations"]


def test_small_blots_and_noise_do_not_count_as_shapes() -> None:
    rng = np.random.default_rng(0)
    wish = Wish((Group(2, "green", "square"),), "", "grey")
    picture = np.asarray(render(drawings.place_items(wish, random.Random(1)))).astype(int)
    noisy = np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
    noisy[:2, :2] = (255, 0, 0)
    assert drawing_facts.facts(wish, parse(noisy))["all"]


def test_a_wish_is_for_the_test_or_for_training_whatever_the_order_of_its_groups() -> None:
    rng = random.Random(7)
    sampled = [drawings.sample_wish(rng) for _ in range(3000)]
    share = sum(map(drawings.held_out, sampled)) / len(sampled)
    assert 0.05 < share < 0.12
    for wish in sampled:
        if not wish.relation:
            assert drawings.held_out(Wish(wish.groups[::-1], "", wish.background)) == drawings.held_out(wish)


def test_no_dialogue_of_the_training_asks_for_a_wish_of_the_test(tmp_path: Path) -> None:
    rng, writer = random.Random(8), Writer(tmp_path, "drawings")
    wanted = [wish for _ in range(400) for _, _, wish in drawing_talk.drawing_turns(rng) if wish is not None]
    assert wanted
    assert not any(map(drawings.held_out, wanted))
    rows = [maker(rng, writer) for maker in (drawing_data.redrawn, drawing_data.drawing_by_ear) for _ in range(40)]
    rows += [drawing_data.drawing(rng, writer) for _ in range(20)]
    shown = [part for row in rows for m in row["messages"] if m["role"] == "assistant" for part in m["content"]]
    assert all((tmp_path / part["path"]).is_file() for part in shown if isinstance(part, dict) and "path" in part)
    held_out = {drawings.caption(wish) for wish in (drawings.wishes(rng, test=True) for _ in range(4000))}
    assert not held_out & {part["caption"] for part in shown if isinstance(part, dict) and "caption" in part}


def test_a_change_changes_what_it_says() -> None:
    rng, seen = random.Random(9), set()
    for _ in range(2000):
        wish = drawings.wishes(rng, test=False)
        changed = drawing_talk.edit(wish, rng)
        if changed is None:
            continue
        text, after = changed
        assert after != wish
        assert sum(drawing_facts.kinds(after).values()) <= drawings.MOST_ITEMS
        assert len(set(drawing_facts.kinds(after))) == len(after.groups)
        assert all(group.color != after.background for group in after.groups)
        if text.startswith("Remove"):
            assert drawing_facts.kinds(after) < drawing_facts.kinds(wish)
        if "background" in text:
            assert after.background in text
            assert drawing_facts.kinds(after) == drawing_facts.kinds(wish)
        seen.add(text.split()[0])
    assert {"Remove", "Add", "Put", "Turn", "Make"} <= seen


def test_a_change_leads_to_the_side_that_is_asked_for() -> None:
    rng = random.Random(11)
    wanted = [drawings.wishes(rng, test=True) for _ in range(200)]
    for test in (True, False):
        changed = [drawing_talk.edit(wish, rng, test) for wish in wanted for _ in range(10)]
        assert {drawings.held_out(change[1]) for change in changed if change} == {test}


def test_as_many_shapes_are_drawn_as_are_heard(tmp_path: Path) -> None:
    row = drawing_data.drawing_by_ear(random.Random(10), Writer(tmp_path, "ear"))
    (question, answer) = row["messages"]
    assert [part["type"] for part in question["content"]] == ["audio", "text"]
    assert answer["content"][0]["text"] == f"Here you go: {answer['content'][1]['caption']}."


def test_the_generator_is_trained_resumed_and_loaded_by_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_image_generator, "WIDTHS", (32, 32))
    monkeypatch.setattr(train_image_generator, "BANK", 128)
    output = tmp_path / "draw"
    argv = ["train_image_generator.py", "--output", str(output), "--text-steps", "3", "--resume", "--minutes"]
    monkeypatch.setattr(sys, "argv", [*argv, "0.02"])
    train_image_generator.main()
    steps = json.loads((output / "training.json").read_text())["step"]
    monkeypatch.setattr(sys, "argv", [*argv, "0.04"])
    train_image_generator.main()
    assert json.loads((output / "training.json").read_text())["step"] > steps
    generator = StableDiffusionConfig(pretrained=str(output), steps=2, seed=0).build(BuildContext())
    assert generator is not None
    assert generator.condition_shape == {"text": (train_image_generator.LENGTH, train_image_generator.TEXT_WIDTH)}
    wish = drawings.wishes(random.Random(0), test=True)
    (picture,) = drawing_trials.ceiling(generator, [wish], seed=0)
    assert picture.size == (drawings.SIDE, drawings.SIDE)
