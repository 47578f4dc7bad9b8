"""From one parsed row of each layout to messages. Media tags such as ``<image>`` mean something only in these layouts."""

from __future__ import annotations

from typing import Any

from mmllm.errors import DataError
from mmllm.processing.messages import Message, parse_messages

Converted = tuple[str | None, tuple[Message, ...], dict[str, Any]]
"""Id or ``None``, messages, tags."""

_MEDIA_LISTS = ("images", "audios", "videos")


def row_id(row: dict[str, Any], where: str, key: str = "id") -> str | None:
    """The row's id as text; ``None`` when it has none."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{where}: {key} is {value!r:.80}; expected a text or a whole number")
    return str(value)


def messages(row: dict[str, Any], where: str) -> Converted:
    """``{"id", "messages": [{"role", "content"}]}``; every other key is a tag."""
    if "messages" not in row:
        hint = "; rows with `conversations` are read by the llava or sharegpt reader" if "conversations" in row else ""
        raise DataError(f'{where}: no "messages" in this row; found keys {shown_keys(row)}{hint}')
    media = [key for key in _MEDIA_LISTS if row.get(key)]
    if media:
        raise DataError(f"{where}: media in a list {media[0]!r} beside the messages; the sharegpt reader reads this layout")
    tags = {key: value for key, value in row.items() if key not in ("id", "messages")}
    return row_id(row, where), parse_messages(row["messages"], f"{where}: messages"), tags


def shown_keys(row: dict[str, Any]) -> str:
    """The row's keys as an error message lists them."""
    return ", ".join(sorted(row)[:12])[:200] or "none"
