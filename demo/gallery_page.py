"""A page in the making: Markdown, and the files it shows beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

One = TypeVar("One")


class Made(Protocol):
    """A picture, a sound or a clip."""

    def save(self, path: Path, /) -> None: ...


@dataclass(frozen=True)
class Choice:
    """How much is shown: of ``count`` requests the first ``shown``, compared with ``searched`` training samples; sounds are
    heard by the ``judge`` in this file, if any.
    """

    count: int
    shown: int
    searched: int
    seed: int
    training_seed: int
    judge: Path | None = None


class Page:
    """The page in the making: blocks of Markdown, and the files they show. Nothing is written before ``save``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.with_suffix("")
        self.blocks: list[str] = []
        self.files: dict[str, Made] = {}

    def add(self, *blocks: str) -> None:
        self.blocks += blocks

    def table(self, head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
        lines = [list(head), *map(list, rows)]
        lines.insert(1, ["---"] * len(lines[0]))
        self.add("\n".join("| " + " | ".join(line) + " |" for line in lines))

    def file(self, name: str, made: Made) -> str:
        """The address on the page of a file that ``save`` will write; what is there already is not written twice."""
        for known, other in self.files.items():
            if other is made:
                return f"{self.folder.name}/{known}"
        if name in self.files:
            raise ValueError(f"{name} is another file of the page")
        self.files[name] = made
        return f"{self.folder.name}/{name}"

    def picture(self, name: str, made: Made, shows: str, width: int = 96) -> str:
        """A picture or an animated clip; ``shows`` says in words what is to be seen."""
        return f'<img src="{self.file(name, made)}" width="{width}" alt="{escape(shows)}">'

    def failures(
        self,
        made: Sequence[One],
        wrong: Callable[[One], str],
        most: int,
        names: tuple[str, str],
        head: Iterable[str],
        row: Callable[[int, One], Iterable[str]],
    ) -> None:
        """The first ``most`` of what is ``wrong``, a row each; ``names`` are those of the examiner and of what was made."""
        examiner, things = names
        missed = [one for one in made if wrong(one)]
        self.add("### Failures")
        if not missed:
            self.add(f"{examiner} found none in {len(made)} {things}.")
            return
        self.add(f"{len(missed)} of {len(made)} {things}; here are the first {min(most, len(missed))}.")
        self.table(head, [row(number, one) for number, one in enumerate(missed[:most], start=1)])

    def save(self) -> None:
        """Write the page and its files; those of an earlier page of this name that it no longer shows are removed."""
        old = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        for name in re.findall(rf"(?<=[\"(]{re.escape(self.folder.name)}/)[\w-]+\.\w+(?=[\")])", old):
            (self.folder / name).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, made in self.files.items():
            made.save(self.folder / name)
        self.path.write_text("\n\n".join(self.blocks) + "\n", encoding="utf-8")


def verdict(wrong: str) -> str:
    return f"**wrong: {wrong}**" if wrong else "as asked"


def escape(text: str) -> str:
    """``text`` of an assistant as it is to be read, in Markdown, in the cell of a table and in an attribute."""
    plain = (
        " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    )
    return re.sub(r"([\\`*_\[\]|~])", lambda found: f"&#{ord(found[0])};", plain)
