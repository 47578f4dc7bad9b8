"""The chat page on a free port of this computer, with an assistant that needs no weights."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chat.fake import FakeAssistant

from mmllm.chat.feedback import FeedbackLog
from mmllm.chat.shelf import ModelShelf
from mmllm.errors import CheckpointError


@dataclass
class Server:
    url: str
    assistant: Any
    feedback: Path
    uploads: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    folder: Path,
    delay: float = 0.0,
    broken: str | None = None,
    assistant: Any = None,
    port: int | None = None,
) -> Iterator[Server]:
    """``broken``: why no model can be loaded, for a server without any; ``assistant``: another than the fake one."""
    from mmllm.ui.serve import serve

    port = port or free_port()
    assistant = assistant or FakeAssistant(delay)

    def load(name: str) -> Any:
        if broken is not None:
            raise CheckpointError(broken)
        return assistant

    log = FeedbackLog(folder / "feedback.jsonl")
    # As users run it: not from a clone. A server names its folder of uploads in the environment; of several servers in
    # one process each gets its own back.
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")
        demo = serve(ModelShelf(load), ["embedded"], log, port, block=False)
        try:
            yield Server(f"http://127.0.0.1:{port}", assistant, log.path, demo.uploads.path)
        finally:
            demo.close()
            demo.uploads.close()
