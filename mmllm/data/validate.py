"""``mmllm data validate``: every fault of a data file, as ``file:line: message``."""

from __future__ import annotations

import mmap
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from mmllm.config.base import BuildContext, suggest
from mmllm.data import layouts
from mmllm.data.attached import AttachedReaderConfig
from mmllm.data.kinds import attached_kind, formats, guess
from mmllm.data.readers import FileReaderConfig
from mmllm.data.rows import Rows, index_file
from mmllm.errors import DataError, MediaError, MmllmError
from mmllm.processing.messages import Message, Part, check_turns
from mmllm.processing.sources import Limits, read_media

MAX_UNREADABLE = 100
"""After so many rows in a row that are not JSON objects the file is taken for something else, and not read further."""


@dataclass(frozen=True)
class Fault:
    """``where`` is ``file:line``."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass
class Report:
    """What ``validate`` found. ``media`` counts the references to media by modality; ``notes`` are no faults."""

    path: Path
    format: str | None = None
    rows: int = 0
    faults: list[Fault] = field(default_factory=list)
    media: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults

    def summary(self) -> str:
        """One line: format, rows, media, faults."""
        media = ", ".join(f"{count} {name}" for name, count in sorted(self.media.items())) or "no"
        faults = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}" if self.faults else "no faults"
        return f"{self.path}: format {self.format or 'unknown'}, {self.rows} rows, {media} media, {faults}"


def validate(
    path: str | Path,
    format: str | None = None,
    *,
    fast: bool = False,
    root: str | Path | None = None,
    limits: Limits | None = None,
    progress: bool = False,
) -> Report:
    """Check a data file: JSON, layout, roles and turns, ids used twice, tags against media, and every media file.

    ``format`` is a reader's kind; when not given, the first readable row decides. ``fast`` does not decode media.
    ``root`` is the media folder where it is not the file's own. ``progress`` shows a bar on standard error.
    Faults are collected, never raised.
    """
    report = Report(Path(path), format)
    known = formats()
    if format is not None and format not in known:
        text = f"format {format!r} is unknown; the formats are {', '.join(known)}{suggest(format, known)}"
        report.faults.append(Fault(f"{path}:1", text))
        return report
    kind = format or attached_kind(str(path))
    cls = None if kind is None else known[kind]
    if cls is not None and issubclass(cls, AttachedReaderConfig):
        report.format = kind
        _check_table(report, cls, str(path), fast, root, limits or Limits(), progress)
        return report
    try:
        rows = index_file(report.path)
    except DataError as error:
        report.faults.append(_fault(f"{path}:1", str(error)))
        return report
    if root is not None and not Path(root).is_dir():
        report.faults.append(Fault(f"{path}:1", f"the root {root} is no folder; media paths start from it"))
        return report
    report.rows = len(rows)
    report.faults += _text_faults(report.path)
    if not rows and rows.problem is None:
        report.faults.append(Fault(f"{path}:1", "the file holds no rows"))
    report.format = format or guess(rows)
    if report.format is not None:
        check_media = _MediaCheck(Path(root or report.path.parent), fast, limits or Limits())
        reader = known[report.format].model_validate({"path": str(path)})
        assert isinstance(reader, FileReaderConfig)
        _check_rows(report, rows, reader, check_media, progress)
    elif rows:
        text = f"no row has a known layout; the formats are {', '.join(known)}"
        report.faults.append(Fault(rows.where(0), text))
    if rows.problem is not None:
        report.faults.append(_fault(f"{path}:1", rows.problem))
    return report


def run_validate(file: str, format: str | None = None, fast: bool = False, root: str | None = None) -> int:
    """The command: prints the faults and a summary; returns 1 if there is any fault, else 0."""
    report = validate(file, format, fast=fast, root=root, progress=sys.stderr.isatty())
    for fault in report.faults:
        print(fault)
    for note in report.notes:
        print(f"note: {note}")
    print(report.summary())
    return 0 if report.ok else 1


def _check_rows(
    report: Report, rows: Rows, reader: FileReaderConfig, check_media: Callable[[Part], str | None], progress: bool
) -> None:
    check = _SampleCheck(report, lru_cache(maxsize=100_000)(check_media))  # one picture often serves many rows
    unreadable = 0
    for index in _track(range(len(rows)), progress):
        where = rows.where(index)
        try:
            row = rows[index]
            unreadable = 0
        except DataError as error:
            report.faults.append(_fault(where, str(error)))
            unreadable += 1
            if unreadable == MAX_UNREADABLE:
                report.faults.append(Fault(where, f"{unreadable} rows without a JSON object; the rest is not read"))
                return
            continue
        try:
            id, messages, _ = reader.convert(row, where)
            # LLaVA's question files have no replies: they are asked, not learned from.
            check_turns(messages, where, training="question_id" not in row)
        except DataError as error:
            report.faults.append(_fault(where, str(error)))
            continue
        if id is None and "id" in row:
            report.faults.append(Fault(where, "id is null; give a text or a number, or leave it out"))
        check(where, f"line {rows.lines[index]}", id, messages)


def _check_table(
    report: Report,
    cls: type[AttachedReaderConfig],
    path: str,
    fast: bool,
    root: str | Path | None,
    limits: Limits,
    progress: bool,
) -> None:
    """The faults of shards or tables, sample by sample; a damaged shard is a fault of its own."""
    try:
        reader = cls.of(path, None if root is None else str(root))
        table = reader.table(BuildContext())
    except MmllmError as error:
        report.faults.append(_fault(f"{path}:1", str(error)))
        return
    report.rows = len(table)
    report.notes.append(f"rows have the layout {reader.layout}")
    if not report.rows:
        report.faults.append(Fault(f"{path}:1", "holds no samples"))
    check = _SampleCheck(report, _MediaCheck(None, fast, limits))
    unreadable = 0
    for index in _track(range(len(table)), progress):
        try:
            sample = table[index]
            where = table.where(index)
            check_turns(sample.messages, where, training=True)
        except DataError as error:
            where = table.where(index)
            report.faults.append(_fault(where, str(error)))
            unreadable += 1
            if unreadable == MAX_UNREADABLE:
                report.faults.append(Fault(where, f"{unreadable} samples in a row with faults; the rest is not read"))
                return
            continue
        unreadable = 0
        check.media = _MediaCheck(sample.root, fast, limits)
        check(where, where, sample.id, sample.messages)


@dataclass
class _SampleCheck:
    """What is looked for in a sample of any source: silent users, ids used before, media that do not open."""

    report: Report
    media: Callable[[Part], str | None]
    ids: dict[str, str] = field(default_factory=dict)

    def __call__(self, where: str, place: str, id: str | None, messages: Sequence[Message]) -> None:
        report = self.report
        for number, message in enumerate(messages):
            if message.role == "user" and all(
                part.type == "text" and not str(part.value).strip() for part in message.parts
            ):
                report.faults.append(Fault(where, f"message {number}: the user says nothing; expected text or media"))
        if id is not None and self.ids.setdefault(id, place) != place:
            report.faults.append(Fault(where, f"id {id!r:.80} is used before, in {self.ids[id]}; ids are unique"))
        media = [part for message in messages for part in message.parts if part.type != "text"]
        report.media.update(part.type for part in media)
        problems = dict.fromkeys(self.media(part) for part in media)
        report.faults += [Fault(where, problem) for problem in problems if problem is not None]


@dataclass(frozen=True)
class _MediaCheck:
    root: Path | None
    fast: bool
    limits: Limits

    def __call__(self, part: Part) -> str | None:
        """What is wrong with a media part, if anything."""
        if part.type not in layouts.MODALITIES:
            known = ("text", *layouts.MODALITIES)
            return f"a part of type {part.type!r:.40}; expected one of {', '.join(known)}{suggest(part.type, known)}"
        if part.value is None:  # the assistant's, known by its caption alone
            return None
        try:
            data = read_media(part.value, root=self.root, limits=self.limits)
            if not self.fast:
                _decode(part.type, data, self.limits)
        except MediaError as error:
            return f"{part.type} {part.value!r:.80}: {error}" if repr(part.value)[:20] not in str(error) else str(error)
        return None


def _decode(modality: str, data: bytes, limits: Limits) -> None:
    from mmllm.processing.audio import decode_audio
    from mmllm.processing.images import decode_image
    from mmllm.processing.point_clouds import decode_point_cloud
    from mmllm.processing.video import decode_video

    decoders: dict[str, Callable[[bytes, Limits], object]] = {
        "image": decode_image,
        "audio": lambda data, limits: decode_audio(data, 16_000, limits),
        "video": lambda data, limits: decode_video(data, limits, frames=3),
        "point_cloud": lambda data, limits: decode_point_cloud(data, limits, points=1024),
    }
    decoders[modality](data, limits)


def _text_faults(path: Path) -> list[Fault]:
    """Marks that the readers here step over, but that other programs choke on."""
    faults = []
    with path.open("rb") as file:
        if file.read(3) == b"\xef\xbb\xbf":
            faults.append(Fault(f"{path}:1", "begins with a byte order mark; save the file as UTF-8 without one"))
        if path.stat().st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = data.find(b"\r\n")
                if found >= 0:
                    line = data[:found].count(b"\n") + 1
                    faults.append(Fault(f"{path}:{line}", "the line ends with CR LF; save the file with LF line ends"))
    return faults


def _fault(where: str, message: str) -> Fault:
    """The readers' messages begin with a place of their own, which may be more exact than ``where``."""
    place, separator, rest = message.partition(": ")
    path = where.rpartition(":")[0]
    if separator and place.startswith(path):
        return Fault(place if place != path else where, rest)
    return Fault(where, message)


def _track(numbers: range, progress: bool) -> Iterable[int]:
    from rich.console import Console
    from rich.progress import track

    return track(numbers, "checking", console=Console(stderr=True), disable=not progress)
