"""An assistant that needs no weights: it describes what it got, word by word, and counts the words it produced."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmllm.errors import MediaError
from mmllm.processing.images import decode_image
from mmllm.processing.sources import Limits


class FakeAssistant:
    """Answers ``You said <text> with <n> files.``; a text that starts with ``say `` is repeated word for word.

    ``long`` as the text asks for 10,000 words; ``crash`` raises an error that is nobody's fault but ours.
    """

    modalities = ("image", "audio")
    making: Mapping[str, Mapping[str, float]] = {}

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.produced = 0
        self.active = 0
        self.most_active = 0
        self.requests: list[list[Any]] = []
        self.options: list[dict[str, Any]] = []

    def chat(self, messages: Sequence[Any], stream: bool = False, **options: Any) -> Iterator[str]:
        self.requests.append(list(messages))
        stop: threading.Event = options.pop("stop")
        self.options.append(options)
        return self._words(messages, stop)

    def _words(self, messages: Sequence[Any], stop: threading.Event) -> Iterator[str]:
        parts = messages[-1]["content"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        media = [part for part in parts if part["type"] != "text"]
        for part in media:
            if part["type"] == "image":
                try:
                    decode_image(Path(part["path"]).read_bytes(), Limits())
                except MediaError as error:
                    raise MediaError(f"{part['path']}: {error}") from error
        if text == "crash":
            raise RuntimeError("a secret detail of the inside")
        if text == "long":
            answer = " ".join(f"word{i}" for i in range(10_000))
        elif text.startswith("say "):
            answer = text.removeprefix("say ")
        else:
            answer = f"You said {text} with {len(media)} files."
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            for index, word in enumerate(answer.split(" ")):
                if stop.is_set():
                    return
                time.sleep(self.delay)
                self.produced += 1
                yield word if index == 0 else " " + word
        finally:
            self.active -= 1
