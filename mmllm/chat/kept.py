"""Conversations as the visitor's browser keeps them, so that they outlive the server.

What comes back from a browser is not trusted: any program that was ever served from the same address could have written
it. It becomes a conversation only if every part of it is what ``pack`` would have written.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from mmllm.chat.session import SUFFIXES, ChatSession, is_empty, is_whole, portable, text_of
from mmllm.errors import DataError, MediaError
from mmllm.processing.sources import Limits, read_media

MAX_MEDIA_BYTES = 8 * 1024 * 1024
"""All files of a conversation together, the latest first; of those beyond only the names are kept."""
MAX_CHATS = 50
"""How many conversations a browser keeps."""
MAX_CHARACTERS = 4 * MAX_MEDIA_BYTES
MAX_MESSAGES = 10_000
MAX_PARTS = 1000
MAX_NAME = 255
_ID = re.compile(r"[0-9a-f]{32}")
_TYPE = re.compile(r"[a-z0-9_]{1,40}")
_MADE = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes) | {".mp4", ".webm"}
_TITLE = 60


def pack(session: ChatSession) -> str:
    """The conversation as JSON, ``{"id": …, "title": …, "messages": […]}``; no messages when there is nothing to keep.

    Media carry their bytes as data URLs as long as they fit in ``MAX_MEDIA_BYTES``, counted from the latest; a part of a
    medium that does not fit has its name only. A reply that runs and has said nothing yet is left out: its question is to come
    back as one without an answer.
    """
    left: float = MAX_MEDIA_BYTES
    messages: list[dict[str, Any]] = []
    said = session.messages
    if session.answering and said and is_empty(said[-1]):
        said = said[:-1]
    for message in reversed(said):
        parts: list[dict[str, Any]] = []
        for part in reversed([part for part in message["content"] if "making" not in part]):
            size = _size(part)
            if size <= left:
                left -= size
                parts.append(portable(part))
            else:
                parts.append({"type": part["type"], "name": Path(part.get("missing") or part["path"]).name})
        messages.append({"role": message["role"], "content": parts[::-1]})
    messages.reverse()
    words = " ".join(" ".join(text_of(message) for message in session.messages[:1]).split())
    names = [path.name for path in session.files("user")]
    title = words or ", ".join(names) or "Chat"
    return json.dumps({"id": session.id, "title": title[:_TITLE], "messages": messages})


def unpack(kept: str, session: ChatSession) -> None:
    """Put the conversation that ``pack`` wrote into ``session``; its files go into the session's folder.

    Raises ``DataError`` for anything that ``pack`` does not write; the session is unchanged then.
    """
    if len(kept) > MAX_CHARACTERS:
        raise DataError("This chat is too long to be read back.")
    try:
        found = json.loads(kept)
    except (ValueError, RecursionError) as error:
        raise _unreadable("no JSON") from error
    if not isinstance(found, dict) or not isinstance(found.get("id"), str) or not _ID.fullmatch(found["id"]):
        raise _unreadable("no id")
    messages = found.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise _unreadable("no messages")
    limits = Limits(max_bytes=MAX_MEDIA_BYTES)
    restored: list[dict[str, Any]] = []
    files: list[tuple[dict[str, Any], bytes]] = []
    for index, message in enumerate(messages):
        role = ("user", "assistant")[index % 2]
        content = message.get("content") if isinstance(message, dict) else None
        if content is None or message.get("role") != role:
            raise _unreadable(f"message {index} is not from {role}")
        if not isinstance(content, list) or not 0 < len(content) <= MAX_PARTS:
            raise _unreadable(f"message {index} has no parts")
        parts = [_part(part, role, limits, files) for part in content]
        restored.append({"role": role, "content": parts})
    if sum(len(data) for _, data in files) > MAX_MEDIA_BYTES:
        raise _unreadable("its files are too large")
    for part, data in files:
        path = session.new_file(part["path"])
        path.write_bytes(data)
        part["path"] = str(path)
    session.clear()
    session.id, session.messages = found["id"], restored


def _size(part: dict[str, Any]) -> float:
    """The bytes of a part's file; infinite when there is none any more."""
    try:
        return Path(part["path"]).stat().st_size if "path" in part else 0 if is_whole(part) else math.inf
    except OSError:
        return math.inf


def _part(part: Any, role: str, limits: Limits, files: list[tuple[dict[str, Any], bytes]]) -> dict[str, Any]:
    """The part in the session's form; a file's ``path`` is its bare name, and its bytes join ``files``."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str) or not _TYPE.fullmatch(part["type"]):
        raise _unreadable("a part without type")
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": _encodable(part.get("text"))}
    name = _encodable(part.get("name"))
    if name != Path(name).name or "\\" in name or "\0" in name or len(name.encode()) > MAX_NAME:
        raise _unreadable("a file's name")
    endings = SUFFIXES.get(kind, ()) if role == "user" else _MADE
    if Path(name).suffix.lower() not in endings:
        raise _unreadable(f"a file of kind {kind}")
    if "data" not in part:
        return {"type": kind, "missing": name}
    data = part["data"]
    if not isinstance(data, str) or not data.startswith("data:"):
        raise _unreadable("a file's content")
    try:
        content = read_media(data, root=None, limits=limits)
    except MediaError as error:
        raise _unreadable("a file's content") from error
    placed = {"type": kind, "path": name}
    files.append((placed, content))
    return placed


def _encodable(text: Any) -> str:
    """``text``, if it is one. JSON can spell halves of characters, which nothing can write down again; they become "?"."""
    if not isinstance(text, str):
        raise _unreadable("a text")
    return text.encode(errors="replace").decode()


def _unreadable(reason: str) -> DataError:
    return DataError(f"The chat that this browser kept cannot be read ({reason}).")
