"""Which reader a file on the command line wants."""

from __future__ import annotations

from pathlib import Path

from mmllm.config.base import component_class, kinds, suggest
from mmllm.data import layouts
from mmllm.data.attached import AttachedReaderConfig
from mmllm.data.rows import Rows, index_file
from mmllm.data.tables import TableReaderConfig
from mmllm.errors import ConfigError, DataError

LOOKED_AT = 100
"""Rows that are looked at to tell a layout."""


def formats() -> dict[str, type[TableReaderConfig]]:
    """The readers of files by kind, shipped and third-party."""
    classes = {kind: component_class("reader", kind) for kind in kinds("reader")}
    return {kind: cls for kind, cls in classes.items() if issubclass(cls, TableReaderConfig)}


def attached_kind(path: str) -> str | None:
    """The kind of a file whose rows have their media with them; None for files of rows."""
    if path.endswith(".tar"):
        return "webdataset"
    table = Path(path).suffix in (".parquet", ".arrow") or any(
        (Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")
    )
    return "hf_datasets" if table else None


def guess(rows: Rows) -> str | None:
    """The kind of the first row that looks like one."""
    for index in range(min(len(rows), LOOKED_AT)):
        try:
            kind = layouts.guess(rows[index])
        except DataError:
            continue
        if kind is not None:
            return kind
    return None


def reader_of(path: str, format: str | None = None, root: str | None = None) -> TableReaderConfig:
    """The reader of a file or pattern: of the kind ``format``, else of the kind that its name or its first rows tell.

    Raises ``ConfigError`` for a kind that there is not, ``DataError`` for a file without a known layout.
    """
    known = formats()
    kind = format or attached_kind(path)
    if kind is None:
        kind = guess(index_file(Path(path)))
    if kind is None:
        raise DataError(f"{path}: no row has a known layout; the formats are {', '.join(known)}")
    if kind not in known:
        text = f"format {kind!r} is unknown; the formats are {', '.join(known)}{suggest(kind, known)}"
        raise ConfigError([("", text)], "--format")
    cls = known[kind]
    if issubclass(cls, AttachedReaderConfig):
        return cls.of(path, root)
    return cls.checked({"path": path} if root is None else {"path": path, "root": root})
