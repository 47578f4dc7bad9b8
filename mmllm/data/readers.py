"""The data formats: one reader configuration per layout. All turn a row of a file into a ``Sample``."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt

from mmllm.config.base import BuildContext
from mmllm.data import layouts
from mmllm.data.rows import Rows, index_file
from mmllm.data.tables import SampleTable, TableReaderConfig, expand
from mmllm.errors import DataError
from mmllm.processing.messages import Sample


class FileReaderConfig(TableReaderConfig):
    """What all readers of files share.

    ``path``: a file or pattern (``data/*.jsonl``, ``data-{00..15}.jsonl``), or several; relative to the config's folder. Files
    matched by ``*`` are taken in sorted order. ``root``: the folder that media paths start from and may not leave (default:
    the data file's own folder). ``limit``: only the first so many rows.
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
        for path in expand([self.path] if isinstance(self.path, str) else self.path, context.root):
            rows = index_file(path)
            if rows.problem is not None:
                raise DataError(rows.problem)
            if not rows:
                raise DataError(f"{path}: holds no rows")
            files.append(rows)
        root = None if self.root is None else context.root / Path(self.root).expanduser()
        return Table(self, tuple(files), root)

    def tiny(self) -> Self:
        """The first eight rows."""
        return self.model_copy(update={"limit": min(self.limit or 8, 8)})


@dataclass(frozen=True)
class Table(SampleTable):
    """The samples of a reader's files, parsed when asked for. Picklable: offsets, no open file and no parsed row."""

    reader: FileReaderConfig
    files: tuple[Rows, ...]
    root: Path | None = None

    def __len__(self) -> int:
        total = sum(len(rows) for rows in self.files)
        return total if self.reader.limit is None else min(total, self.reader.limit)

    def sample(self, row: int) -> Sample:
        """The sample of a row. Raises ``DataError`` naming file and line."""
        rows, line = self._find(row)
        where = rows.where(line)
        id, messages, tags = self.reader.convert(rows[line], where)
        folder = self.root or rows.path.parent
        return Sample(f"{rows.path.name}:{rows.lines[line]}" if id is None else id, messages, folder, tags)

    def where(self, index: int) -> str:
        """``file:line`` of a sample."""
        rows, row = self._find(index)
        return rows.where(row)

    def contents(self) -> list[tuple[str, str]]:
        """Every file's name and SHA-256."""
        return [(rows.path.name, rows.digest) for rows in self.files]

    def _find(self, index: int) -> tuple[Rows, int]:
        for rows in self.files:
            if index < len(rows):
                return rows, index
            index -= len(rows)
        raise IndexError(f"no row {index} in these files")


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
