"""Tables without random access: rows of many files, read forwards, in an order that is a function of seed and position.

A stream is endless: pass after pass over its files, each pass in a new order. Files are dealt out to ``lanes``; the row at
position p comes from lane ``p % lanes``. Within a lane the rows of every ``buffer`` are shuffled among themselves. So what stands
at a position depends on seed, files and these two numbers, not on who reads it: no state is kept, any number of processes and
workers sees the same rows, and a resumed run goes on where it was. Rows before a position are passed over, undecoded; files
whose number of rows is known from an earlier reading are not even opened for that.

A process that takes every n-th position reads only its share of the files where n divides ``lanes``.
"""

from __future__ import annotations

import hashlib
import logging
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol, Self

from mmllm.data.orders import permutation
from mmllm.data.shards import index_folder
from mmllm.data.tables import SampleTable
from mmllm.errors import DataError, MmllmError, brief
from mmllm.processing.messages import Sample

log = logging.getLogger(__name__)

BUFFER = 256
_FILES, _ROWS = 3, 4  # uses of the seed; mmllm.data.mixture has 0 to 2


class Batch(Protocol):
    """Some consecutive rows of a file, as Arrow has them: cheap to count and to cut, not yet Python objects."""

    @property
    def num_rows(self) -> int: ...

    def slice(self, offset: int, length: int) -> Self: ...

    def to_pylist(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Place:
    """A row of a stream: the ``number``-th (from 0) of ``file``. ``row`` is None where the file could not be read further, which
    ``problem`` tells.
    """

    file: int
    number: int
    row: dict[str, Any] | None
    problem: str = ""


class StreamTable(SampleTable):
    """A stream of files. As a table it has the ``rows`` of an epoch, which are its first; ``at`` reads at any position.

    Reading forwards is cheap. Each process keeps three blocks of a lane: the one that it reads, the one before, and the first.
    """

    def __init__(self, files: Sequence[tuple[str, str]], *, rows: int, buffer: int, lanes: int) -> None:
        """``files``: name and digest of each, in a fixed order. Raises ``DataError`` for more lanes than files."""
        if lanes > len(files):
            raise DataError(f"{len(files)} files cannot be dealt out to {lanes} lanes; give fewer `lanes`")
        self.files, self.rows, self.buffer, self.lanes = list(files), rows, buffer, lanes
        self.seed = self.source = 0
        self._counts = RowCounts(index_folder().parent / "streams")
        self._forget()

    @abstractmethod
    def batches(self, file: int) -> Iterator[Batch]:
        """The rows of a file, in order."""

    @abstractmethod
    def convert(self, row: dict[str, Any], where: str, id: str) -> Sample:
        """The sample of a row. Raises ``DataError`` naming ``where``."""

    @property
    def remote(self) -> bool:
        """Whether reading may fail for other reasons than the file's content: then a failure ends the run."""
        return False

    def seeded(self, seed: int, source: int) -> Self:
        """This stream in the order of a run's seed, as the run's source of that number."""
        self.seed, self.source = seed, source
        self._forget()
        return self

    def __len__(self) -> int:
        return self.rows

    def sample(self, row: int) -> Sample:
        return self.at(row)

    def at(self, position: int) -> Sample:
        """The sample at a position from 0. Raises ``DataError`` naming file and row."""
        place = self._place(position)
        where = self._where(place)
        if place.row is None:
            raise DataError(f"{where}: {place.problem}")
        return self.convert(place.row, where, f"{Path(self.files[place.file][0]).name}:{place.number + 1}")

    def where(self, index: int) -> str:
        """``file:row`` of what stands at a position."""
        return self._where(self._place(index))

    def neighbours(self, position: int, blocks: int) -> range:
        """The positions of the block that a position is in, which are at hand when it is read, and of the ``blocks - 1`` that
        follow.
        """
        start, stop = self._block(position // self.lanes)
        for _ in range(blocks - 1):
            stop = self._block(stop)[1]
        return range(position % self.lanes + start * self.lanes, stop * self.lanes, self.lanes)

    def contents(self) -> list[tuple[str, str]]:
        """Every file's name, without its folder, and digest."""
        return [(Path(name).name, digest) for name, digest in self.files]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reading": {}, "_blocks": {}}

    def _forget(self) -> None:
        self._reading: dict[int, _Lane] = {}
        self._blocks: dict[int, dict[int, list[Place]]] = {}
        self._process = os.getpid()

    def _where(self, place: Place) -> str:
        return f"{self.files[place.file][0]}:{place.number + 1}"

    def _place(self, position: int) -> Place:
        if self._process != os.getpid():  # a forked worker must not go on with its parent's open files
            self._forget()
        lane, number = position % self.lanes, position // self.lanes
        start, stop = self._block(number)
        held = self._blocks.setdefault(lane, {})
        if start not in held:
            reading = self._reading.get(lane) or self._reading.setdefault(lane, _Lane(self, lane, self._counts))
            rows = reading.take(start, stop)
            kept = [other for other in held if other]  # the first stays: replies are sampled from it
            for old in kept[:-1]:  # and so does the last, for its bad rows take others from this one
                del held[old]
            held[start] = rows
        order = permutation(self.seed, stop - start, _ROWS, self.source, lane, start)
        return held[start][int(order[number - start])]

    def _block(self, number: int) -> tuple[int, int]:
        """The rows of a lane that are shuffled with its row ``number``. No block lies in two epochs: where an epoch is a pass, it
        holds every row once.
        """
        each = self.rows // self.lanes
        epoch, place = divmod(number, each)
        start = place // self.buffer * self.buffer
        return epoch * each + start, epoch * each + min(start + self.buffer, each)


class _Lane:
    """Reads one lane's files, pass after pass."""

    def __init__(self, stream: StreamTable, lane: int, counts: RowCounts) -> None:
        self.stream, self.lane, self.counts = stream, lane, counts
        self.position = self.target = 0
        self.pending: Batch | str | None = None
        self.begin = (0, 0)  # file, and number of its row, where `pending` begins
        self.source = self._batches()

    def take(self, start: int, stop: int) -> list[Place]:
        """The rows from ``start`` to ``stop``, counted in the lane."""
        if start < self.position:
            self.position, self.pending, self.source = 0, None, self._batches()
        self.target = start
        taken: list[Place] = []
        while self.position < stop:
            if self.pending is None:
                file, number, self.pending = next(self.source)
                self.begin = (file, number)
                continue
            file, number = self.begin
            skip = min(max(start - self.position, 0), _size(self.pending))
            use = min(_size(self.pending) - skip, stop - self.position - skip)
            if use:
                taken += _places(self.pending, file, number, skip, use)
            done = skip + use
            self.position += done
            self.begin = (file, number + done)
            self.pending = _after(self.pending, done)
        return taken

    def _batches(self) -> Iterator[tuple[int, int, Batch | str]]:
        """File, number of the first row in it, and rows; a text for what cannot be read. Whole files before the target are
        passed over where their length is known.
        """
        stream = self.stream
        own = range(self.lane, len(stream.files), stream.lanes)
        for number in count():
            met = False
            for file in permutation(stream.seed, len(own), _FILES, stream.source, self.lane, number):
                name, digest = stream.files[own[file]]
                known = self.counts.get(name, digest)
                if known is not None and self.position + known <= self.target:
                    self.position += known
                    met |= known > 0
                    continue
                read = 0
                try:
                    for batch in stream.batches(own[file]):
                        if batch.num_rows:
                            yield own[file], read, batch
                        read += batch.num_rows
                except Exception as error:  # every format has its own
                    text = f"the file cannot be read further ({type(error).__name__}: {brief(error, 160)})"
                    if stream.remote:
                        raise MmllmError(f"{name}: {text}; --resume goes on from the newest checkpoint") from error
                    log.warning("%s: %s", name, text)
                    yield own[file], read, text
                    met = True
                    continue
                met |= read > 0
                self.counts.put(name, digest, read)
            if not met:
                raise MmllmError(f"{stream.files[own[0]][0]}: this file, and all others of its lane, hold no rows")


def _size(batch: Batch | str) -> int:
    return 1 if isinstance(batch, str) else batch.num_rows


def _after(batch: Batch | str, done: int) -> Batch | str | None:
    """What is left of a batch."""
    return None if isinstance(batch, str) or done == batch.num_rows else batch.slice(done, batch.num_rows - done)


def _places(batch: Batch | str, file: int, number: int, start: int, size: int) -> list[Place]:
    if isinstance(batch, str):
        return [Place(file, number, None, batch)]
    rows = batch.slice(start, size).to_pylist()
    return [Place(file, number + start + place, row) for place, row in enumerate(rows)]


class RowCounts:
    """How many rows files have, as far as they have been read to the end before: a file for each number, in ``folder``.

    It saves time and decides nothing: without it the same rows are passed over by reading them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, int] = {}

    def get(self, name: str, digest: str) -> int | None:
        key = self._key(name, digest)
        if key not in self.known:
            with suppress(OSError, ValueError):
                self.known[key] = int((self.folder / key).read_text(encoding="ascii"))
        return self.known.get(key)

    def put(self, name: str, digest: str, rows: int) -> None:
        key = self._key(name, digest)
        if self.known.get(key) == rows:
            return
        self.known[key] = rows
        part = self.folder / f"{key}.{os.getpid()}"
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_text(str(rows), encoding="ascii")
            part.replace(self.folder / key)

    @staticmethod
    def _key(name: str, digest: str) -> str:
        return hashlib.sha256(f"{name}\0{digest}".encode()).hexdigest()[:32]
