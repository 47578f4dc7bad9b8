"""Thumbs up and down, kept in a file on the user's own computer."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from mmllm.errors import MmllmError

Rating = Literal["up", "down", "withdrawn"]
"""``withdrawn``: the thumb given before was taken back."""
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def default_path() -> Path:
    """``feedback.jsonl`` in the user's data folder: ``$XDG_DATA_HOME/mmllm``, else ``~/.local/share/mmllm``."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "mmllm" / "feedback.jsonl"


@dataclass(frozen=True)
class Feedback:
    """A judgement of one answer. Holds the words of the exchange only: no media, no file names, no address of the user.

    ``message`` is the answer's index in the conversation; ``time`` is UTC, ISO 8601.
    """

    conversation: str
    message: int
    rating: Rating
    question: str
    answer: str
    comment: str = ""
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


class FeedbackLog:
    """Appends judgements to a JSON-lines file, one object a line; the folder is made on the first one.

    People open such files in spreadsheets, so text that a spreadsheet would run as a formula gets a leading apostrophe,
    and every line break and non-ASCII character is escaped: one judgement is one line whatever was typed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self) -> None:
        """Raises ``MmllmError`` when the file cannot be written; makes nothing."""
        place = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        usable = place.is_file() if place == self.path else place.is_dir()
        if not usable or not os.access(place, os.W_OK):
            raise MmllmError(f"{self.path}: feedback cannot be written there; choose another file with --feedback")

    def add(self, feedback: Feedback) -> None:
        """Raises ``OSError`` when the file cannot be written."""
        record = {key: _inert(value) if isinstance(value, str) else value for key, value in asdict(feedback).items()}
        line = json.dumps(record, ensure_ascii=True) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write to a descriptor in append mode: lines of several processes do not mix. Readable by the owner only.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode("ascii"))
        finally:
            os.close(descriptor)


def _inert(text: str) -> str:
    return "'" + text if text.lstrip(" ").startswith(_FORMULA_STARTS) else text
