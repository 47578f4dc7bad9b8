"""The model card's sections about sounds and clips, and the evaluation of clips that one of them tells."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parents[2] / "demo"), str(Path(__file__).parent)]

import clip_card
import drawing_card
import evaluate_clips
import evaluate_sounds
import package_embedded
import score_card
import sound_card
from safetensors.torch import save_file
from score_card import found_in
from scripted import WORDS, answers, tiny_assistant
from sound_judge import Judge

import mmllm
from mmllm.assistant import EMBEDDED

NOT_EVALUATED = "Not evaluated.\n"


def score(share: float, n: int = 100) -> dict[str, Any]:
    return {"n": n, "share": share, "interval": [share, share]}


def sounds() -> dict[str, Any]:
    """A report in which every aim is met, just."""
    facts = {name: score(0.9) for name in ("one digit", "several digits", "kind", "facts of a sound", "all")}
    return {
        "judge": facts | {"one digit": score(0.97), "all": score(0.9, 600)}, "ceiling": facts, "assistant": facts,
        "ratio": {name: score(1.0) for name in facts}, "words": {"caption": score(1.0)},
        "speed": {"sound": 4.0, "n": 10, "threads": 2}, "failures": [], "seconds": {"ceiling": 1.0},
    }  # fmt: skip


def rows_of(text: str) -> dict[str, str]:
    """Lines of the tables by their first cell; of equal ones the first."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        found.setdefault(line.split(" | ")[0].strip("| "), line)
    return found


AIMS = {
    "one digit: \"say seven\"": ("assistant", "one digit", score(0.89)),
    "kind of sound": ("assistant", "kind", score(0.89)),
    "a one-second sound on two cores, median seconds (taken with 2 seconds of sound)": ("speed", "sound", 4.1),
}  # fmt: skip


@pytest.mark.parametrize("aim", AIMS)
def test_every_aim_of_sounds_is_met_missed_or_not_measured(aim: str) -> None:
    report = sounds()
    assert rows_of(sound_card.section(report))[aim].endswith("| yes |")
    part, fact, value = AIMS[aim]
    missed = report | {part: report[part] | {fact: value}}
    assert rows_of(sound_card.section(missed))[aim].endswith("| **no** |")
    others = [line for name, line in rows_of(sound_card.section(missed)).items() if name in AIMS and name != aim]
    assert all(line.endswith("| yes |") for line in others)
    alone = {"ceiling": report["ceiling"], "seconds": {}}
    assert rows_of(sound_card.section(alone))[aim].endswith("| not measured |")
    assert "The generator alone was evaluated" in sound_card.section(alone)


def test_the_facts_of_sounds_stand_beside_what_the_judge_hears_in_true_ones() -> None:
    report = sounds()
    text = sound_card.section(report)
    assert "| fact | n | true sounds | generator, its own text encoder | assistant | assistant / generator |" in text
    assert "| one digit | 100 | 97.0% (97.0% – 97.0%) | 90.0% (90.0% – 90.0%) |" in text
    assert "(n = 600)" in text
    assert "Failures: none." in text
    assert "One request: sound 4.0, n 10, threads 2." in text
    without = sound_card.section({name: value for name, value in report.items() if name != "judge"})
    assert "| one digit | 100 | – | 90.0%" in without
    kinds = {**report, "ceiling": report["ceiling"] | {"bell": score(0.7, 9)}}
    assert "| bell | 9 | – | 70.0% (70.0% – 70.0%) | – | – |" in sound_card.section(kinds)


def test_what_no_generator_reaches_is_no_aim_reached() -> None:
    aim = score_card.at_least("x", "ratio", "all", 0.5)
    assert aim.judge({"ceiling": {"all": score(0.0)}, "ratio": {}}) == ("–", "**no**, the generator gets none right")
    assert aim.judge({"ceiling": {"all": score(0.1)}}) is None
    assert score_card.seconds("x", "sound", 4.0).judge({"speed": {"sound": None, "threads": 1}})[1] == "**no**"


def test_clips_are_scored_and_their_card_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = tiny_assistant("video")
    answers(assistant, monkeypatch, "video")
    monkeypatch.setattr(mmllm, "load", lambda name: assistant, raising=False)
    argv = ["x", "--model", "y", "--output", str(tmp_path / "scores"), "--count", "3", "--timed", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    evaluate_clips.main()
    report = json.loads((tmp_path / "scores" / "clips.json").read_text())
    assert report["assistant"]["direction and shape"]["n"] == report["ceiling"]["all"]["n"] == 3
    assert report["words"]["caption"]["share"] == 0.0  # it always says WORDS
    assert [one["reply"] for one in report["failures"]] == [WORDS] * 3
    assert all(set(one) == {"asked", "reply", "read", "wrong"} and one["wrong"] for one in report["failures"])
    assert (report["speed"]["n"], report["speed"]["without a clip"]) == (1, 0)
    assert report["speed"]["clip"] > 0
    assert set(report["seconds"]) == {"ceiling", "assistant", "speed"}
    text = clip_card.section(found_in(tmp_path, "clips.json"))
    assert "| direction and shape | ≥ 85% | 0.0%" in text
    assert rows_of(text)["direction and shape"].endswith("| **no** |")
    assert "Failures: 3; all of them." in text
    met = report | {"assistant": {"direction and shape": score(0.85)}}
    assert rows_of(clip_card.section(met))["direction and shape"].endswith("| yes |")
    with monkeypatch.context() as patch:
        patch.setattr(mmllm, "load", lambda name: tiny_assistant(), raising=False)
        with pytest.raises(SystemExit, match="y makes text alone: there are no clips to score"):
            evaluate_clips.main()


def test_the_model_card_has_a_section_for_each_modality(tmp_path: Path) -> None:
    for part in (drawing_card, sound_card, clip_card):
        assert part.section(None) == NOT_EVALUATED
    text = package_embedded.card(tmp_path, EMBEDDED, 0)
    parts = [text.split(f"### {name}\n")[1].split("\n#")[0] for name in ("Drawings", "Sounds", "Clips")]
    assert all(part.rstrip().endswith(NOT_EVALUATED.strip()) for part in parts)
    (tmp_path / "scores").mkdir()
    failed = {"asked": "Play | it.", "reply": "Listen.", "heard": "a bell", "wrong": "kind"}
    report = sounds() | {"failures": [failed] * 12}
    (tmp_path / "scores" / "sounds.json").write_text(json.dumps(report))
    text = package_embedded.card(tmp_path, EMBEDDED, 0)
    section = text.split("### Sounds\n")[1].split("### Clips\n")[0]
    assert "Failures: 12; the first 10" in section
    assert section.count("| Play / it. | Listen. | a bell | kind |") == 10
    assert text.count(NOT_EVALUATED) == 3, "scores of questions, drawings, clips"


def test_a_fold_held_out_from_every_part_stands_among_the_scores_of_the_card(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    asked = {"n": 80, "accuracy": 0.775, "interval": [0.672, 0.853], "majority": 0.1}
    (tmp_path / "scores" / "scores.json").write_text(json.dumps({"NLVR": asked}))
    assert list(package_embedded.answered(tmp_path)) == ["NLVR"]
    (tmp_path / "scores" / "esc10.json").write_text(json.dumps({"ESC-10, fold 4": asked | {"blind": 0.0875}}))
    text = package_embedded.card(tmp_path, EMBEDDED, 0)
    assert "| ESC-10, fold 4 | 80 | 77.5% | 67.2% – 85.3% | 8.8% | 10.0% |" in text
    assert "| NLVR | 80 | 77.5% | 67.2% – 85.3% | – | 10.0% |" in text


def test_sounds_are_scored_and_a_reply_without_a_sound_is_heard_as_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = tiny_assistant("audio")
    monkeypatch.setattr(mmllm, "load", lambda name: assistant, raising=False)
    save_file(Judge().state_dict(), tmp_path / "judge.safetensors")
    argv = ["x", "--model", "y", "--output", str(tmp_path / "scores"), "--judge", str(tmp_path / "judge.safetensors")]
    monkeypatch.setattr(sys, "argv", [*argv, "--count", "4", "--timed", "1"])
    for makes in ((), ("audio",)):
        with monkeypatch.context() as patch:
            answers(assistant, patch, *makes)
            evaluate_sounds.main()
        report = json.loads((tmp_path / "scores" / "sounds.json").read_text())
        assert report["assistant"]["all"]["n"] == report["ceiling"]["all"]["n"] == 4
        assert set(report["seconds"]) == {"ceiling", "assistant", "speed"}
        assert (report["speed"]["n"], report["speed"]["without a sound"]) == ((1, 0) if makes else (0, 2))
        assert all(set(one) == {"asked", "reply", "heard", "wrong"} and one["wrong"] for one in report["failures"])
        assert "| everything asked for | 4 |" in sound_card.section(found_in(tmp_path, "sounds.json"))
        if not makes:
            assert {one["heard"] for one in report["failures"]} == {"nothing"}
            assert {one["wrong"] for one in report["failures"]} == {"no sound"}
            assert report["assistant"]["all"]["share"] == 0.0
