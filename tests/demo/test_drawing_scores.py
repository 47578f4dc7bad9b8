"""The scores of drawings: shares, ratios, neighbours in the training, seconds, and how the model card tells them."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parents[2] / "demo"), str(Path(__file__).parent)]

import drawing_card
import evaluate_drawing
import package_embedded
from drawing_facts import NOTHING, facts, ratio, read, read_back, wrong
from drawing_speed import meanwhile, speed
from drawings import Group, Wish, caption, held_out, place_items, training_round, wishes
from nearest_drawings import TrainingDrawings, nearness
from PIL import Image
from scene_model import render
from score_card import found_in
from scripted import WORDS, answers, tiny_assistant

import mmllm
from mmllm.assistant import EMBEDDED
from mmllm.generators.tiny import tiny_pipeline
from mmllm.replies import Media

RED, BLUE = ("red", "circle"), ("blue", "star")
FEW = ["--count", "3", "--changes", "2", "--decisions", "12", "--timed", "1", "--searched", "40"]


@pytest.fixture(scope="module")
def training() -> TrainingDrawings:
    return TrainingDrawings(60, seed=3)


def test_no_picture_fulfils_nothing() -> None:
    wish = Wish((Group(1, *RED, "on the left"), Group(1, *BLUE)))
    assert set(facts(wish, NOTHING)) == {"kinds", "background", "places", "position", "all"}
    assert not any(facts(wish, NOTHING).values())
    assert read_back(NOTHING) == "no picture"


def test_only_places_that_are_asked_for_are_judged_and_position_is_places_or_relations() -> None:
    rng = random.Random(1)
    wish = Wish((Group(1, *RED, "at the top"), Group(1, *BLUE)))
    found = facts(wish, read(render(place_items(wish, rng))))
    assert found["places"]
    assert found["position"]
    beside = Wish((Group(1, *RED), Group(1, *BLUE)), "left of")
    mirrored = read(render(place_items(beside, rng)).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert facts(beside, mirrored)["position"] is False
    assert wrong(facts(beside, mirrored)) == "relations"


def test_what_is_read_back_says_every_shape_and_its_place() -> None:
    wish = Wish((Group(1, *RED, "on the left"), Group(1, "orange", "square", "at the bottom right")), "", "grey")
    read_aloud = read_back(read(render(place_items(wish, random.Random(2)))))
    assert read_aloud == "a red circle on the left, an orange square at the bottom right; grey background"


def test_a_ratio_is_of_the_same_wishes_and_its_interval_holds_it() -> None:
    theirs = [{"all": i < 8, "places": True} if i % 2 else {"all": i < 8} for i in range(10)]
    ours = [{"all": i < 6, "places": i < 4} if i % 2 else {"all": i < 6} for i in range(10)]
    found = ratio(ours, theirs)
    assert found["all"]["share"] == pytest.approx(6 / 8)
    assert found["places"] == {"n": 5, "share": pytest.approx(2 / 5), "interval": found["places"]["interval"]}
    low, high = found["all"]["interval"]
    assert 0.3 < low < 0.75 < high <= 1.0
    assert ratio(ours, ours)["all"]["interval"] == [1.0, 1.0]
    assert "all" not in ratio(ours, [{"all": False}] * 10)


def test_the_training_is_drawn_again_as_the_trainer_draws_it_and_holds_no_wish_of_the_test(
    training: TrainingDrawings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(held_out(wish) for wish, _ in training.drawn)
    monkeypatch.setattr("nearest_drawings.BANK", 30)
    rounds = TrainingDrawings(45, seed=3).drawn
    assert rounds == training_round(3, 0, 30) + training_round(3, 1, 10) + training_round(3, 2, 10)[:5]


def test_a_training_picture_is_its_own_neighbour(training: TrainingDrawings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearest_drawings.CHUNK", 16)
    pictures = [render(scene) for _, scene in training.drawn]
    for one, near in zip(pictures, training.by_pixels(pictures), strict=True):
        assert near.measure == 0.0
        assert np.array_equal(np.asarray(near.picture()), np.asarray(one))


def test_the_neighbour_is_the_nearest_of_all(training: TrainingDrawings) -> None:
    other = render(place_items(wishes(random.Random(0), test=True), random.Random(0)))
    far = [
        np.sqrt(np.square(np.asarray(other, float) - np.asarray(render(scene), float)).mean())
        for _, scene in training.drawn
    ]
    (near,) = training.by_pixels([other])
    assert near.measure == pytest.approx(min(far), rel=1e-5)
    assert near.scene == training.drawn[int(np.argmin(far))][1]


def test_the_same_in_other_words_is_the_same(training: TrainingDrawings) -> None:
    wish = next(wish for wish, _ in training.drawn if wish.relation)
    names = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    mirrored = Wish(wish.groups[::-1], names[wish.relation], wish.background)
    swapped = Wish(wish.groups[::-1], wish.relation, wish.background)
    assert training.by_facts(mirrored).wish == wish
    assert training.by_facts(mirrored).measure == 1.0
    assert training.by_facts(swapped).measure < 1.0
    white = Image.new("RGB", (64, 64), (255, 255, 255))
    found = nearness(training, [mirrored, swapped, wish], [], [white])
    assert (found["captions that occur"], found["captions that occur in other words"]) == (1, 1)
    assert found["pictures made"] is None


class Talker:
    """Streams two words, a picture and one word more. The picture is done after ``waits`` deltas of later replies."""

    def __init__(self, waits: int, makes: bool = True) -> None:
        self.waits, self.makes, self.left = waits, makes, list[Media]()
        self.pool = ThreadPoolExecutor(1)

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> Iterator[str | Media]:
        if self.left:
            for count in range(1, 6):
                if count > self.waits:
                    self.finish()
                yield "word "
            return
        yield "Here "
        yield "it is."
        if self.makes:
            media = Media("image", ".png")
            self.left.append(media)
            if not self.waits:
                self.finish()
            yield media
            yield " Nice?"

    def finish(self) -> None:
        for media in self.left:
            media._future.set_result(Image.new("RGB", (2, 2)))
        self.left = []


def test_text_that_comes_while_a_picture_is_made_is_counted_and_later_text_is_not() -> None:
    assert meanwhile(Talker(waits=2), ["a", "b"], 0) == {
        "pictures": 2,
        "deltas of the same reply": 2,
        "pictures with deltas of another reply": 2,
        "deltas of another reply": 4,
    }
    assert meanwhile(Talker(waits=0), ["a"], 0) == {
        "pictures": 1,
        "deltas of the same reply": 0,
        "pictures with deltas of another reply": 0,
        "deltas of another reply": 0,
    }
    assert meanwhile(Talker(waits=0, makes=False), ["a"], 0)["pictures"] == 0


def test_seconds_are_those_of_replies_with_a_picture_after_the_first() -> None:
    found = speed(Talker(waits=0), ["warm", "a", "b"], 0, "image")
    assert (found["n"], found["without a picture"]) == (2, 0)
    assert 0 <= found["first word"] <= found["picture"] + 0.01 <= found["slowest"] + 0.01
    assert speed(Talker(waits=0, makes=False), ["a", "b"], 0, "image")["without a picture"] == 2
    pictures_instead = speed(Talker(waits=0), ["a", "b"], 0, "audio")
    assert (pictures_instead["without a sound"], pictures_instead["sound"]) == (2, None)


def test_a_whole_evaluation_and_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = tiny_assistant("image")
    answers(assistant, monkeypatch, "image")
    monkeypatch.setattr(mmllm, "load", lambda name: assistant, raising=False)
    monkeypatch.setattr(
        sys, "argv", ["evaluate_drawing.py", "--model", "x", "--output", str(tmp_path / "scores"), *FEW]
    )
    evaluate_drawing.main()
    report = json.loads((tmp_path / "scores" / "drawing.json").read_text())
    assert report["assistant"]["kinds"]["n"] == report["ceiling"]["kinds"]["n"] == 3
    assert report["words"]["caption"]["share"] == 0.0  # it always says WORDS
    assert sum(found["n"] for found in report["by shapes"].values()) == 3
    assert report["changes"]["all"]["n"] in (1, 2)  # not every wish can be changed to another of the test
    assert 0 < report["decision"]["right modality"]["share"] < 1  # it always draws
    assert [one["reply"] for one in report["failures"]] == [WORDS] * 3
    assert set(report["seconds"]) >= {"ceiling", "assistant", "cycle", "decision", "speed", "nearest"}
    text = drawing_card.section(found_in(tmp_path, "drawing.json"))
    assert "| exactly the shapes asked for | ≥ 90% | 0.0%" in text
    assert text.count("**no**") >= 3
    assert "Failures: 3; all of them." in text
    assert "training pictures" in text


def test_a_generator_alone_is_scored_and_an_assistant_without_pictures_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_pipeline("StableDiffusionPipeline").save_pretrained(tmp_path / "draw")
    argv = ["evaluate_drawing.py", *FEW, "--output", str(tmp_path / "scores"), "--model"]
    monkeypatch.setattr(sys, "argv", [*argv, str(tmp_path / "draw")])
    evaluate_drawing.main()
    report = json.loads((tmp_path / "scores" / "drawing.json").read_text())
    assert set(report) == {"seconds", "ceiling"}
    assert "The generator alone was evaluated" in drawing_card.section(report)
    monkeypatch.setattr(mmllm, "load", lambda name: tiny_assistant(), raising=False)
    monkeypatch.setattr(sys, "argv", [*argv, "mute"])
    with pytest.raises(SystemExit, match="mute makes text alone"):
        evaluate_drawing.main()


def score(share: float) -> dict[str, Any]:
    return {"n": 100, "share": share, "interval": [share, share]}


def test_the_card_says_which_aims_are_met_missed_and_not_measured(tmp_path: Path) -> None:
    good = {name: score(0.96) for name in ("kinds", "position", "all")}
    report: dict[str, Any] = {
        "seconds": {"ceiling": 1.0}, "ceiling": good, "assistant": good | {"kinds": score(0.89)}, "ratio": {"kinds": score(0.93)},
        "words": {"caption": score(1.0)}, "cycle": {"as asked": score(0.85)}, "decision": {"right modality": score(0.99)},
        "leaks": ["a <|b|>"],
    }  # fmt: skip
    rows = {line.split(" | ")[0].strip("| "): line for line in drawing_card.section(report).splitlines()}
    assert rows["exactly the shapes asked for"].endswith("| **no** |")
    assert rows["right position"].endswith("| yes |")
    assert rows["shapes, of what the generator reaches by itself"].endswith("| **no** |")
    assert rows["position, of what the generator reaches by itself"].endswith("| not measured |")
    assert rows["draws, then describes what was asked for"].endswith("| yes |")
    assert rows["signs of signal tokens in a text"].endswith("| 1 | **no** |")
    assert rows["a 64 x 64 picture on two cores, median seconds"].endswith("| not measured |")
    assert "- `a </b/>`" in drawing_card.section(report)
    nothing = report | {"ceiling": {"kinds": score(0.0)}, "ratio": {}}
    assert "**no**, the generator gets none right" in drawing_card.section(nothing)
    for name in ("scores.a", "scores.b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "drawing.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"scores\.a/drawing\.json, scores\.b/drawing\.json: one report is expected"):
        found_in(tmp_path, "drawing.json")
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "drawing.json").write_text(json.dumps(nothing))
    assert found_in(tmp_path, "drawing.json") == nothing


def test_the_model_card_has_the_scores_of_drawings(tmp_path: Path) -> None:
    assert "### Drawings" in package_embedded.card(tmp_path, EMBEDDED, 0)
    (tmp_path / "scores").mkdir()
    wish = wishes(random.Random(1), test=True)
    failed = {"asked": f"Paint {caption(wish)}.", "reply": "Here | you go", "read": "nothing", "wrong": "kinds"}
    scores = {"kinds": score(0.5)}
    report = {
        "seconds": {}, "ceiling": scores, "assistant": scores, "words": {}, "cycle": {}, "decision": {}, "leaks": [],
        "failures": [failed] * 12,
    }  # fmt: skip
    (tmp_path / "scores" / "drawing.json").write_text(json.dumps(report))
    text = package_embedded.card(tmp_path, EMBEDDED, 0)
    assert "≥ 90% | 50.0% (50.0% – 50.0%) | **no** |" in text
    assert "Failures: 12; the first 10" in text
    assert text.count("Here / you go") == 10
