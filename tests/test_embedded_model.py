"""The model that ships: complete, small, loadable without a network, usable from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmllm.assistant import EMBEDDED, Assistant, load
from mmllm.cli import main

EXAMPLES = Path(__file__).parent.parent / "mmllm" / "assets" / "examples"


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return load("embedded")


def test_it_is_small_and_holds_all_its_parts() -> None:
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 40e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    card = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    for said in ("CC BY 4.0", "CC BY-SA 4.0", "CC BY 3.0", "cannot do", "Blind"):
        assert said.lower() in card.lower(), said


def test_it_takes_pictures_and_sounds_and_answers_in_text(assistant: Assistant) -> None:
    assert set(assistant.modalities) == {"image", "audio"}
    content = [
        {"type": "image", "path": str(EXAMPLES / "boxes.png")},
        {"type": "audio", "path": str(EXAMPLES / "beeps.wav")},
        {"type": "text", "text": "What do you see and hear?"},
    ]
    reply = assistant.chat([{"role": "user", "content": content}], max_new_tokens=40)
    assert reply.strip()
    assert reply == assistant.chat([{"role": "user", "content": content}], max_new_tokens=40)
    assert "<|" not in reply


def test_it_draws_what_it_is_asked_for_and_changes_it(assistant: Assistant, tmp_path: Path) -> None:
    """Whether drawings are right is measured in the model card, over hundreds; here, that the colours arrive at all."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": "Draw a red square in the middle."}]
    first = assistant.chat(turns, seed=0)
    assert "red square" in first
    assert "<" not in first, "no signal token in the text"
    (made,) = first.media
    before = np.asarray(made.result()).astype(int)
    made.save(tmp_path / "first.png")
    assert before.shape == (64, 64, 3)
    assert red(before).sum() > 40
    said = [{"type": "text", "text": str(first)}, {"type": "image", "path": str(tmp_path / "first.png")}]
    turns += [{"role": "assistant", "content": said}, {"role": "user", "content": "Make the square blue."}]
    again = assistant.chat(turns, seed=0)
    assert "blue square" in again
    after = np.asarray(again.media[0].result()).astype(int)
    assert red(after).sum() < 5
    assert red(after[..., ::-1]).sum() > 40


def red(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Where a picture is clearly more red than anything else."""
    return (picture[..., 0] > picture[..., 1] + 80) & (picture[..., 0] > picture[..., 2] + 80)


def test_it_says_what_it_is_asked_to_say_and_plays_sounds(assistant: Assistant) -> None:
    """Whether sounds are right is measured in the model card, over hundreds; here, that they are there and differ."""
    heard = {}
    for question, word in (("Say seven.", "seven"), ("Play four drum hits.", "drum")):
        reply = assistant.chat([{"role": "user", "content": question}], seed=0)
        assert word in reply
        (media,) = reply.media
        sound: Any = media.result()
        assert (media.type, sound.sample_rate, len(sound.samples)) == ("audio", 16_000, 32_768)
        power = np.square(sound.samples.reshape(64, -1)).mean(axis=1)
        assert power.max() > 1e-3
        heard[word] = power
    # A word is over after a second; hits come one after the other.
    assert heard["seven"][48:].max() < 1e-4
    assert heard["drum"][24:].max() > 1e-3


def test_it_answers_with_a_clip_where_one_is_asked_for(assistant: Assistant) -> None:
    """What is seen in its clips is measured in the model card: so far hardly anything."""
    reply = assistant.chat([{"role": "user", "content": "Animate a red circle moving to the right."}], seed=0)
    assert "red circle" in reply
    (media,) = reply.media
    assert media.type == "video"
    clip: Any = media.result()
    assert [frame.size for frame in clip.frames] == [(64, 64)] * 8


def test_a_picture_and_a_sound_come_in_one_reply(assistant: Assistant) -> None:
    reply = assistant.chat([{"role": "user", "content": "Draw a blue star. Then say seven."}], seed=0)
    assert [media.type for media in reply.media] == ["image", "audio"]


def test_what_needs_no_picture_gets_none(assistant: Assistant) -> None:
    for question in ("Hello!", "What can you do?", "How many circles are there?"):
        assert not assistant.chat([{"role": "user", "content": question}], seed=0).media, question


def test_the_command_line_answers_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "generate",
        "--image",
        str(EXAMPLES / "boxes.png"),
        "--prompt",
        "Is there a circle?",
        "--seed",
        "1",
        "--json",
    ]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["text"].strip()


def test_a_bad_sample_is_named_by_its_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    good = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}]
    part = {"type": "image", "path": "nowhere.png"}
    bad = [{"role": "user", "content": [part]}, good[1]]
    data.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": good}, {"messages": bad})))
    assert main(["eval", "--model", "embedded", "--data", str(data)]) == 1
    assert "data.jsonl:2: " in capsys.readouterr().err


def test_evaluation_prints_n_and_exact_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "never said"}]
    data.write_text(json.dumps({"id": "1", "messages": turns}) + "\n")
    assert main(["eval", "--model", "embedded", "--data", str(data), "--metric", "exact_match", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["n"], report["exact_match"]) == (1, 0.0)
