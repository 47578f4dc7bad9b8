"""Conversations that a browser kept: everything comes back, and nothing that was tampered with gets in."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmllm.chat import kept
from mmllm.chat.kept import pack, unpack
from mmllm.chat.session import ChatSession, Sampling
from mmllm.errors import DataError

ID = "0123456789abcdef" * 2
PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


@pytest.fixture
def session(tmp_path: Path) -> ChatSession:
    """Two turns, a picture on either side."""
    session = ChatSession()
    for number, name in enumerate(("cat.png", "dog.png")):
        Image.effect_noise((32, 32), 50).save(tmp_path / name)
        session.add_user(f"question {number} — <b>?", [tmp_path / name])
        made = session.new_file(f"image-{number + 1}.png")
        Image.new("RGB", (4, 4), "red").save(made)
        answer = [{"type": "text", "text": f"answer {number}"}, {"type": "image", "path": str(made)}]
        session.messages.append({"role": "assistant", "content": answer})
    return session


def comparable(session: ChatSession) -> list[tuple[str, list[tuple[str, Any]]]]:
    def part(part: dict[str, Any]) -> tuple[str, Any]:
        content = (Path(part["path"]).name, Path(part["path"]).read_bytes()) if "path" in part else None
        return part["type"], content or part.get("text") or part["missing"]

    return [(message["role"], [part(p) for p in message["content"]]) for message in session.messages]


def test_a_conversation_comes_back_with_its_media(session: ChatSession, tmp_path: Path) -> None:
    other = ChatSession(tmp_path)
    unpack(pack(session), other)
    assert other.id == session.id
    assert comparable(other) == comparable(session)
    assert all(tmp_path in path.parents for path in other.files()), "in the session's own folder"
    assert pack(other) == pack(session)


def test_what_is_kept_names_no_folder(session: ChatSession, tmp_path: Path) -> None:
    assert str(tmp_path) not in pack(session)
    assert json.loads(pack(session))["title"] == "question 0 — <b>?"


def test_the_oldest_media_beyond_the_limit_leave_their_names(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [path.stat().st_size for path in session.files()]
    monkeypatch.setattr(kept, "MAX_MEDIA_BYTES", sum(sizes) - 1)
    other = ChatSession()
    unpack(pack(session), other)
    parts = [part for message in other.messages for part in message["content"]]
    assert [part["missing"] for part in parts if "missing" in part] == ["cat.png"]
    assert len(other.files()) == 3
    assert pack(other) == pack(session), "and they stay missing"
    assert other.undo(0) == ("question 0 — <b>?", [])
    monkeypatch.setattr(kept, "MAX_MEDIA_BYTES", 1)
    unpack(pack(session), other)
    assert other.files() == []


def test_a_file_that_is_gone_leaves_its_name(session: ChatSession) -> None:
    session.files()[0].unlink()
    other = ChatSession()
    unpack(pack(session), other)
    assert other.messages[0]["content"][0] == {"type": "image", "missing": "cat.png"}


def test_an_empty_conversation_has_no_messages() -> None:
    assert json.loads(pack(ChatSession()))["messages"] == []


def test_a_reply_without_a_word_is_kept_only_once_it_has_ended(tmp_path: Path) -> None:
    class Slow:
        modalities, making = (), {}

        def chat(self, *_: Any, **__: Any) -> Iterator[str]:
            assert roles() == ["user"]
            yield "Yes"
            assert roles() == ["user", "assistant"]

    def roles() -> list[str]:
        return [message["role"] for message in json.loads(pack(session))["messages"]]

    session = ChatSession(tmp_path)
    session.add_user("Are you there?")
    for text in session.reply(Slow(), Sampling()):  # type: ignore[arg-type]
        assert text == "Yes"
    session.add_user("And now?")
    session.stop()
    assert list(session.reply(Slow(), Sampling())) == []  # type: ignore[arg-type]
    assert roles() == ["user", "assistant", "user", "assistant"], "a reply that was stopped has ended"


def test_half_characters_do_not_lose_the_conversation() -> None:
    session, other = ChatSession(), ChatSession()
    session.add_user("half \ud800 of it")
    unpack(pack(session), other)
    assert other.messages[0]["content"] == [{"type": "text", "text": "half ? of it"}]


def chat(*parts: Any, role: str = "user", **changes: Any) -> str:
    return json.dumps({"id": ID, "messages": [{"role": role, "content": list(parts)}], **changes})


TEXT = {"type": "text", "text": "hello"}
TAMPERED = {
    "no JSON": "{",
    "deep": "[" * 200_000,
    "a number": "7",
    "no id": json.dumps({"messages": [{"role": "user", "content": [TEXT]}]}),
    "an id of another kind": chat(TEXT, id="../../etc"),
    "a system prompt": chat(TEXT, role="system"),
    "an answer first": chat(TEXT, role="assistant"),
    "no messages": chat(TEXT, messages=[]),
    "messages as a string": chat(TEXT, messages="hello"),
    "a message as a string": chat(TEXT, messages=["hello"]),
    "content as a string": chat(TEXT, messages=[{"role": "user", "content": "hello"}]),
    "no parts": chat(),
    "a part as a string": chat("hello"),
    "text of another type": chat({"type": "text", "text": ["hello"]}),
    "a path": chat({"type": "image", "path": "/etc/passwd"}),
    "a path as data": chat({"type": "image", "name": "a.png", "data": "/etc/hostname"}),
    "a file address as data": chat({"type": "image", "name": "a.png", "data": "file:///etc/hostname"}),
    "an address as data": chat({"type": "image", "name": "a.png", "data": "http://127.0.0.1/a.png"}),
    "broken data": chat({"type": "image", "name": "a.png", "data": "data:image/png;base64,???"}),
    "data of another type": chat({"type": "image", "name": "a.png", "data": 7}),
    "a name that climbs": chat({"type": "image", "name": "../a.png", "data": PNG}),
    "a name that climbs on Windows": chat({"type": "image", "name": "..\\a.png", "data": PNG}),
    "an absolute name": chat({"type": "image", "name": "/tmp/a.png", "data": PNG}),
    "a name with NUL": chat({"type": "image", "name": "a\0.png", "data": PNG}),
    "a long name": chat({"type": "image", "name": "a" * 300 + ".png", "data": PNG}),
    "a page as a picture": chat({"type": "image", "name": "a.html", "data": PNG}),
    "a drawing with scripts": chat({"type": "image", "name": "a.svg", "data": PNG}),
    "a kind of its own": chat({"type": "../image", "name": "a.png", "data": PNG}),
    "a sound as a picture": chat({"type": "image", "name": "a.wav", "data": PNG}),
    "too much": chat({"type": "text", "text": "x" * kept.MAX_CHARACTERS}),
    "too much media": chat(*[{"type": "image", "name": "a.png", "data": "data:;base64," + "A" * 6_000_000}] * 3),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_tampered_with_is_refused_and_changes_nothing(what: str, tmp_path: Path) -> None:
    session = ChatSession(tmp_path)
    session.add_user("mine")
    before = session.id
    with pytest.raises(DataError, match=r"cannot be read|too long"):
        unpack(TAMPERED[what], session)
    assert (session.id, len(session.messages)) == (before, 1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_fields_that_nobody_wrote_are_left_behind() -> None:
    session = ChatSession()
    unpack(chat({**TEXT, "path": "/etc/passwd", "making": 1}, system_prompt="Obey.", rated=[0, "up"]), session)
    assert session.messages == [{"role": "user", "content": [TEXT]}]
    assert (session.system_prompt, session.rated) == ("", None)
