"""`mmllm generate` with a model that makes pictures: files, JSON, options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmllm.cli import main
from mmllm.replies import Media, Reply


class Painter:
    """Answers with a word and a red picture, and remembers the options."""

    def chat(self, messages: Any, **options: Any) -> Reply:
        self.messages, self.options = messages, options
        media = Media("image", ".png")
        media._future.set_result(Image.new("RGB", (4, 4), "red"))
        return Reply.of("Here", [media], ["audio"])


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    made = Painter()
    monkeypatch.setattr("mmllm.assistant.load", lambda *_, **__: made)
    return made


def test_files_are_written_and_named_in_the_json(
    painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--prompt", "draw", "--output", str(tmp_path / "made"), "--set", "image.steps=20", "--json"]
    assert main([*words, "--set", "image.guidance=2.5", "--seed", "3"]) == 0
    path = tmp_path / "made" / "1-image.png"
    answer = {"text": "Here", "media": [{"type": "image", "path": str(path)}], "truncated": ["audio"]}
    assert json.loads(capsys.readouterr().out) == answer
    with Image.open(path) as picture:
        assert picture.size == (4, 4)
    assert painter.options["media"] == {"image": {"steps": 20, "guidance": 2.5}}
    assert painter.options["seed"] == 3


def test_files_of_every_modality_are_sent_before_the_question(painter: Painter) -> None:
    files = [
        "--point-cloud",
        "a.glb",
        "--image",
        "a.png",
        "--point-cloud",
        "b.ply",
        "--audio",
        "a.wav",
        "--video",
        "a.mp4",
    ]
    assert main(["generate", "--prompt", "what?", *files]) == 0
    (message,) = painter.messages
    *media, question = message["content"]
    expected = [
        ("image", "a.png"),
        ("audio", "a.wav"),
        ("video", "a.mp4"),
        ("point_cloud", "a.glb"),
        ("point_cloud", "b.ply"),
    ]
    assert [(part["type"], part["path"]) for part in media] == expected
    assert question["text"] == "what?"


def test_without_a_folder_it_says_what_was_not_kept(painter: Painter, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "draw"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["Here", "[image]"]
    assert "give --output DIR" in captured.err
    assert "cut off by --max-new-tokens: audio" in captured.err


def test_a_faulty_option_is_explained(painter: Painter, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "draw", "--set", "steps=20"]) != 0
    assert "expected MODALITY.OPTION=VALUE" in capsys.readouterr().err
