"""From one parsed row of each layout to messages. Tags such as ``<image>`` mean media here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmllm.errors import DataError
from mmllm.processing.messages import Message, Part, parse_messages

Row = Mapping[str, Any]
Converted = tuple[str | None, tuple[Message, ...], dict[str, Any]]
"""Id or ``None``, messages, tags (the row's other fields)."""

MODALITIES = ("image", "audio", "video", "point_cloud")
"""The tags that these layouts have. Whether a model takes the modality is for its processor to say."""

_TAG = re.compile(rf"<({'|'.join(MODALITIES)})>")
_INLINE = re.compile(rf"<({'|'.join(MODALITIES)})>(.*?)</\1>", re.IGNORECASE | re.DOTALL)  # NExT-GPT's dialogues
_FILE = re.compile(r"\S+\.\w{2,4}")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def messages(row: Row, where: str) -> Converted:
    """``{"id", "messages": [{"role", "content"}]}``; every other key is a tag."""
    if "messages" not in row:
        hint = "; rows with `conversations` are read by the llava or sharegpt reader" if "conversations" in row else ""
        raise DataError(f'{where}: no "messages" in this row; found keys {_keys(row)}{hint}')
    media = [f"{name}s" for name in MODALITIES if row.get(f"{name}s")]
    if media:
        raise DataError(f"{where}: media in a list {media[0]!r} beside the messages; use the sharegpt reader")
    return _id(row, where), parse_messages(row["messages"], f"{where}: messages"), _rest(row, "id", "messages")


def llava(row: Row, where: str, prompt: str) -> Converted:
    """LLaVA's training rows ``{"id", "image", "conversations": [{"from", "value"}]}``, its questions
    ``{"question_id", "image", "text"}`` (no reply: for evaluation), and captions ``{"id", "image", "captions"}`` (asked
    with ``prompt``, answered with the first caption).
    """
    media = {name: _paths(row.get(name), f"{where}: {name}") for name in MODALITIES}
    if "conversations" in row:
        parsed = _interleave(_turns(row["conversations"], f"{where}: conversations"), media, where)
        return _id(row, where), parsed, _rest(row, "id", "conversations", *MODALITIES)
    shown = tuple(Part(name, path) for name, paths in media.items() for path in paths)
    if "question_id" in row:
        if not shown:
            raise DataError(f"{where}: question_id without a picture; this looks like answers, not questions")
        user = Message("user", (*shown, Part("text", "\n" + _text(row.get("text"), f"{where}: text"))))
        return _id(row, where, "question_id"), (user,), _rest(row, "question_id", "text", *MODALITIES)
    if isinstance(row.get("captions"), list) and row["captions"] and shown:
        user = Message("user", (*shown, Part("text", "\n" + prompt)))
        reply = Message("assistant", (Part("text", _text(row["captions"][0], f"{where}: captions[0]")),))
        return _id(row, where), (user, reply), _rest(row, "id", "captions", *MODALITIES)
    raise DataError(f'{where}: expected "conversations", or "question_id" and "text"; found keys {_keys(row)}')


def sharegpt(row: Row, where: str) -> Converted:
    """LLaMA-Factory's rows: ``messages`` (role, content) or ``conversations`` (from, value), with lists ``images``,
    ``audios`` and ``videos`` that the tags in the text use up in order; or parts ``{"type": "image_url", "value": …}``.
    """
    refused = {
        "chosen": "a preference pair (chosen, rejected); training here is on single replies, not on preferences. "
        "To train on the preferred one, append `chosen` to the conversation as its last turn",
        "instruction": "an instruction/input/output row; write it as a conversation of a user and an assistant turn",
        "tools": "a row with tools; tool use is not supported",
    }
    for key, what in refused.items():
        if row.get(key):
            raise DataError(f"{where}: {what}")
    name = next((name for name in ("messages", "conversations") if name in row), None)
    if name is None:
        raise DataError(f'{where}: expected "messages" or "conversations"; found keys {_keys(row)}')
    turns = _turns(row[name], f"{where}: {name}")
    if row.get("system"):
        turns = [("system", _text(row["system"], f"{where}: system")), *turns]
    media = {kind: _paths(row.get(f"{kind}s"), f"{where}: {kind}s") for kind in MODALITIES}
    used = ("id", name, "system", *(f"{kind}s" for kind in MODALITIES))
    return _id(row, where), _interleave(turns, media, where), _rest(row, *used)


def nextgpt(row: Row, where: str, prompt: str, folders: Mapping[str, str], suffix: str | None) -> Converted:
    """NExT-GPT's rows; media lie in ``folders[modality]``.

    - Pairs: ``{"input_image", "conversations"}``, ``{"output_image", "image_captions", "conversations"}`` or
      ``{"image_name", "caption"}``. Tags in the user's turns take the ``input_…`` files, those in the assistant's the
      ``output_…`` files, or captions alone where there are none (instruction data).
    - Dialogues before the authors' preparation, with ``conversation``: see ``_dialogue``.

    The ``…_caption_embeddings`` are left alone: conditions are made by the generator that is trained.
    """

    def path(name: str, file: str) -> str:
        return f"{folders[name]}/{file if suffix is None else file.rpartition('.')[0] + suffix}"

    if "conversation" in row:
        used = ("id", "conversation", *(f"{name}_list" for name in folders))
        return _id(row, where), _dialogue(row, where, folders, path), _rest(row, *used)
    shown, made = {}, {}
    for name in folders:
        files = [file for key in (f"input_{name}", f"{name}_name") for file in _paths(row.get(key), f"{where}: {key}")]
        shown[name] = [path(name, file) for file in files]
        made[name] = [path(name, file) for file in _paths(row.get(f"output_{name}"), f"{where}: output_{name}")]
    captions = {name: row[f"{name}_captions"] for name in folders if f"{name}_captions" in row}
    keys = [key for name in folders for key in (f"input_{name}", f"output_{name}", f"{name}_name") if key in row]
    if not keys and not captions:
        raise DataError(
            f'{where}: expected "input_image", "output_image", "image_captions" or "image_name" (or audio, video), or '
            f'"conversation"; found keys {_keys(row)}'
        )
    if "conversations" in row:
        turns = _turns(row["conversations"], f"{where}: conversations")
    else:
        tags = "".join(f"<{name}>" * len(paths) for name, paths in shown.items())
        turns = [("user", f"{tags}\n{prompt}"), ("assistant", _text(row.get("caption"), f"{where}: caption"))]
    told = {name: [value] if isinstance(value, str) else list(value or []) for name, value in captions.items()}
    wanted: dict[str, Sequence[str | None]] = {n: made[n] or [None for _ in told.get(n, [])] for n in folders}
    sides: dict[str, Mapping[str, Sequence[str | None]]] = {"user": shown, "assistant": wanted, "system": {}}
    messages = {
        role: iter(_interleave([turn for turn in turns if turn[0] == role], media, where))
        for role, media in sides.items()
    }
    joined = _captioned([next(messages[role]) for role, _ in turns], told, where)
    return (
        _id(row, where),
        joined,
        _rest(row, "id", "conversations", "caption", *keys, *(f"{n}_captions" for n in captions)),
    )


def _captioned(messages: Sequence[Message], captions: Mapping[str, list[Any]], where: str) -> tuple[Message, ...]:
    """The messages with the captions of what the assistant makes, one for each medium, in order."""
    left = {name: list(texts) for name, texts in captions.items()}
    result = []
    for message in messages:
        parts = []
        for part in message.parts:
            if message.role == "assistant" and left.get(part.type):
                part = replace(part, caption=_text(left[part.type].pop(0), f"{where}: {part.type}_captions"))
            parts.append(part)
        result.append(Message(message.role, tuple(parts)))
    for name, texts in left.items():
        if texts:
            raise DataError(f"{where}: {len(texts)} more {name}_captions than <{name}> of the assistant")
    return tuple(result)


def _dialogue(row: Row, where: str, folders: Mapping[str, str], path: Callable[[str, str], str]) -> tuple[Message, ...]:
    """``conversation``: turns with ``<Image>…</Image>`` in them (MosIT), or with ``input_modality``, ``output_modality`` and
    ``caption`` beside them (T+X to T, T to T+X).

    Between the tags stands a file of ``image_list``, whose ``caption`` says what it shows, or a description: the assistant
    makes what it describes; in a user's turn, where nothing can be shown, it is left out (so does the authors' preparation).
    A user's ``input_modality`` means the file ``image_name`` or ``mm_name`` of the row.
    """
    listed: dict[str, dict[str, Any]] = {}
    for name in folders:
        items = row.get(f"{name}_list") or []
        if not isinstance(items, list) or not all(isinstance(i, dict) and f"{name}_name" in i for i in items):
            raise DataError(f'{where}: {name}_list: expected a list of {{"{name}_name": …, "caption": …}}')
        listed[name] = {str(item[f"{name}_name"]): item.get("caption") for item in items}
    result: list[Message] = []
    turns = _turns(row["conversation"], f"{where}: conversation")
    for number, ((role, value), turn) in enumerate(zip(turns, row["conversation"], strict=True)):
        place = f"{where}: turn {number}"
        text = _text(value, place)
        parts: list[Part] = []
        at = 0
        for found in _INLINE.finditer(text):
            parts.append(Part("text", text[at : found.start()]))
            at = found.end()
            kind, content = found[1].lower(), found[2].strip()
            if content in listed[kind]:
                caption = listed[kind][content] if role == "assistant" else None
                told = None if caption is None else _text(caption, f"{where}: {kind}_list")
                parts.append(Part(kind, path(kind, content), told))
            elif _FILE.fullmatch(content):
                raise DataError(f"{place}: {content!r:.80} is not in {kind}_list")
            elif role == "assistant" and content:
                parts.append(Part(kind, None, content))
        parts.append(Part("text", text[at:]))
        kind = turn.get("output_modality" if role == "assistant" else "input_modality")
        if kind in folders and not any(part.type == kind for part in parts):
            if role == "assistant":
                parts.append(Part(kind, None, _text(turn.get("caption"), f"{place}: caption")))
            elif not any(part.type == kind for message in result for part in message.parts):
                file = next((row[key] for key in (f"{kind}_name", "mm_name", "image_name") if row.get(key)), None)
                parts.insert(0, Part(kind, path(kind, _text(file, f"{where}: {kind}_name"))))
        result.append(Message(role, tuple(part for part in parts if part.value != "")))
    return tuple(result)


def guess(row: Row) -> str | None:
    """The reader kind whose layout a row has, from its keys; ``None`` when it looks like none of them."""
    pairs = ("input_", "output_")
    if "conversation" in row or any(
        key.startswith(pairs) or key.endswith("_captions") or (key.endswith("_name") and "caption" in row)
        for key in row
    ):
        return "nextgpt"
    lists = any(f"{name}s" in row for name in MODALITIES)
    if "messages" in row and not lists and not _has_url_parts(row["messages"]):
        return "messages"
    if {"messages", "chosen", "instruction"} & row.keys() or ("conversations" in row and (lists or "system" in row)):
        return "sharegpt"
    return "llava" if {"conversations", "question_id", "captions"} & row.keys() else None


def _turns(value: Any, where: str) -> list[tuple[str, Any]]:
    """(role, content) of every turn, in our names of the roles."""
    if not isinstance(value, list):
        raise DataError(f"{where}: expected a list of turns, found {type(value).__name__}")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise DataError(f"{where}[{index}]: expected a mapping, found {type(turn).__name__}")
        speaker, content = ("from", "value") if "from" in turn else ("role", "content")
        role = turn.get(speaker)
        if role not in _ROLES:
            raise DataError(f"{where}[{index}]: {speaker} is {role!r:.80}; expected one of {', '.join(_ROLES)}")
        if not isinstance(turn.get(content), (str, list)):
            raise DataError(f"{where}[{index}]: {content} is {type(turn.get(content)).__name__}; expected text")
        turns.append((_ROLES[role], turn[content]))
    return turns


def _interleave(
    turns: Sequence[tuple[str, Any]], media: Mapping[str, Sequence[str | None]], where: str
) -> tuple[Message, ...]:
    """Put media where their tags stand, in order. Raises ``DataError`` when tags and media differ in number."""
    used = dict.fromkeys(media, 0)
    result = []
    for number, (role, content) in enumerate(turns):
        parts: list[Part] = []
        for kind, value in _pieces(content, f"{where}: turn {number}"):
            if value is None:  # a tag: takes the next of its list
                used[kind] = used.get(kind, 0) + 1
                value = media[kind][used[kind] - 1] if used[kind] <= len(media.get(kind, ())) else ""
            parts.append(Part(kind, value))
        result.append(Message(role, tuple(parts)))
    for name, count in used.items():
        given = len(media.get(name, ()))
        if count != given:
            raise DataError(
                f"{where}: the text has {count} <{name}>, but the row gives {given} of these media; "
                "each tag stands for exactly one"
            )
    return tuple(result)


def _pieces(content: Any, where: str) -> list[tuple[str, str | None]]:
    """(type, value) of what a turn consists of; value ``None`` stands for the next of the row's media of that type."""
    if isinstance(content, str):
        split = _TAG.split(content)  # text, tag, text, tag, …, text
        pieces = [(split[i], None) if i % 2 else ("text", split[i]) for i in range(len(split))]
        return [(kind, value) for kind, value in pieces if value != ""]
    result: list[tuple[str, str | None]] = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise DataError(f'{where}, part {index}: expected {{"type": …}}, found {part!r:.80}')
        kind = part["type"].removesuffix("_url")
        value = next((part[key] for key in ("value", "path", "url", part["type"]) if key in part), None)
        if isinstance(value, dict):  # {"type": "image_url", "image_url": {"url": …}}
            value = value.get("url")
        if not (isinstance(value, str) or (value is None and kind in MODALITIES)):
            found = type(value).__name__
            raise DataError(f"{where}, part {index}: a {kind} part whose value is {found}; expected text")
        result.append((kind, value))
    return result


def _has_url_parts(turns: Any) -> bool:
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any("value" in part or str(part.get("type")).endswith("_url") for part in parts)


def _paths(value: Any, where: str) -> list[str]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    paths = []
    for item in values:
        path = item.get("path") if isinstance(item, dict) else item
        if not isinstance(path, str) or not path:
            raise DataError(f"{where}: found {item!r:.80}, expected the path of a file, or a list of paths")
        paths.append(path)
    return paths


def _id(row: Row, where: str, key: str = "id") -> str | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{where}: {key} is {value!r:.80}; expected a text or a whole number")
    return str(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: found {type(value).__name__}, expected text")
    return value


def _rest(row: Row, *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in used}


def _keys(row: Row) -> str:
    return ", ".join(sorted(row)[:12])[:200] or "none"
