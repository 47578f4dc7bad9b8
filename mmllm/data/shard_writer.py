"""``mmllm data shard``: samples with their media into tar shards with an index."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import tarfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from mmllm.config.base import BuildContext, suggest
from mmllm.config.load import load
from mmllm.data.dataset import MAX_FAILURES, Failure, causes
from mmllm.data.kinds import reader_of
from mmllm.data.shards import INDEX, Shard, write_index
from mmllm.data.tables import SampleTable, TableReaderConfig
from mmllm.data.tar import BLOCK, PICKLES
from mmllm.errors import ConfigError, DataError, MediaError
from mmllm.processing.messages import Part, Sample
from mmllm.processing.sources import Limits, read_media

SAMPLES_PER_SHARD = 10_000

_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")
_MAGIC = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"fLaC": ".flac",
    b"OggS": ".ogg",
    b"ID3": ".mp3",
    b"glTF": ".glb",
    b"\x93NUMPY": ".npy",
}


@dataclass
class Written:
    """What was written: the shards, how many samples and bytes, and the samples that were left out."""

    shards: list[Path] = field(default_factory=list)
    samples: int = 0
    bytes: int = 0
    left_out: list[Failure] = field(default_factory=list)


def write_shards(
    table: SampleTable,
    folder: Path,
    *,
    samples_per_shard: int | None = None,
    bytes_per_shard: int | None = None,
    limits: Limits | None = None,
) -> Written:
    """Write a table's samples, in order, as ``folder/000000.tar``, ``000001.tar``, … each with its index.

    A sample is the member ``000123.json``, a row in the messages layout with all its tags, and its media ``000123.0.jpg``, …,
    bytes as they were. A shard ends before it would have more than ``samples_per_shard`` samples or, unless it is its first, with a
    sample that takes it over ``bytes_per_shard``; without either at 10,000 samples. The same samples give the same bytes.
    Each shard is complete before it gets its name.

    Samples whose row or media cannot be read are left out and named in the result. Raises ``DataError`` when the folder
    already holds shards, after ``MAX_FAILURES`` such samples in a row, or when not one can be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = sorted(path.name for path in folder.iterdir() if path.suffix == ".tar")
    if taken:
        raise DataError(f"{folder}: already holds {taken[0]}; choose an empty folder")
    most = samples_per_shard or (SAMPLES_PER_SHARD if bytes_per_shard is None else sys.maxsize)
    written, writer = Written(), None
    try:
        for number, content in enumerate(_packed(table, written, limits or Limits())):
            size = _size_of(content)
            over = bytes_per_shard is not None and writer is not None and writer.position + size > bytes_per_shard
            if writer is not None and (len(writer.starts) == most or over):
                written.bytes += writer.close()
                writer = None
            if writer is None:
                writer = _Writer(folder / f"{len(written.shards):06d}.tar")
                written.shards.append(writer.path)
            writer.add([(f"{number:06d}.{extension}", data) for extension, data in content])
            written.samples += 1
        if writer is not None:
            written.bytes += writer.close()
            writer = None
    finally:
        if writer is not None:
            writer.discard()
    if not written.samples:
        raise DataError(f"no sample can be used; the first causes:\n{causes(written.left_out)}")
    return written


def run_shard(
    source: str,
    output: str,
    *,
    format: str | None = None,
    root: str | None = None,
    stage: str | None = None,
    samples_per_shard: int | None = None,
    bytes_per_shard: int | None = None,
) -> int:
    """The command: shard a data file, or every source of a configuration's stage, and print what reads them."""
    sources = list(_sources(source, format, root, stage))
    read: list[dict[str, Any]] = []
    for number, (reader, context, extra) in enumerate(sources):
        folder = Path(output) if len(sources) == 1 else Path(output) / str(number)
        table = reader.open(context)
        written = write_shards(table, folder, samples_per_shard=samples_per_shard, bytes_per_shard=bytes_per_shard)
        for failure in written.left_out:
            print(f"left out: {causes([failure]).strip()}", file=sys.stderr)
        left = f", {len(written.left_out)} left out" if written.left_out else ""
        print(f"{folder}: {written.samples} samples in {len(written.shards)} shards, {written.bytes:,} bytes{left}")
        read.append({"reader": {"kind": "webdataset", "path": str(folder.absolute() / "*.tar")}} | extra)
    print(yaml.safe_dump({"data": read}, sort_keys=False).rstrip())
    return 0


def _sources(
    source: str, format: str | None, root: str | None, stage: str | None
) -> Iterator[tuple[TableReaderConfig, BuildContext, dict[str, Any]]]:
    """Reader, context and further keys of every source."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        yield reader_of(source, format, root), BuildContext(), {}
        return
    config = load(path, local_plugins=True)
    names = [one.name for one in config.stages]
    if stage is not None and stage not in names:
        raise ConfigError([("stages", f"no stage {stage!r}{suggest(stage, names)}; the stages are {', '.join(names)}")])
    if not names:
        raise ConfigError([("stages", "none; expected at least one stage with data")])
    for data in config.stages[0 if stage is None else names.index(stage)].data:
        if not isinstance(data.reader, TableReaderConfig):
            raise ConfigError(
                [("stages", f"reader {data.reader.kind!r} has no random access, so it cannot be sharded")]
            )
        extra = {} if data.weight == 1.0 else {"weight": data.weight}
        yield data.reader, BuildContext(root=path.resolve().parent), extra


def _packed(table: SampleTable, written: Written, limits: Limits) -> Iterator[list[tuple[str, bytes]]]:
    """The members of every usable sample, the row first."""
    in_a_row = 0
    for index in range(len(table)):
        try:
            content = pack(table[index], limits)
        except (DataError, MediaError) as error:
            written.left_out.append(Failure(index, table.where(index), type(error).__name__, str(error)))
            in_a_row += 1
            if in_a_row == MAX_FAILURES:
                text = f"{in_a_row} samples in a row cannot be used; the first causes:"
                raise DataError(f"{text}\n{causes(written.left_out[-in_a_row:])}") from error
            continue
        in_a_row = 0
        yield content


def pack(sample: Sample, limits: Limits) -> list[tuple[str, bytes]]:
    """Extension and content of a sample's members: ``json``, then each medium once, ``0.jpg``, ``1.wav``, …

    Raises ``MediaError`` for a medium that cannot be read, ``DataError`` for tags that JSON does not know.
    """
    media: list[tuple[str, bytes]] = []
    names: dict[str | bytes, str] = {}

    def told(part: Part) -> dict[str, Any]:
        if part.type == "text":
            return {"type": "text", "text": part.value}
        known: dict[str, Any] = {"type": part.type}
        if part.value is not None:
            if part.value not in names:
                data = read_media(part.value, root=sample.root, limits=limits)
                names[part.value] = f"{len(media)}{_suffix(part.value, data)}"
                media.append((names[part.value], data))
            known["path"] = names[part.value]
        return known | {key: value for key in ("caption", "source") if (value := vars(part)[key]) is not None}

    messages = [{"role": m.role, "content": [told(part) for part in m.parts]} for m in sample.messages]
    try:
        row = json.dumps({"id": sample.id, **sample.tags, "messages": messages}, ensure_ascii=False)
        return [("json", row.encode("utf-8")), *media]
    except (TypeError, ValueError) as error:
        raise DataError(f"{sample.id}: a tag cannot be written as JSON ({error})") from error


def _suffix(source: str | bytes, data: bytes) -> str:
    """How the medium's name is to end: as the file's did, else by its first bytes. (Decoders go by the bytes alone.)"""
    suffix = "" if isinstance(source, bytes) or source[:5].lower() == "data:" else PurePosixPath(source.lower()).suffix
    if _SUFFIX.fullmatch(suffix) and suffix not in (*PICKLES, ".json", ".txt"):
        return suffix
    if data[:4] == b"RIFF":
        return {b"WAVE": ".wav", b"WEBP": ".webp"}.get(data[8:12], ".avi")
    if data[4:8] == b"ftyp":
        return ".mp4"
    return next((end for magic, end in _MAGIC.items() if data.startswith(magic)), ".bin")


def _size_of(content: Iterable[tuple[str, bytes]]) -> int:
    return sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for _, data in content)


class _Writer:
    """A shard being written beside its place."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(f".{path.name}.part")
        self.starts, self.ends, self.checks = array("q"), array("q"), array("q")
        self.digest, self.position = hashlib.sha256(), 0
        self.file = self.part.open("wb")

    def add(self, members: Iterable[tuple[str, bytes]]) -> None:
        """One sample. Owners and times are left out, so that the same samples give the same file."""
        content = io.BytesIO()
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            content.write(info.tobuf(tarfile.USTAR_FORMAT))
            content.write(data)
            content.write(bytes(-len(data) % BLOCK))
        self.starts.append(self.position)
        self.checks.append(zlib.crc32(content.getbuffer()))
        self._write(content.getvalue())
        self.ends.append(self.position)

    def close(self) -> int:
        """End the archive, give it its name, then write its index. Returns its size in bytes."""
        self._write(bytes(2 * BLOCK))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.part, self.path)
        shard = Shard(self.path, self.starts, self.ends, self.checks, self.digest.hexdigest(), (self.position, 0))
        write_index(shard, self.path.with_name(self.path.name + INDEX))
        return self.position

    def discard(self) -> None:
        """Remove what was written of the shard."""
        self.file.close()
        self.part.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.position += len(data)
