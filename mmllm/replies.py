"""What a model answers: text, and media that may still be in the making. Imports no torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmllm.errors import MmllmError

if TYPE_CHECKING:
    from mmllm.generators.base import Artifact


class Media:
    """One picture, sound or clip of a reply, perhaps still in the making.

    ``type`` is the modality, ``suffix`` the usual ending of its files, ``progress`` (steps done, steps in all; 0 of 0
    before the first). One that was not generated but found has the file's ``path`` and its ``similarity``.
    """

    def __init__(self, type: str, suffix: str, path: Path | None = None, similarity: float | None = None) -> None:
        self.type, self.suffix, self.path, self.similarity = type, suffix, path, similarity
        self.progress = (0, 0)
        self._future: Future[Artifact | None] = Future()

    @property
    def source(self) -> Literal["generated", "retrieved"]:
        return "generated" if self.path is None else "retrieved"

    def wait(self, timeout: float | None = None) -> bool:
        """Wait at most ``timeout`` seconds; whether it is done."""
        wait([self._future], timeout)
        return self._future.done()

    @property
    def stopped(self) -> bool:
        """Whether it is done without a result, because it was stopped."""
        return self._future.done() and self._future.exception() is None and self._future.result() is None

    @property
    def failed(self) -> bool:
        """Whether it is done without a result, because the generator raised an error; ``result`` raises it."""
        return self._future.done() and self._future.exception() is not None

    def result(self, timeout: float | None = None) -> Artifact:
        """Wait for the medium: a ``PIL.Image``, a ``Sound`` or a ``Clip``.

        Raises ``MmllmError`` when it was stopped, ``TimeoutError`` after ``timeout`` seconds, and what the generator raised.
        """
        made = self._future.result(timeout)
        if made is None:
            raise MmllmError(f"the {self.type} was stopped before it was finished")
        return made

    def save(self, path: str | Path) -> None:
        """Wait for the medium and write it; the ending of ``path`` chooses the format. A found file is copied as it is."""
        made = self.result()
        if self.path is not None and self.path.suffix == Path(path).suffix:
            shutil.copyfile(self.path, path)
        else:
            made.save(path)


@dataclass(frozen=True)
class Truncated:
    """The signal tokens of a ``modality`` were cut off by the end of the reply; nothing is made of them."""

    modality: str


class Reply(str):
    """A reply: its text, the ``media`` it made, and ``truncated``, the modalities whose signal tokens were cut off."""

    media: list[Media]
    truncated: list[str]

    @classmethod
    def of(cls, text: str, media: Sequence[Media] = (), truncated: Sequence[str] = ()) -> Reply:
        reply = cls(text)
        reply.media, reply.truncated = list(media), list(truncated)
        return reply
