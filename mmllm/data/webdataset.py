"""The ``webdataset`` reader: samples in tar shards, with random access."""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator

from mmllm.config.base import BuildContext
from mmllm.data.attached import AttachedReaderConfig, captioned, guessed, modality_of, with_media
from mmllm.data.rows import MAX_ROW_BYTES, parse_row
from mmllm.data.shards import Shard, open_shard
from mmllm.data.tables import SampleTable, expand
from mmllm.errors import ConfigError, DataError
from mmllm.processing.messages import Part, Sample

log = logging.getLogger(__name__)

MAX_DAMAGED = 0.1
"""When more than this share of the shards is damaged, the data are not used at all."""

GUESSED = 8
"""Samples of a shard, and shards, that are looked at to tell a layout."""

_COMMAND = re.compile(r"\s*(pipe\s*:|[A-Za-z][A-Za-z0-9+.\-]+:)")


class WebDatasetConfig(AttachedReaderConfig):
    """Tar shards in WebDataset's layout: members of one key (``000123.json``, ``000123.0.jpg``) are one sample.

    ``path``: a shard or a pattern (``cc3m-{00000..00331}.tar``, ``shards/*.tar``), or several. Each row is the member ``json``
    in the given ``layout``; its media are members of the same sample, by name or by extension (``0.jpg``).
    With ``layout: captions`` the members' extensions tell media, and ``caption`` which member is the text: ``txt``, or
    ``json.title`` for the field ``title`` of the JSON.
    """

    kind: Literal["webdataset"] = "webdataset"
    path: str | Annotated[list[str], Field(min_length=1)]
    caption: Annotated[str, Field(min_length=1)] = "txt"

    @field_validator("path")
    @classmethod
    def _local_files(cls, value: str | list[str]) -> str | list[str]:
        for path in [value] if isinstance(value, str) else value:
            if _COMMAND.match(path):
                raise ValueError(f"{path!r:.80}: shards are local files; commands (pipe:) and URLs are never opened")
        return value

    @classmethod
    def of(cls, path: str, root: str | None = None) -> Self:
        """The reader of shards, with the layout of their first samples. Raises ``ConfigError`` and ``DataError``."""
        if root is not None:
            raise ConfigError([("", "media are in the shards themselves; leave it out")], "--root")
        reader = cls.checked({"path": path})
        shards = reader.table(BuildContext()).shards
        return reader.model_copy(update={"layout": guessed(_first_rows(shards))})

    def table(self, context: BuildContext) -> ShardTable:
        """The samples by number. Raises ``DataError`` for shards that are missing or refused."""
        paths = expand([self.path] if isinstance(self.path, str) else self.path, context.root)
        return ShardTable(self, tuple(map(open_shard, paths)))

    def open(self, context: BuildContext) -> ShardTable:
        """The samples by number. Raises ``DataError`` for shards that are missing, refused, or damaged in too great a share."""
        table = self.table(context)
        shards = table.shards
        damaged = [shard.damage for shard in shards if shard.damage is not None]
        causes = "".join(f"\n  {damage}" for damage in damaged[:5])
        if len(damaged) > MAX_DAMAGED * len(shards):
            raise DataError(
                f"{len(damaged)} of {len(shards)} shards are damaged, the limit is {MAX_DAMAGED:.0%}; the first causes:{causes}"
            )
        for damage in damaged:
            log.warning("%s; the samples before it are used", damage)
        if not len(table):
            raise DataError(f"{shards[0].path}: holds no samples; members of a sample are named KEY.json, KEY.jpg, …")
        return table

    def tiny(self) -> Self:
        """The first eight samples."""
        return self.model_copy(update={"limit": min(self.limit or 8, 8)})


class ShardTable(SampleTable):
    """The samples of a row of shards. A damaged shard's last sample cannot be used: it stands for what is missing."""

    def __init__(self, reader: WebDatasetConfig, shards: tuple[Shard, ...]) -> None:
        self.reader, self.shards = reader, shards
        self._stops = list(accumulate(map(len, shards)))

    def __len__(self) -> int:
        total = self._stops[-1]
        return total if self.reader.limit is None else min(total, self.reader.limit)

    def sample(self, row: int) -> Sample:
        """The sample of a number, with its media in memory. Raises ``DataError`` naming shard and number."""
        shard, number = self._find(row)
        where = shard.where(number)
        key, found = shard.read(number)
        if self.reader.layout == "captions":
            media = [Part(kind, data) for name, data in found.items() if (kind := modality_of(name)) is not None]
            return Sample(key, captioned(media, _caption(self.reader.caption, found, where), self.reader.prompt, where))
        id, messages, tags = self.reader.convert(_row(found, where), where)
        parts = {(part.type, part.value) for message in messages for part in message.parts}
        named = Counter(kind for kind, value in parts if value is not None)
        find = _Members(key, found, where, frozenset(kind for kind, count in named.items() if count == 1))
        return Sample(key if id is None else id, with_media(messages, find), None, tags)

    def where(self, index: int) -> str:
        """``shard:number`` of a sample, counted from 1."""
        shard, number = self._find(index)
        return shard.where(number)

    def contents(self) -> list[tuple[str, str]]:
        """Every shard's name and digest."""
        return [(shard.path.name, shard.digest) for shard in self.shards]

    def _find(self, row: int) -> tuple[Shard, int]:
        number = bisect_right(self._stops, row)
        return self.shards[number], row - (self._stops[number - 1] if number else 0)


@dataclass(frozen=True)
class _Members:
    """The member that a row means by a name. ``alone``: the modalities of which the row names one medium only."""

    key: str
    found: Mapping[str, bytes]
    where: str
    alone: frozenset[str]

    def __call__(self, part: Part) -> bytes:
        name = str(part.value)
        for prefix in ("", f"{self.key}.", f"{self.key.rpartition('/')[2]}."):
            extension = name.removeprefix(prefix).lower()
            if name.startswith(prefix) and extension in self.found:
                return self.found[extension]
        same = [extension for extension in self.found if modality_of(extension) == part.type]
        if len(same) == 1 and part.type in self.alone:  # rows that name the file which the medium once was
            return self.found[same[0]]
        known = ", ".join(sorted(self.found))
        raise DataError(
            f"{self.where}: no member {name!r:.80} for this {part.type}; the sample {self.key!r:.40} has {known:.200}"
        )


def _first_rows(shards: tuple[Shard, ...]) -> Iterator[dict[str, Any] | None]:
    for shard in shards[:GUESSED]:
        for number in range(min(len(shard), GUESSED)):
            try:
                found = shard.read(number)[1]
                yield _row(found, shard.where(number)) if "json" in found else None
            except DataError:
                continue


def _row(found: Mapping[str, bytes], where: str) -> dict[str, Any]:
    if "json" not in found:
        hint = "; for pictures with texts beside them use `layout: captions`" if "txt" in found else ""
        raise DataError(f"{where}: no member .json; the sample has {', '.join(sorted(found)):.200}{hint}")
    data = found["json"]
    if len(data) > MAX_ROW_BYTES:
        raise DataError(f"{where}: the JSON has {len(data):,} bytes, the limit is {MAX_ROW_BYTES:,}")
    return parse_row(data, where)


def _caption(name: str, found: Mapping[str, bytes], where: str) -> str:
    member, _, key = name.partition(".")
    if member == "json" and key:
        text = _row(found, where).get(key)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: {key!r:.40} of the JSON is {text!r:.40}; expected a text")
        return text
    if name not in found:
        raise DataError(f"{where}: no member .{name} with the caption; the sample has {', '.join(sorted(found)):.200}")
    try:
        text = found[name].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: the member .{name} is not UTF-8 text") from error
    if not text:
        raise DataError(f"{where}: the member .{name} is empty; expected a caption")
    return text
