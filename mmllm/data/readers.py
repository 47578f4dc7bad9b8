"""The data formats: one reader configuration per layout. All turn a row of a file into a ``Sample``."""

from __future__ import annotations

import glob
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, overload

from pydantic import Field, PositiveInt

from mmllm.config.base import BuildContext
from mmllm.config.families import ReaderConfig
from mmllm.data import layouts
from mmllm.data.rows import Rows, index_file
from mmllm.errors import DataError
from mmllm.processing.messages import Sample


class FileReaderConfig(ReaderConfig):
    """What all readers of files share.

    ``path``: a file or pattern (``data/*.jsonl``), or several; relative to the config's folder. Files matched by a
    pattern are taken in sorted order. ``root``: the folder that media paths start from and may not leave (default: the
    data file's own folder). ``limit``: only the first so many rows.
    """

    path: str | Annotated[list[str], Field(min_length=1)]
    root: str | None = None
    limit: PositiveInt | None = None

    @abstractmethod
    def convert(self, row: dict[str, Any], where: str) -> layouts.Converted:
        """Id (``None`` if the row has none), messages and tags of a row. Raises ``DataError`` naming ``where``."""

    def open(self, context: BuildContext) -> Table:
        """The samples by index. Raises ``DataError`` when a file is missing, unreadable, empty, or a damaged array."""
        files = []
        for path in _expand([self.path] if isinstance(self.path, str) else self.path, context.root):
            rows = index_file(path)
            if rows.problem is not None:
                raise DataError(rows.problem)
            if not rows:
                raise DataError(f"{path}: holds no rows")
            files.append(rows)
        root = None if self.root is None else context.root / Path(self.root).expanduser()
        return Table(self, tuple(files), root)

    def read(self, context: BuildContext) -> Iterator[Sample]:
        """The samples in file order. Raises ``DataError`` at the first bad row."""
        return iter(self.open(context))

    def tiny(self) -> Self:
        """The first eight rows."""
        return self.model_copy(update={"limit": min(self.limit or 8, 8)})


@dataclass(frozen=True)
class Table(Sequence[Sample]):
    """The samples of a reader's files, parsed when asked for. Picklable: offsets, no open file and no parsed row."""

    reader: FileReaderConfig
    files: tuple[Rows, ...]
    root: Path | None = None

    def __len__(self) -> int:
        total = sum(len(rows) for rows in self.files)
        return total if self.reader.limit is None else min(total, self.reader.limit)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """The sample of a row. Raises ``DataError`` naming file and line."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        rows, row = self._find(index)
        where = rows.where(row)
        id, messages, tags = self.reader.convert(rows[row], where)
        folder = self.root or rows.path.parent
        return Sample(f"{rows.path.name}:{rows.lines[row]}" if id is None else id, messages, folder, tags)

    def where(self, index: int) -> str:
        """``file:line`` of a sample."""
        rows, row = self._find(index)
        return rows.where(row)

    def _find(self, index: int) -> tuple[Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        for rows in self.files:
            if index < len(rows):
                return rows, index
            index -= len(rows)
        raise AssertionError("unreachable: the index was checked")


class MessagesConfig(FileReaderConfig):
    """Rows ``{"id": …, "messages": [{"role": …, "content": "text" | [parts]}, …]}``; other keys become tags.

    A part is ``{"type": "text", "text": …}`` or ``{"type": <modality>, "path": …}``. Text is text: ``<image>`` in it
    means nothing here.
    """

    kind: Literal["messages"] = "messages"

    def convert(self, row: dict[str, Any], where: str) -> layouts.Converted:
        return layouts.messages(row, where)


class LlavaConfig(FileReaderConfig):
    """LLaVA's rows: conversations, questions (without reply, for evaluation), captions (asked for with ``prompt``)."""

    kind: Literal["llava"] = "llava"
    prompt: str = "Describe the image."

    def convert(self, row: dict[str, Any], where: str) -> layouts.Converted:
        return layouts.llava(row, where, self.prompt)


class ShareGPTConfig(FileReaderConfig):
    """LLaMA-Factory's multimodal rows, in its messages and its sharegpt style."""

    kind: Literal["sharegpt"] = "sharegpt"

    def convert(self, row: dict[str, Any], where: str) -> layouts.Converted:
        return layouts.sharegpt(row, where)


class NextGPTConfig(FileReaderConfig):
    """NExT-GPT's pairs of a medium and a text, and its dialogues with media on both sides (MosIT).

    ``folders``: where each modality's files lie, relative to ``root``. ``suffix``: the extension that the files have
    instead of the one in the rows (``.flac`` when WAV files were converted). ``prompt``: the question of rows that only
    have a caption.
    """

    kind: Literal["nextgpt"] = "nextgpt"
    prompt: str = "Describe this."
    folders: dict[Literal["image", "audio", "video"], str] = {}
    suffix: Annotated[str, Field(pattern=r"^\.\w+$")] | None = None

    def convert(self, row: dict[str, Any], where: str) -> layouts.Converted:
        folders = {name: f"{name}s" for name in layouts.MODALITIES}
        folders.update(self.folders.items())
        return layouts.nextgpt(row, where, self.prompt, folders, self.suffix)


def _expand(patterns: Sequence[str], root: Path) -> list[Path]:
    paths: list[Path] = []
    for pattern in patterns:
        path = root / Path(pattern).expanduser()
        if path.exists() or not glob.has_magic(str(path)):
            if not path.exists():
                raise DataError(f"{path}: no such file; a path in a config starts from the config's folder")
            paths.append(path)
            continue
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise DataError(f"{path}: no file matches this pattern")
        paths += map(Path, found)
    return paths
