"""The models a chat can choose from: where they are, and which one is in memory."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from mmllm.chat.session import Assistant
from mmllm.errors import CheckpointError, MmllmError

_log = logging.getLogger(__name__)

EMBEDDED = "embedded"
"""The name of the model that comes with mmllm."""
MODEL_FILES = ("config.yaml", "manifest.json")
"""What a folder must hold to be a model folder."""


def find_models(folder: Path, depth: int = 3) -> list[Path]:
    """Model folders in ``folder``, itself included, at most ``depth`` levels down, sorted.

    Folders that may not be read are passed over. Raises ``CheckpointError`` when there is no model folder.
    """
    found: list[Path] = []
    level = [folder.expanduser()]
    if not level[0].is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; give the folder of a trained model")
    for _ in range(depth + 1):
        found += [path for path in level if all(os.path.isfile(path / name) for name in MODEL_FILES)]
        level = [child for path in level for child in _subfolders(path)]
    if not found:
        raise CheckpointError(f"{folder}: no trained model here; a model's folder holds {' and '.join(MODEL_FILES)}")
    return sorted(found)


def _subfolders(folder: Path) -> list[Path]:
    # os.path's questions answer "no" where pathlib's raise: in a folder that may be listed but not entered.
    try:
        return [path for path in folder.iterdir() if os.path.isdir(path) and not path.name.startswith(".")]
    except PermissionError:
        return []


class ModelShelf:
    """Loads models by name (``embedded`` or a folder) and keeps the last one in memory; safe to share by threads."""

    def __init__(self, load: Callable[[str], Assistant]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._name: str | None = None
        self._assistant: Assistant | None = None
        self._problems: dict[str, Exception] = {}
        self._warming: dict[str, threading.Thread] = {}

    def ready(self, name: str) -> bool:
        """Whether ``get(name)`` would return at once."""
        return self._name == name

    def problem(self, name: str) -> Exception | None:
        """Why the last attempt to load ``name`` failed, or None."""
        return self._problems.get(name)

    def get(self, name: str) -> Assistant:
        """The assistant called ``name``; loads it if another or none is in memory. Raises what loading raises."""
        with self._lock:
            if self._assistant is None or self._name != name:
                self._name = self._assistant = None  # the old model's memory is free before the new one is read
                try:
                    self._assistant = self._load(name)
                except Exception as error:
                    self._problems[name] = error
                    raise
                self._problems.pop(name, None)
                self._name = name
            return self._assistant

    def warm(self, name: str) -> threading.Thread:
        """Load ``name`` in the background unless that is under way. A failure is kept for ``problem`` and logged."""
        thread = self._warming.get(name)
        if thread is None or not thread.is_alive():
            self._problems.pop(name, None)
            thread = threading.Thread(target=self._try, args=(name,), name=f"load {name}", daemon=True)
            self._warming[name] = thread
            thread.start()
        return thread

    def _try(self, name: str) -> None:
        try:
            self.get(name)
        except Exception as error:
            _log.error("cannot load the model %s", name, exc_info=None if isinstance(error, MmllmError) else error)
