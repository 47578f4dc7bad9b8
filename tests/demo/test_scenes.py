"""Procedural scenes: geometry, pixels, words, questions and statements agree with each other."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

import scene_model
import scenes
from grammar_engine import normal, parse, text
from nlvr_pictures import read_picture
from scene_text import NUMBERS
from statements import grounded_statement, judge, scene_for, statement


def nlvr(*boxes: list[tuple[str, str, int, int, int]]) -> scenes.Scene:
    """A box scene from (shape, color, size, x, y) tuples relative to each box."""
    names = {"blue": "#0099ff", "black": "Black", "yellow": "Yellow"}
    keys = ("type", "color", "size", "x_loc", "y_loc")
    return scenes.scene_from_nlvr(
        [[dict(zip(keys, (s, names[c], *rest), strict=True)) for s, c, *rest in b] for b in boxes]
    )


SCATTER = nlvr(
    [("circle", "black", 20, 80, 30), ("triangle", "yellow", 10, 5, 90)],
    [("square", "blue", 30, 70, 70), ("square", "blue", 10, 20, 20), ("circle", "blue", 10, 50, 50)],
    [("circle", "yellow", 30, 10, 10)],
)
TOWER = nlvr(
    [("square", "black", 20, 40, 80), ("square", "blue", 20, 40, 59)],
    [("square", "yellow", 20, 40, 80)],
    [("square", "blue", 20, 40, 80), ("square", "black", 20, 40, 59), ("square", "yellow", 20, 40, 38)],
)


def test_seed_fixes_the_scene_and_kinds_are_obeyed() -> None:
    for kind in ("canvas", "scatter", "tower"):
        first, second = (scenes.sample_scene(random.Random(7), kind) for _ in range(2))
        assert first == second
        assert first.kind == kind
    assert scenes.sample_scene(random.Random(1), "box").kind in ("scatter", "tower")


def test_items_stay_inside_and_apart() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = scenes.sample_scene(rng)
        for k, item in enumerate(scene.items):
            x, y, w, h = next(b for b in scene.boxes if b[0] <= item.x < b[0] + b[2])
            assert x <= item.x
            assert item.x + item.size <= x + w
            assert y <= item.y
            assert item.y + item.size <= y + h
            assert all(scene_model.gap(item, other) >= 1 for other in scene.items[:k])
        assert sum(map(len, scenes.box_items(scene))) == len(scene.items)


def test_box_pictures_have_the_corpus_pixels() -> None:
    pixels = np.asarray(scenes.render(SCATTER))
    assert pixels.shape == (100, 400, 3)
    assert pixels[5, 5].tolist() == [211, 211, 211]
    assert pixels[5, 120].tolist() == [128, 128, 128]
    assert pixels[70:100, 220:250].reshape(-1, 3).tolist() == [[0, 153, 255]] * 900
    # Row of a 10 pixel triangle in the corpus: edge pixels covered to 25 % and 75 %.
    assert pixels[90, 5:15, 2].tolist() == pytest.approx([211, 211, 211, 211, 158, 158, 211, 211, 211, 211], abs=8)


def test_pictures_are_read_back_exactly() -> None:
    rng = random.Random(3)
    for kind in ("scatter", "tower"):
        for _ in range(15):
            scene = scenes.sample_scene(rng, kind)
            read = read_picture(scenes.render(scene))
            assert read.kind == kind
            assert set(read.items) == set(scene.items)


def test_canvas_shapes_cover_their_own_pixels() -> None:
    rng = random.Random(5)
    for _ in range(30):
        scene = scenes.sample_scene(rng, "canvas")
        pixels = np.asarray(scenes.render(scene))
        assert pixels.shape == (scene.height, scene.width, 3)
        for item in scene.items:
            assert pixels[item.y + item.size // 2, item.x + item.size // 2].tolist() == list(item.rgb)


def test_description_holds_every_fact() -> None:
    assert scenes.describe(TOWER) == (
        "left box: tower of two blocks: black, blue. middle box: tower of one block: yellow. "
        "right box: tower of three blocks: blue, black, yellow."
    )
    described = scenes.describe(SCATTER)
    assert described.startswith(
        "left box: two items: small yellow triangle bottom left touching bottom wall; "
        "medium black circle right touching right wall. middle box: three items: small blue square top left;"
    )
    assert "big blue square bottom right touching right and bottom wall" in described


def test_questions_are_answered_by_the_scene() -> None:
    rng = random.Random(2)
    types: Counter[str] = Counter()
    for _ in range(150):
        scene = scenes.sample_scene(rng)
        for kind, question, answer in scenes.questions(scene, rng, 4):
            types[kind] += 1
            counts = Counter(i.color for i in scene.items)
            if kind == "count" and question.startswith("How many") and question.endswith("are there?"):
                named = question.split()[2]
                if named in counts and question.split()[3] in ("items", "blocks", "things", "shapes", "objects"):
                    assert answer == NUMBERS[counts[named]]
            if kind == "color":
                assert answer in counts
            if kind == "existence":
                assert answer in ("yes", "no")
    assert set(types) == set(scenes.TYPES)


@pytest.mark.parametrize(
    ("sentence", "scene", "truth"),
    [
        ("There are exactly three blue items", SCATTER, True),
        ("there is a box with only blue items", SCATTER, True),
        ("There is a black item closely touching right wall of a box", SCATTER, True),
        ("There is a circle touching a corner", SCATTER, False),
        ("There is a square closely touching a corner of a box.", SCATTER, True),
        ("none of the yellow objects are touching any edge", SCATTER, False),
        ("There is a box with 2 items of 2 different colors", SCATTER, True),
        ("There is a box with a blue circle and two blue squares", SCATTER, True),
        ("There are at least 2 boxes with a small item", SCATTER, True),
        ("There are at least 3 boxes with a small item", SCATTER, False),
        ("There is a tower with a black block over a blue block", TOWER, True),
        ("There is a tower with a yellow block over a blue block", TOWER, False),  # "over" means directly over
        ("There is a blue block as the top of a tower with exactly two blocks", TOWER, True),
        ("There is exactly one tower with a blue block at the base", TOWER, True),
        ("There is a yellow tower", TOWER, True),
        ("the tower with three blocks has a black block at the top", TOWER, False),
        ("There are two towers with the same height", TOWER, False),
    ],
)
def test_sentences_are_judged_as_people_would(sentence: str, scene: scenes.Scene, truth: bool) -> None:
    assert judge(sentence, scene) is truth


def test_unreadable_sentences_are_not_judged() -> None:
    assert judge("the weather is fine", SCATTER) is None
    assert scene_for("the weather is fine", "scatter", random.Random(0)) is None


def test_statements_are_balanced_and_true_to_their_scene() -> None:
    rng = random.Random(4)
    for kind in ("scatter", "tower"):
        truths = []
        for _ in range(80):
            scene, sentence, truth = grounded_statement(rng, kind)
            judged = judge(sentence, scene)
            assert judged in (truth, None)  # repaired articles are the only wordings it may fail to read
            truths.append(truth)
        assert 24 <= sum(truths) <= 56
    scene = scenes.sample_scene(rng, "scatter")
    assert 20 <= sum(statement(scene, rng)[1] for _ in range(80)) <= 60
    with pytest.raises(ValueError, match="canvas"):
        statement(scenes.sample_scene(rng, "canvas"), rng)


def test_scene_for_a_written_sentence_gets_both_truths() -> None:
    rng = random.Random(6)
    sentence = "There is a box with exactly three yellow items"
    made = [scene_for(sentence, "scatter", rng) for _ in range(30)]
    assert {judge(sentence, m[0]) == m[1] for m in made if m} == {True}
    assert {m[1] for m in made if m} == {True, False}


def test_parsing_gives_the_sentence_back() -> None:
    sentence = normal("There is a tower with 2 blue blocks stacked together.")
    node = parse(sentence)
    assert node is not None
    assert text(node) == sentence
