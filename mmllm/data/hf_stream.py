"""Streams of Hugging Face ``datasets``: the files of a split, each read forwards without being copied or decoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmllm.data.hf_datasets import HFDatasetsConfig, builder_of, hub_files, need_datasets, outline
from mmllm.data.streams import BUFFER, Batch, StreamTable
from mmllm.data.table_rows import to_sample
from mmllm.errors import DataError, brief
from mmllm.processing.messages import Sample

READ = 64
"""Rows read at a time; rows with pictures are large."""


class HFStream(StreamTable):
    """The files of a split. ``builder`` names what reads local ones; files of the hub are known by their place in the split."""

    def __init__(
        self, reader: HFDatasetsConfig, files: list[tuple[str, str]], builder: str | None, root: Path | None
    ) -> None:
        super().__init__(files, rows=reader.rows or 0, buffer=reader.buffer or BUFFER, lanes=reader.lanes or 1)
        self.reader, self.builder, self.root = reader, builder, root

    @property
    def remote(self) -> bool:
        return self.builder is None

    def batches(self, file: int) -> Iterator[Batch]:
        from datasets import load_dataset

        reader, name = self.reader, self.files[file][0]
        builder = self.builder or builder_of([Path(name)], name)
        source: Any = load_dataset(builder, data_files={reader.split: [name]}, split=reader.split, streaming=True)
        yield from source.with_format("arrow").iter(batch_size=READ)

    def convert(self, row: dict[str, Any], where: str, id: str) -> Sample:
        return to_sample(row, where, self.reader, self.root, id)


def open_stream(reader: HFDatasetsConfig, paths: list[Path], root: Path | None) -> HFStream:
    """The stream of a reader's files: local ``paths``, or those of its data set of the hub. Raises ``DataError``."""
    need_datasets()
    if reader.hub is not None:
        try:
            files = hub_files(reader)
        except (DataError, ImportError):
            raise
        except Exception as error:  # a library with dozens of its own
            raise DataError(f"{reader.hub}: cannot be opened ({type(error).__name__}: {brief(error)})") from error
        return HFStream(reader, [(name, name) for name in files], None, root)
    if any(path.is_dir() for path in paths):
        raise DataError(f"{reader.source}: a folder of save_to_disk has random access; leave `streaming` out")
    return HFStream(reader, [(str(path), outline(path)) for path in paths], builder_of(paths, reader.source), root)
