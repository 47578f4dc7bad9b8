"""What every kind of table of samples offers: random access by row, a place for messages, a record of its content."""

from __future__ import annotations

import glob
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Self, overload

from pydantic import ValidationError

from mmllm.config.base import BuildContext, problems_of
from mmllm.config.families import ReaderConfig
from mmllm.errors import ConfigError, DataError
from mmllm.processing.messages import Sample

MAX_FILES = 100_000
"""So many files one pattern may stand for; ``{0..999999999}`` is a slip."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class SampleTable(Sequence[Sample]):
    """The samples of a source by row, read when asked for. Picklable, and without an open file.

    ``table[row]`` raises ``DataError`` naming ``where(row)`` when that row cannot be used; other rows are not affected.
    """

    @abstractmethod
    def sample(self, row: int) -> Sample:
        """The sample of a row between 0 and ``len(self) - 1``."""

    @abstractmethod
    def where(self, index: int) -> str:
        """``file:line`` of a sample (of a shard or a table, ``file:number``, counted from 1)."""

    @abstractmethod
    def contents(self) -> list[tuple[str, str]]:
        """(name, digest) of every file: what a resumed run compares."""

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.sample(index)


class TableReaderConfig(ReaderConfig):
    """A reader with random access: every reader that ships with mmllm."""

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Self:
        """The reader of ``values``. Raises ``ConfigError`` for what they say wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(problems_of(error, cls), cls.__pydantic_fields__["kind"].default) from error

    @abstractmethod
    def open(self, context: BuildContext) -> SampleTable:
        """The samples by row. Raises ``DataError`` when there are none, or a file is missing or unreadable."""

    def read(self, context: BuildContext) -> Iterator[Sample]:
        """The samples in file order. Raises ``DataError`` at the first bad row."""
        return iter(self.open(context))


def expand(patterns: Sequence[str], root: Path) -> list[Path]:
    """The files that paths and patterns stand for: ``{000..012}`` and ``{a,b}`` in the order written, ``*``, ``?``, ``[…]``
    and ``**`` in sorted order. Relative ones start from ``root``.

    Raises ``DataError`` when one of them does not exist, or there are more than ``MAX_FILES``.
    """
    paths: list[Path] = []
    for pattern in patterns:
        path = root / Path(pattern).expanduser()
        if path.exists():  # braces and stars may stand in a name
            paths.append(path)
            continue
        for text in _braces(str(path)):
            if not glob.has_magic(text):
                if not Path(text).exists():
                    raise DataError(f"{text}: no such file; a path in a config starts from the config's folder")
                paths.append(Path(text))
                continue
            found = sorted(glob.glob(text, recursive=True))
            if not found:
                raise DataError(f"{text}: no file matches this pattern")
            paths += map(Path, found)
    return paths


def _braces(pattern: str) -> list[str]:
    """``a{0..1}`` as ``[a0, a1]``; bounds keep their leading zeros."""
    pieces = _BRACES.split(pattern)  # text, inside of braces, text, …
    choices: list[list[str]] = []
    count = 1
    for number, piece in enumerate(pieces):
        bounds = _RANGE.fullmatch(piece) if number % 2 else None
        if bounds is not None:
            first, last = int(bounds[1]), int(bounds[2])
            if not first <= last < first + MAX_FILES:
                raise DataError(f"{pattern}: {{{piece}}} has to count upwards, to at most {MAX_FILES:,} files")
            choices.append([f"{n:0{len(bounds[1])}d}" for n in range(first, last + 1)])
        else:
            choices.append(piece.split(",") if number % 2 else [piece])
        count *= len(choices[-1])
    if count > MAX_FILES:
        raise DataError(f"{pattern}: stands for {count:,} files, the limit is {MAX_FILES:,}")
    return ["".join(chosen) for chosen in product(*choices)]
