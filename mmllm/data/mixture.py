"""The samples of a training stage: a weighted mixture in an order that depends on seed and epoch alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mmllm.config.base import BuildContext
from mmllm.config.families import ReaderConfig
from mmllm.config.run import DataSource
from mmllm.data.readers import FileReaderConfig, Table
from mmllm.errors import ConfigError, DataError
from mmllm.processing.messages import Sample

_PASS, _EPOCH, _REPLACEMENT = 0, 1, 2  # keep the three uses of one seed apart


class StageData(Sequence[Sample]):
    """All samples of a stage by index, ``0 .. len - 1``: source after source, in file order.

    **Weights.** A source of n rows with weight w gives ``w * n`` samples an epoch. Think of an endless sequence of
    passes over the source, each pass every row once in a new random order; every epoch takes the next ``w * n`` of it
    (epoch e ends at number ``floor((e + 1) * w * n)``). So weight 1 is every row once an epoch, 2 is every row twice,
    and 0.25 walks through the whole source in four epochs. The samples of all sources are then shuffled together.

    Orders come from PCG64's raw output, so they are the same on every machine, for any number of processes and workers.
    Picklable; rows are kept as byte offsets.
    """

    def __init__(self, sources: Sequence[DataSource], seed: int, context: BuildContext | None = None) -> None:
        """Open every source. Raises ``DataError`` for files that cannot be read, ``ConfigError`` for bad weights."""
        problems = [
            (f"data.{i}.weight", f"is {source.weight}; expected a finite number above 0")
            for i, source in enumerate(sources)
            if not (math.isfinite(source.weight) and source.weight > 0)
        ]
        if not sources:
            problems.append(("data", "no source; expected at least one"))
        if problems:
            raise ConfigError(problems)
        context = context or BuildContext()
        self.seed, self.sources = seed, list(sources)
        self.tables = [open_reader(source.reader, context) for source in sources]
        # Through the decimal text: 0.1 means a tenth, and ten epochs of it make exactly one pass.
        self.shares = [Fraction(repr(s.weight)) * len(t) for s, t in zip(sources, self.tables, strict=True)]
        self.starts = [sum(map(len, self.tables[:i])) for i in range(len(self.tables))]

    def epoch_size(self, epoch: int) -> int:
        """Number of samples in an epoch; where a weight leaves a fraction it differs by one per source."""
        return sum(last - first for first, last in (_window(share, epoch) for share in self.shares))

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices: each row may fail on its own
        """The sample at ``index``. Raises ``DataError`` when its row is bad, ``IndexError`` beyond the end."""
        source = self.source_of(index)
        return self.tables[source][index - self.starts[source]]

    def source_of(self, index: int) -> int:
        """Which source (its position in ``data:``) a sample belongs to."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return max(i for i, start in enumerate(self.starts) if start <= index)

    def where(self, index: int) -> str:
        """``file:line`` of a sample; for a reader of something else than files, source and row."""
        source = self.source_of(index)
        table, row = self.tables[source], index - self.starts[source]
        return table.where(row) if isinstance(table, Table) else f"data.{source}, row {row}"

    def order(self, epoch: int) -> list[int]:
        """The ``epoch_size(epoch)`` indices of an epoch (counted from 0) in training order."""
        parts = []
        for source, (table, share) in enumerate(zip(self.tables, self.shares, strict=True)):
            size = len(table)
            first, last = _window(share, epoch)
            for number in range(first // size, -(-last // size)):
                rows = self._permutation(size, _PASS, source, number)
                parts.append(rows[max(first - number * size, 0) : last - number * size] + self.starts[source])
        indices = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        ordered: list[int] = indices[self._permutation(len(indices), _EPOCH, epoch)].tolist()
        return ordered

    def replacements(self, index: int) -> Iterator[int]:
        """What may stand in for the bad sample at ``index``: rows of its source, drawn from seed and index; endless."""
        source = self.source_of(index)
        size = len(self.tables[source])
        bits = np.random.PCG64(self._seed(_REPLACEMENT, index))
        while True:
            yield self.starts[source] + int(bits.random_raw() % size)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of seed, weights, and the files' names and content: a resumed run compares them."""
        parts = [str(self.seed)]
        for table, share in zip(self.tables, self.shares, strict=True):
            files = [(rows.path.name, rows.digest) for rows in table.files] if isinstance(table, Table) else []
            parts.append(f"{len(table)} {share} {files}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _permutation(self, size: int, *use: int) -> NDArray[np.int64]:
        # Not Generator.permutation: numpy promises the same raw stream in every version, but not the same shuffle.
        raw = np.random.PCG64(self._seed(*use)).random_raw(size)
        return np.argsort(raw, kind="stable").astype(np.int64)

    def _seed(self, *use: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self.seed % 2**64, spawn_key=use)


def _window(share: Fraction, epoch: int) -> tuple[int, int]:
    return math.floor(epoch * share), math.floor((epoch + 1) * share)


def open_reader(reader: ReaderConfig, context: BuildContext) -> Sequence[Sample]:
    """A reader's samples by index. Readers of files keep offsets; another package's reader is read into memory."""
    samples = reader.open(context) if isinstance(reader, FileReaderConfig) else list(reader.read(context))
    if not samples:
        raise DataError(f"the {reader.kind} reader found no samples")
    return samples
