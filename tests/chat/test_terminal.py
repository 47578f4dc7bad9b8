from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat.fake import FakeAssistant
from PIL import Image

from mmllm.chat.terminal import run_terminal
from mmllm.errors import DataError

Talk = Callable[..., str]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Types the lines, then Ctrl-D; returns all that was printed."""

    def typed(*lines: str, assistant: FakeAssistant | None = None) -> str:
        waiting = iter(lines)

        def read(_: str) -> str:
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        assert run_terminal(assistant or FakeAssistant()) == 0
        return capsys.readouterr().out

    return typed


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_a_file_of_the_home_folder_is_attached(talk: Talk, picture: Path) -> None:
    assert "You said what? with 1 files." in talk("/image ~/red.png", "what?")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/image", "/image needs the name of a file"),
        ("/image nowhere.png", "nowhere.png: there is no such file"),
        ("/audio {picture}", "red.png: attach it with /image"),
        ("/image {picture}.txt", "this assistant takes pictures and sounds"),
    ],
)
def test_a_file_that_cannot_be_attached_is_told_at_once(talk: Talk, picture: Path, line: str, reason: str) -> None:
    picture.with_name("red.png.txt").write_text("x")
    printed = talk(line.format(picture=picture), "what?")
    assert reason in printed
    assert printed.index(reason) < printed.index("You said what? with 0 files.")


def test_files_outlive_a_question_that_could_not_be_answered(talk: Talk, picture: Path) -> None:
    class Fussy(FakeAssistant):
        def chat(self, messages: Sequence[Any], stream: bool = False, **options: Any) -> Iterator[str]:
            if len(self.requests) == 0:
                self.requests.append([])
                raise DataError("the conversation is too long")
            return super().chat(messages, stream, **options)

    printed = talk(f"/image {picture}", "too long", "short", "next", assistant=Fussy())
    assert "Still attached: red.png" in printed
    assert "You said short with 1 files." in printed
    assert "You said next with 0 files." in printed


def test_files_can_be_taken_off(talk: Talk, picture: Path) -> None:
    assert "You said hi with 0 files." in talk(f"/image {picture}", "/detach", "hi")


def test_a_question_interrupted_before_the_first_word_is_taken_back(talk: Talk) -> None:
    class Interrupted(FakeAssistant):
        def _words(self, messages: Sequence[Any], stop: Any) -> Iterator[str]:
            if len(self.requests) == 1:
                raise KeyboardInterrupt
            return super()._words(messages, stop)

    assistant = Interrupted()
    assert "You said two with 0 files." in talk("one", "two", assistant=assistant)
    assert len(assistant.requests[1]) == 1
