"""From a row of a table (Hugging Face ``datasets``, parquet) to messages: columns of turns, and columns of media."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmllm.data.attached import AttachedReaderConfig, captioned, with_media
from mmllm.data.layouts import MODALITIES
from mmllm.errors import DataError
from mmllm.processing.messages import Message, Part, Sample, parse_messages

Row = dict[str, Any]
_VALUES = ("path", "url", "data", *MODALITIES)  # where a part may hold its medium itself


def to_sample(row: Row, where: str, reader: AttachedReaderConfig, root: Path | None, id: str) -> Sample:
    """The sample of a row. Media are in lists ``images``, ``audios``, ``videos``, ``point_clouds``, or one in ``image``, …: bytes,
    a struct of ``bytes`` and ``path`` (``datasets``' Image and Audio, not decoded), or a path below ``root``.

    ``messages``: TRL's columns ``messages``, or ``prompt`` and ``completion``; parts without a medium of their own take the
    listed ones in order (or by their ``index``), and where no part asks for one they stand before the first user's text.
    Raises ``DataError`` naming ``where``.
    """
    media = {name: _media(row, name, where, root) for name in MODALITIES}
    columns = {key for name in MODALITIES for key in (name, f"{name}s")}
    rest = {key: value for key, value in row.items() if key not in columns}
    if reader.layout == "captions":
        text = rest.pop(reader.caption, None)
        if not isinstance(text, str) or not text.strip():
            found = f"columns {', '.join(row)}" if reader.caption not in row else f"{text!r:.40}"
            raise DataError(f"{where}: no text in the column {reader.caption!r:.40}; found {found:.200}")
        shown = [Part(name, value) for name, values in media.items() for value in values]
        messages = captioned(shown, text.strip(), reader.prompt, where)
        return Sample(_id(rest, where) or id, messages, root, _tags(rest, "id"))
    if reader.layout != "messages":  # whose rows name media, and whose texts say where they stand
        plural = "s" if reader.layout == "sharegpt" else ""
        placed = {
            name: {f"{name}/{number}": value for number, value in enumerate(values)}
            for name, values in media.items()
            if values
        }
        names = {f"{name}{plural}": list(values) for name, values in placed.items()}
        by_name = {key: value for values in placed.values() for key, value in values.items()}
        own, messages, tags = reader.convert(_without_nulls(rest) | names, where)
        return Sample(own or id, with_media(messages, lambda part: _named(by_name, part, where)), root, _tags(tags))
    return Sample(
        _id(rest, where) or id,
        _conversation(rest, media, where, root),
        root,
        _tags(rest, "id", "messages", "prompt", "completion"),
    )


def _conversation(
    row: Row, media: Mapping[str, Sequence[str | bytes]], where: str, root: Path | None
) -> tuple[Message, ...]:
    if row.get("messages") is not None:
        turns = _turns(row["messages"], "user", f"{where}: messages")
    elif row.get("prompt") is not None and row.get("completion") is not None:
        turns = _turns(row["prompt"], "user", f"{where}: prompt")
        turns += _turns(row["completion"], "assistant", f"{where}: completion")
    else:
        raise DataError(f"{where}: expected columns messages, or prompt and completion; found {', '.join(row):.200}")
    used = dict.fromkeys(media, 0)
    for number, turn in enumerate(turns):
        if isinstance(turn.get("content"), list):
            place = f"{where}: turn {number}"
            turn["content"] = [_filled(part, media, used, place) for part in turn["content"]]
    messages = list(
        with_media(parse_messages(turns, f"{where}: messages"), lambda part: _medium(part.value, where, root))
    )
    for name, values in media.items():
        if used[name] == 0 and values:
            at = next((index for index, message in enumerate(messages) if message.role == "user"), None)
            if at is None:
                raise DataError(f"{where}: media in {name}s, but no user's turn to show them in")
            messages[at] = Message("user", (*(Part(name, value) for value in values), *messages[at].parts))
        elif used[name] != len(values):
            raise DataError(
                f"{where}: the turns have {used[name]} {name} parts, but the row gives {len(values)} {name}s"
            )
    return tuple(messages)


def _turns(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    """The turns of a column; a text alone is one turn of ``role``."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"{where}: found {type(value).__name__}, expected a list of turns or a text")
    turns: list[dict[str, Any]] = _without_nulls(value)
    return turns


def _filled(part: Any, media: Mapping[str, Sequence[str | bytes]], used: dict[str, int], where: str) -> Any:
    """The part, with the medium that it stands for."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return part  # for the parser of messages to refuse
    kind = part["type"].removesuffix("_url")
    values = media.get(kind, ())
    if kind == "text" or any(key in part for key in _VALUES) or ("caption" in part and not values):
        return part | {"type": kind}
    at = part.get("index", used.get(kind, 0))
    if not isinstance(at, int) or not 0 <= at < len(values):
        raise DataError(f"{where}: asks for {kind} {at!r:.20} (counted from 0), but the row gives {len(values)}")
    used[kind] = used.get(kind, 0) + 1
    return part | {"type": kind, "data": values[at]}


def _media(row: Row, name: str, where: str, root: Path | None) -> list[str | bytes]:
    """What the columns of a modality hold."""
    several, one = row.get(f"{name}s"), row.get(name)
    if several is not None and not isinstance(several, list):
        raise DataError(f"{where}: {name}s is {type(several).__name__}, expected a list")
    values = several if several is not None else one if isinstance(one, list) else [] if one is None else [one]
    return [_medium(value, f"{where}: {name} {number}", root) for number, value in enumerate(values)]


def _medium(value: Any, where: str, root: Path | None) -> str | bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, bytes) or (isinstance(value, str) and value[:5].lower() == "data:"):
        return value
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{where}: found {type(value).__name__}, expected bytes or a path (columns of datasets are not decoded)"
        )
    if root is None:
        raise DataError(
            f"{where}: {value!r:.80} is a path without bytes; say with `root` in which folder the files are"
        )
    # Tables often hold absolute paths; inside the folder they are as good as relative ones.
    return value.removeprefix(f"{root}/")


def _named(by_name: Mapping[str, str | bytes], part: Part, where: str) -> str | bytes:
    try:
        return by_name[str(part.value)]
    except KeyError:
        raise DataError(f"{where}: {str(part.value)!r:.80} is not in the columns of media") from None


def _id(row: Row, where: str) -> str | None:
    value = row.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{where}: id is {value!r:.80}; expected a text or a whole number")
    return str(value)


def _tags(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    """The other columns, as far as JSON knows their values."""
    tags = {}
    for key, value in row.items():
        if key not in used and value is not None:
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                continue
            tags[key] = value
    return tags


def _without_nulls(value: Any) -> Any:
    """Tables fill every field that a row does not have with null."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
