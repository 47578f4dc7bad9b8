"""The chat page on a free port of this computer, with an assistant that needs no weights."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path

from chat.fake import FakeAssistant

from mmllm.chat.feedback import FeedbackLog
from mmllm.chat.shelf import ModelShelf


@dataclass
class Server:
    url: str
    assistant: FakeAssistant
    feedback: Path
    uploads: Path


@contextmanager
def running(folder: Path, delay: float = 0.0) -> Iterator[Server]:
    from mmllm.ui.serve import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assistant = FakeAssistant(delay)
    log = FeedbackLog(folder / "feedback.jsonl")
    with chdir(folder):  # as users run it: not from a clone
        demo = serve(ModelShelf(lambda name: assistant), ["embedded"], log, port, block=False)
        try:
            yield Server(f"http://127.0.0.1:{port}", assistant, log.path, Path(demo.uploads.name))
        finally:
            demo.close()
