"""The samples of a training stage: a weighted mixture in an order that depends on seed and epoch alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import count

import numpy as np
from numpy.typing import NDArray

from mmllm.config.base import BuildContext
from mmllm.config.families import ReaderConfig
from mmllm.config.run import DataSource
from mmllm.data.orders import bits, permutation
from mmllm.data.streams import StreamTable
from mmllm.data.tables import SampleTable, TableReaderConfig
from mmllm.errors import ConfigError, DataError
from mmllm.processing.messages import Sample

_PASS, _EPOCH, _REPLACEMENT = 0, 1, 2  # keep the three uses of one seed apart; mmllm.data.streams has 3 and 4
_ROUND = 40  # an index's bits from here on count how often a stream's rows of an epoch have been gone through before

DRAWS = 100
"""Replacements drawn for each try; of a stream each try may look a block further than the last."""

Lengths = Callable[[Sequence[Sample]], Fraction]
"""The mean number of tokens of a source's samples."""


class StageData(Sequence[Sample]):
    """All samples of a stage by index, ``0 .. len - 1``: source after source, in file order.

    **Weights.** A source of n rows with weight w gives ``w * n`` samples an epoch. Think of an endless sequence of
    passes over the source, each pass every row once in a new random order; every epoch takes the next ``w * n`` of it
    (epoch e ends at number ``floor((e + 1) * w * n)``). So weight 1 is every row once an epoch, 2 is every row twice,
    and 0.25 walks through the whole source in four epochs. The samples of all sources are then shuffled together.
    With ``lengths`` weights are shares of the tokens instead: a source's samples an epoch are as many as make up its share
    w / (sum of all w) of the tokens that all rows of all sources have together.

    **Streams** (``StreamTable``) go on where the last epoch ended, and keep their own order between the samples of other sources.

    Orders come from PCG64's raw output, so they are the same on every machine, for any number of processes and workers.
    Picklable; rows are kept as byte offsets.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        seed: int,
        context: BuildContext | None = None,
        lengths: Lengths | None = None,
    ) -> None:
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
        for number, table in enumerate(self.tables):
            if isinstance(table, StreamTable):
                table.seeded(seed, number)
        # Through the decimal text: 0.1 means a tenth, and ten epochs of it make exactly one pass.
        self.weights = [source.weight for source in sources]
        weights = [Fraction(repr(source.weight)) for source in sources]
        rows = [len(table) for table in self.tables]
        self.means = None if lengths is None else [lengths(table) for table in self.tables]
        if self.means is None:
            self.shares = [weight * size for weight, size in zip(weights, rows, strict=True)]
        else:
            tokens = sum((mean * size for mean, size in zip(self.means, rows, strict=True)), Fraction(0))
            self.shares = [w / sum(weights) * tokens / mean for w, mean in zip(weights, self.means, strict=True)]
        self.starts = [sum(map(len, self.tables[:i])) for i in range(len(self.tables))]

    def epoch_size(self, epoch: int) -> int:
        """Number of samples in an epoch; where a weight leaves a fraction it differs by one per source."""
        return sum(last - first for first, last in (_window(share, epoch) for share in self.shares))

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices: each row may fail on its own
        """The sample at ``index``. Raises ``DataError`` when its row is bad, ``IndexError`` beyond the end."""
        table, row = self._find(index)
        return table.at(row) if isinstance(table, StreamTable) else table[row]

    def source_of(self, index: int) -> int:
        """Which source (its position in ``data:``) a sample belongs to."""
        row = index & (1 << _ROUND) - 1
        if not 0 <= row < len(self) or index < 0:
            raise IndexError(f"sample {index} of {len(self)}")
        return max(i for i, start in enumerate(self.starts) if start <= row)

    def where(self, index: int) -> str:
        """``file:line`` of a sample; for a reader of something else than files, source and row."""
        table, row = self._find(index)
        return table.where(row) if isinstance(table, SampleTable) else f"data.{self.source_of(index)}, row {row}"

    def order(self, epoch: int) -> list[int]:
        """The ``epoch_size(epoch)`` indices of an epoch (counted from 0) in training order."""
        parts = []
        for source, (table, share) in enumerate(zip(self.tables, self.shares, strict=True)):
            size = len(table)
            first, last = _window(share, epoch)
            if isinstance(table, StreamTable):
                parts.append(self._stream_indices(source, np.arange(first, last)))
                continue
            for number in range(first // size, -(-last // size)):
                rows = self._permutation(size, _PASS, source, number)
                parts.append(rows[max(first - number * size, 0) : last - number * size] + self.starts[source])
        indices = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        mixed = indices[self._permutation(len(indices), _EPOCH, epoch)]
        for source, table in enumerate(self.tables):
            if isinstance(table, StreamTable):
                first = self.starts[source]
                own = mixed & (1 << _ROUND) - 1
                places = (own >= first) & (own < first + len(table))
                mixed[places] = np.sort(mixed[places])
        ordered: list[int] = mixed.tolist()
        return ordered

    def replacements(self, index: int) -> Iterator[int]:
        """What may stand in for the bad sample at ``index``: rows of its source (of a stream, of what is read there), drawn from
        seed and index; endless.
        """
        source = self.source_of(index)
        table, row = self._find(index)
        drawn = bits(self.seed, _REPLACEMENT, index)
        for times in count(1):
            stream = isinstance(table, StreamTable)
            rows = table.neighbours(row, times) if isinstance(table, StreamTable) else range(len(table))
            for _ in range(DRAWS):
                other = rows[int(drawn.random_raw() % len(rows))]
                yield int(self._stream_indices(source, np.array([other]))[0]) if stream else self.starts[source] + other

    def amounts(self) -> list[str]:
        """What each source gives, in words: its weight, and where weights are of tokens, what that comes to."""
        told = [f"weight {weight:g}" for weight in self.weights]
        if self.means is None:
            return told
        return [
            f"{weight}, {float(mean):.1f} tokens each, {float(share):,.0f} samples an epoch"
            for weight, mean, share in zip(told, self.means, self.shares, strict=True)
        ]

    def fingerprint(self) -> str:
        """16 hexadecimal digits of seed, weights, and the files' names and content: a resumed run compares them."""
        parts = [str(self.seed)]
        for table, share in zip(self.tables, self.shares, strict=True):
            files = table.contents() if isinstance(table, SampleTable) else []
            parts.append(f"{len(table)} {share} {files}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _find(self, index: int) -> tuple[Sequence[Sample], int]:
        """The table of a sample, and its row there; in a stream, its position."""
        source = self.source_of(index)
        rounds, row = index >> _ROUND, (index & (1 << _ROUND) - 1) - self.starts[source]
        return self.tables[source], row + rounds * len(self.tables[source])

    def _stream_indices(self, source: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        size = len(self.tables[source])
        return (positions // size << _ROUND) + positions % size + self.starts[source]

    def _permutation(self, size: int, *use: int) -> NDArray[np.int64]:
        return permutation(self.seed, size, *use)


def _window(share: Fraction, epoch: int) -> tuple[int, int]:
    return math.floor(epoch * share), math.floor((epoch + 1) * share)


def open_reader(reader: ReaderConfig, context: BuildContext) -> Sequence[Sample]:
    """A reader's samples by index. Readers of files keep offsets; another package's reader is read into memory."""
    samples = reader.open(context) if isinstance(reader, TableReaderConfig) else list(reader.read(context))
    if not samples:
        raise DataError(f"the {reader.kind} reader found no samples")
    return samples
