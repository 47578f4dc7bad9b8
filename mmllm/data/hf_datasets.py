"""The ``hf_datasets`` reader: tables of Hugging Face ``datasets``, with random access or as a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from mmllm.config.base import BuildContext
from mmllm.data.attached import AttachedReaderConfig, Layout, guessed
from mmllm.data.table_rows import to_sample
from mmllm.data.tables import SampleTable, expand
from mmllm.errors import DataError, brief
from mmllm.processing.messages import Sample

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
"""Which of ``datasets``' readers opens which files. Others run code, unpickle, or hand out files from all over the disk."""

_EDGE = 1 << 16


class HFDatasetsConfig(AttachedReaderConfig):
    """Hugging Face `datasets`: a folder of `save_to_disk`, parquet, arrow, JSON or CSV files, or a data set of the hub.

    ``path``: the folder, or files by name or pattern; or ``hub``: the id of a data set, with ``name`` (its configuration) and
    ``revision`` (give a commit: a branch moves). ``split`` as they call it. ``root``: the folder that paths in columns of media
    start from and may not leave (of local files: their own folder). ``caption``: with ``layout: captions`` the column of the
    text. The columns are described in ``table_rows.to_sample``.

    With ``streaming`` nothing is copied or downloaded beforehand, and rows come in the order of ``mmllm.data.streams``. ``rows`` is
    how many an epoch takes, ``buffer`` how many are shuffled at a time, ``lanes`` to how many lanes the files are dealt out.
    """

    kind: Literal["hf_datasets"] = "hf_datasets"
    path: str | Annotated[list[str], Field(min_length=1)] | None = None
    hub: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")] | None = None
    name: str | None = None
    revision: str | None = None
    split: Annotated[str, Field(min_length=1)] = "train"
    root: str | None = None
    caption: Annotated[str, Field(min_length=1)] = "text"
    streaming: bool = False
    rows: PositiveInt | None = None
    buffer: PositiveInt | None = None
    lanes: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either `path` (local files) or `hub` (the id of a data set of the hub)")
        if self.hub is None and (self.name or self.revision):
            raise ValueError("`name` and `revision` are of a data set of the hub; leave them out, or give `hub`")
        only = [key for key in ("rows", "buffer", "lanes") if dict(self)[key] is not None]
        if only and not self.streaming:
            raise ValueError(f"`{only[0]}` is of a stream; leave it out, or give `streaming: true`")
        if self.streaming and self.rows is None:
            raise ValueError("nobody knows how long a stream is: give `rows`, how many of them make an epoch")
        if self.streaming and self.limit is not None:
            raise ValueError("`limit` is of tables with random access; of a stream give `rows`")
        if self.streaming and (self.rows or 0) % (self.lanes or 1):
            raise ValueError(f"`rows` ({self.rows}) has to be a multiple of `lanes` ({self.lanes})")
        return self

    @classmethod
    def of(cls, path: str, root: str | None = None) -> Self:
        """The reader of a folder or files, with the layout of their first rows. Raises ``ConfigError`` and ``DataError``."""
        reader = cls.checked({"path": path, "root": root})
        table = reader.table(BuildContext())
        assert isinstance(table, HFTable)
        return reader.model_copy(update={"layout": _layout(table.table[:1].to_pylist())})

    def table(self, context: BuildContext) -> SampleTable:
        """As ``open``: where ``datasets`` can open files it has read through them."""
        return self.open(context)

    def open(self, context: BuildContext) -> SampleTable:
        """The samples by row; of a stream, ``mmllm.data.streams.StreamTable``. Raises ``DataError`` when nothing can be read."""
        root = None if self.root is None else context.root / Path(self.root).expanduser()
        paths = expand([self.path] if isinstance(self.path, str) else self.path or [], context.root)
        if self.hub is not None and not context.weights:
            raise DataError(f"{self.hub}: is on the hub, which is not asked here")
        own = paths[0] if paths and paths[0].is_dir() else paths[0].parent if paths else None
        folder = own if root is None else root
        folder = None if folder is None else folder.absolute()
        if self.streaming:
            from mmllm.data.hf_stream import open_stream

            return open_stream(self, paths, folder)
        table, contents = _open(self, paths)
        if not len(table):
            raise DataError(f"{self.source}: holds no rows")
        return HFTable(self, table, contents, folder)

    @property
    def source(self) -> str:
        """What messages call it."""
        return self.hub or (self.path if isinstance(self.path, str) else ", ".join(self.path or []))

    def tiny(self) -> Self:
        """The first eight rows."""
        few = {"rows": self.lanes or 1} if self.streaming else {"limit": min(self.limit or 8, 8)}
        return self.model_copy(update=few)


class HFTable(SampleTable):
    """The rows of a ``datasets.Dataset``: memory-mapped Arrow, read without decoding any medium."""

    def __init__(
        self, reader: HFDatasetsConfig, table: Dataset, contents: list[tuple[str, str]], root: Path | None
    ) -> None:
        self.reader, self.table, self.files, self.root = reader, table, contents, root

    def __len__(self) -> int:
        return min(len(self.table), self.reader.limit or len(self.table))

    def sample(self, row: int) -> Sample:
        """The sample of a row. Raises ``DataError`` naming source and row."""
        where = self.where(row)
        try:
            (values,) = self.table[row : row + 1].to_pylist()
        except (ValueError, OSError) as error:  # Arrow's own derive from these
            raise DataError(f"{where}: cannot be read ({brief(error, 120)})") from error
        return to_sample(values, where, self.reader, self.root, f"{Path(self.reader.source).name}:{row + 1}")

    def where(self, index: int) -> str:
        """``source:row`` of a sample, counted from 1."""
        return f"{self.reader.source}:{index + 1}"

    def contents(self) -> list[tuple[str, str]]:
        """Every file's name, and what tells it from another: see ``outline``."""
        return self.files


def _layout(rows: list[dict[str, Any]]) -> Layout:
    turns = ("messages", "prompt", "completion")
    return "messages" if any(key in row for row in rows for key in turns) else guessed(rows)


def outline(path: Path) -> str:
    """A digest of a large file: its size, and its first and last 64 KiB, where Arrow's and parquet's tables of content are."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            digest = hashlib.sha256(str(size).encode())
            file.seek(0)
            digest.update(file.read(_EDGE))
            file.seek(max(size - _EDGE, 0))
            digest.update(file.read())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def need_datasets() -> None:
    """Raise ``DataError`` unless ``datasets`` is installed."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise DataError("reader hf_datasets needs the package datasets: pip install 'mmllm[datasets]'") from error


def builder_of(paths: list[Path], source: str) -> str:
    """Which reader of ``datasets`` opens these files."""
    ends = sorted({path.suffix.lower() for path in paths})
    if len(ends) != 1 or ends[0] not in BUILDERS:
        raise DataError(
            f"{source}: expected a folder of save_to_disk, or files that all end in one of {', '.join(BUILDERS)}; "
            f"found {', '.join(end or 'no ending' for end in ends)}"
        )
    return BUILDERS[ends[0]]


def hub_files(reader: HFDatasetsConfig) -> list[str]:
    """The files of a split of a data set of the hub, each with the commit it is from. Raises ``DataError`` unless they are of a
    kind that is read here.
    """
    from datasets import load_dataset_builder

    builder = load_dataset_builder(str(reader.hub), reader.name, revision=reader.revision)
    known = {f"datasets.packaged_modules.{name}.{name}" for name in BUILDERS.values()}
    if type(builder).__module__ not in known:
        raise DataError(
            f"{reader.hub}: its files are read by {type(builder).__name__}; read here are {', '.join(BUILDERS)}"
        )
    files: Mapping[str, Any] = builder.config.data_files or {}
    if reader.split not in files:
        raise DataError(f"{reader.hub}: no split {reader.split!r}; it has {', '.join(map(str, files)) or 'none'}")
    return [str(file) for file in files[reader.split]]


def _open(reader: HFDatasetsConfig, paths: list[Path]) -> tuple[Dataset, list[tuple[str, str]]]:
    need_datasets()
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    try:
        if reader.hub is not None:
            files = [(name, name) for name in hub_files(reader)]
            table = load_dataset(reader.hub, reader.name, split=reader.split, revision=reader.revision)
        elif len(paths) == 1 and paths[0].is_dir():
            table = load_from_disk(str(paths[0]))
            if isinstance(table, DatasetDict):
                if reader.split not in table:
                    raise DataError(f"{paths[0]}: no split {reader.split!r}; it has {', '.join(map(str, table))}")
                table = table[reader.split]
            used = [Path(file["filename"]) for file in table.cache_files]
            files = [(path.name, outline(path)) for path in used]
        else:
            given = {reader.split: [str(path) for path in paths]}
            table = load_dataset(builder_of(paths, reader.source), data_files=given, split=reader.split)
            files = [(path.name, outline(path)) for path in paths]
    except (DataError, ImportError):
        raise
    except Exception as error:  # a library with dozens of its own, and those of every file format
        raise DataError(f"{reader.source}: cannot be opened ({type(error).__name__}: {brief(error)})") from error
    assert isinstance(table, Dataset)
    return table.with_format("arrow"), files
