"""When checkpoints are written: at once, or by a thread while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mmllm.training.checkpoint import Pending


class Saver:
    """Commits checkpoints in order, one at a time; ``asynchronous``: in a thread.

    The thread is not a daemon, so Python's exit waits for it. What goes wrong in it is raised by the next call.
    """

    def __init__(self, *, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def commit(self, pending: Pending, then: Callable[[], None]) -> None:
        """Commit, and call ``then`` once the checkpoint is in its place. Waits for the one before.

        Raises ``CheckpointError`` when this save, or the one before, could not be written.
        """
        if not self.asynchronous:
            pending.commit()
            then()
            return
        self.wait()
        self._thread = threading.Thread(target=self._work, args=(pending, then), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written. Raises ``CheckpointError`` when the last save could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self, pending: Pending, then: Callable[[], None]) -> None:
        try:
            pending.commit()
            then()
        except Exception as error:
            self._error = error
