from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from chat.fake import FakeAssistant

from mmllm.chat.feedback import Feedback, FeedbackLog, default_path
from mmllm.chat.session import ChatSession, Sampling
from mmllm.errors import DataError, MmllmError


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_a_judgement_is_one_line_with_the_words_of_the_exchange_only(tmp_path: Path) -> None:
    session = ChatSession()
    session.add_user("first")
    list(session.reply(FakeAssistant(), Sampling()))
    (tmp_path / "holiday.wav").write_bytes(b"RIFF")
    session.add_user("a question", [tmp_path / "holiday.wav"])
    list(session.reply(FakeAssistant(), Sampling()))
    session.rated = (3, "down")
    log = FeedbackLog(tmp_path / "deep" / "feedback.jsonl")
    log.add(session.feedback("too short"))
    (record,) = records(log.path)
    assert set(record) == {"conversation", "message", "rating", "question", "answer", "comment", "time"}
    assert record["conversation"] == session.id
    assert (record["message"], record["rating"], record["comment"]) == (3, "down", "too short")
    assert (record["question"], record["answer"]) == ("a question", "You said a question with 1 files.")
    assert str(record["time"]).endswith("+00:00")
    assert b"holiday" not in log.path.read_bytes()
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["=cmd()", "+1", "-1", "@sum", "\t=x", "\r=x", "\n=x", "  =HYPERLINK(1)"])
def test_formulas_are_neutralised(tmp_path: Path, text: str) -> None:
    log = FeedbackLog(tmp_path / "f.jsonl")
    log.add(Feedback("id", 1, "up", text, text, text))
    (record,) = records(log.path)
    assert record["question"] == record["answer"] == record["comment"] == "'" + text


def test_line_breaks_and_odd_characters_stay_inside_one_line(tmp_path: Path) -> None:
    text = 'a\nb\r\nc\u2028d\x00e "quoted" \ud800 日本 {"x": 1}'
    log = FeedbackLog(tmp_path / "f.jsonl")
    for _ in range(2):
        log.add(Feedback("id", 1, "up", "q", "a", text))
    assert len(log.path.read_bytes().splitlines()) == 2
    assert log.path.read_bytes().isascii()
    assert [record["comment"] for record in records(log.path)] == [text, text]


def test_nothing_to_record_without_a_rated_answer() -> None:
    session = ChatSession()
    with pytest.raises(DataError, match="Rate an answer"):
        session.feedback()
    session.rated = (5, "up")
    with pytest.raises(DataError, match="Rate an answer"):
        session.feedback()


def test_the_file_lies_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_path() == Path.home() / ".local" / "share" / "mmllm" / "feedback.jsonl"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "mmllm" / "feedback.jsonl"


def test_a_place_that_cannot_be_written_is_told_before_anything_is_lost(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "feedback.jsonl", tmp_path):
        with pytest.raises(MmllmError, match="choose another file with --feedback"):
            FeedbackLog(path).check()
    for path in (tmp_path / "file", tmp_path / "new" / "deep" / "feedback.jsonl"):
        FeedbackLog(path).check()
    assert not (tmp_path / "new").exists()
