"""Chat messages: roles and content parts, as data files, the Python API and the demo write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmllm.errors import DataError

ROLES = ("system", "user", "assistant")
SOURCES = ("generated", "retrieved")


@dataclass(frozen=True)
class Part:
    """One content part. ``type`` is ``text`` or a modality; ``value`` is the text, or a path, bytes or data URL.

    ``caption`` says in words what a medium of the assistant shows. A part of the assistant may have a caption alone
    (``value`` None): enough to learn its condition from. ``source`` is ``generated`` or ``retrieved``, where it is told.
    """

    type: str
    value: str | bytes | None
    caption: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Message:
    role: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(str(part.value) for part in self.parts if part.type == "text")


@dataclass(frozen=True)
class Sample:
    """One conversation. Media paths are relative to ``root`` and must stay inside it; ``tags`` are free extra fields."""

    id: str
    messages: tuple[Message, ...]
    root: Path | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)


def parse_messages(messages: Sequence[Any], where: str = "messages") -> tuple[Message, ...]:
    """Read messages in the usual chat layout: ``[{"role": …, "content": "text" | [parts]}, …]``.

    A part is ``{"type": "text", "text": …}`` or ``{"type": <modality>, "path" | "url" | "data" | <modality>: …}`` where the
    value is a path, a ``data:`` URL or bytes; an assistant's medium may have a ``caption`` with it, or instead, and say
    whether it is ``generated`` or ``retrieved`` as its ``source``.
    Existing ``Message`` objects pass through. Raises ``DataError`` naming ``where``.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise DataError(f"{where}: expected a list of messages, found {type(messages).__name__}")
    return tuple(_message(message, f"{where}[{index}]") for index, message in enumerate(messages))


def check_turns(messages: Sequence[Message], where: str = "messages", *, training: bool = False) -> None:
    """Check the order of roles: at most one system message, first; then user and assistant by turns.

    In training the conversation must end with an assistant turn, and no assistant turn may be empty.
    Raises ``DataError``.
    """
    turns = list(messages[1:]) if messages and messages[0].role == "system" else list(messages)
    if not turns:
        raise DataError(f"{where}: no user message; a conversation needs at least one")
    for index, message in enumerate(turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if message.role != expected:
            raise DataError(
                f"{where}: turn {index} is from {message.role!r}, expected {expected!r} (turns alternate, the user begins)"
            )
        says_something = message.text.strip() or any(part.type != "text" for part in message.parts)
        if training and message.role == "assistant" and not says_something:
            raise DataError(f"{where}: turn {index}: the assistant's reply is empty; nothing could be learned from it")
    if training and turns[-1].role != "assistant":
        raise DataError(f"{where}: the conversation ends without an assistant reply")


def _message(message: Any, where: str) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: expected a mapping with `role` and `content`, found {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r}; expected one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return Message(role, (Part("text", content),))
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise DataError(f"{where}: content is {type(content).__name__}; expected a string or a list of parts")
    made = role == "assistant"
    return Message(role, tuple(_part(part, f"{where}.content[{index}]", made) for index, part in enumerate(content)))


def _part(part: Any, where: str, made: bool) -> Part:
    if isinstance(part, Part):
        return part
    if isinstance(part, str):
        return Part("text", part)
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise DataError(f'{where}: expected {{"type": …}}, found {part!r:.80}')
    kind = part["type"]
    caption = part.get("caption") if made and kind != "text" else None
    if caption is not None and not isinstance(caption, str):
        raise DataError(f"{where}: caption is {type(caption).__name__}, expected a string")
    source = part.get("source") if made and kind != "text" else None
    if source not in (None, *SOURCES):
        raise DataError(f"{where}: source {source!r}; expected {' or '.join(SOURCES)}")
    for key in ("text",) if kind == "text" else ("path", "url", "data", kind):
        value = part.get(key)
        if isinstance(value, (str, bytes)) and (kind != "text" or isinstance(value, str)):
            return Part(kind, value, caption, source)
        if isinstance(value, Path):
            return Part(kind, str(value), caption, source)
    if caption is not None:
        return Part(kind, None, caption, source)
    wanted = '"text"' if kind == "text" else f'"path", "url", "data" or "{kind}" with a path, data URL or bytes'
    raise DataError(f"{where}: a {kind} part needs {wanted}; found keys {sorted(map(str, part))}")
