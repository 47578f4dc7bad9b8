"""Rows whose media lie beside them, in a shard or a table, instead of in files: layouts, and media in place of names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt

from mmllm.config.base import BuildContext
from mmllm.data import layouts
from mmllm.data.tables import SampleTable, TableReaderConfig
from mmllm.errors import DataError
from mmllm.processing.messages import Message, Part

SUFFIXES = {
    "image": (
        ".jpg",
        ".jpeg",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".avif",
        ".jp2",
        ".ppm",
        ".tga",
        ".ico",
    ),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".au"),
    "video": (".mp4", ".webm", ".mkv", ".mov", ".avi", ".mpg", ".mpeg", ".m4v", ".ogv"),
    "point_cloud": (".ply", ".obj", ".off", ".stl", ".glb", ".gltf", ".npy"),
}
"""By which ends of their names media are told apart where no row says what they are. What opens is told by the bytes."""


Layout = Literal["messages", "llava", "sharegpt", "captions"]


class AttachedReaderConfig(TableReaderConfig):
    """What readers of shards and tables share.

    ``layout``: of the rows, as the readers of files have them; ``captions`` are pairs of a medium and a text, asked for with
    ``prompt``. ``caption`` says where that text is. ``limit``: only the first so many rows.
    """

    layout: Layout = "messages"
    prompt: str = "Describe this."
    caption: Annotated[str, Field(min_length=1)]
    limit: PositiveInt | None = None

    @classmethod
    @abstractmethod
    def of(cls, path: str, root: str | None = None) -> Self:
        """The reader of files of one's own, with the layout that the first rows have."""

    @abstractmethod
    def table(self, context: BuildContext) -> SampleTable:
        """The samples by row, damaged files included: what ``open`` gives where it does not refuse."""

    def convert(self, row: Mapping[str, Any], where: str) -> layouts.Converted:
        """Id, messages and tags of a row in any layout but ``captions``."""
        if self.layout == "llava":
            return layouts.llava(row, where, self.prompt)
        return layouts.sharegpt(row, where) if self.layout == "sharegpt" else layouts.messages(row, where)


def captioned(media: Sequence[Part], caption: str, prompt: str, where: str) -> tuple[Message, ...]:
    """A question about media, and the caption as its answer."""
    if not media:
        raise DataError(
            f"{where}: no medium beside the caption; they are told by their names' ends (.jpg, .wav, .mp4, …)"
        )
    return (
        Message("user", (*media, Part("text", prompt))),
        Message("assistant", (Part("text", caption),)),
    )


def modality_of(name: str) -> str | None:
    """The modality of a file by the end of its name."""
    suffix = PurePosixPath(name.lower()).suffix or f".{name.lower()}"
    return next((modality for modality, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def with_media(messages: Sequence[Message], find: Callable[[Part], str | bytes]) -> tuple[Message, ...]:
    """The messages with what ``find`` gives in place of the names of media. ``data:`` URLs are media already."""

    def found(part: Part) -> Part:
        named = part.type != "text" and isinstance(part.value, str) and part.value[:5].lower() != "data:"
        return replace(part, value=find(part)) if named else part

    return tuple(Message(message.role, tuple(map(found, message.parts))) for message in messages)


def guessed(rows: Iterable[Mapping[str, Any] | None]) -> Layout:
    """The layout of the first row that has one; ``captions`` where no row (None: it has none) looks like a conversation."""
    for row in rows:
        found = None if row is None else layouts.guess(row)
        if found in ("messages", "llava", "sharegpt"):
            return found  # type: ignore[return-value]
    return "captions"
