"""How long an assistant takes for one request and its medium, and whether text goes on while a picture is made."""

from __future__ import annotations

import os
import time
from statistics import median
from typing import Any

import torch

from mmllm.replies import Media

MEANWHILE = "Hello! What can you do?"
NAMES = {"image": "picture", "audio": "sound", "video": "clip"}


def ask(assistant: Any, text: str, seed: int) -> Any:
    return assistant.chat([{"role": "user", "content": text}], stream=True, max_new_tokens=160, seed=seed)


def speed(assistant: Any, requests: list[str], seed: int, modality: str) -> dict[str, Any]:
    """Seconds from one request to its first word and to its finished medium, which goes by its name in NAMES, and processor
    time, which other programs on the same cores change less.

    The first of ``requests`` only warms up; replies without a medium of this modality are counted, not timed.
    """
    name = NAMES[modality]
    firsts, whole, busy = [], [], []
    for text in requests:
        begin, used, first, media = time.monotonic(), time.process_time(), 0.0, list[Media]()
        for part in ask(assistant, text, seed):
            first = first or time.monotonic() - begin
            media += [part] if isinstance(part, Media) and part.type == modality else []
        if media:
            media[-1].result()
            whole.append(time.monotonic() - begin)
            busy.append(time.process_time() - used)
            firsts.append(first)
    timed = whole[1:]
    return {
        "n": len(timed),
        f"without a {name}": len(requests) - len(whole),
        "first word": round(median(firsts[1:]), 3) if timed else None,
        name: round(median(timed), 2) if timed else None,
        "processor": round(median(busy[1:]), 2) if timed else None,
        "slowest": round(max(timed), 2) if timed else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def meanwhile(assistant: Any, requests: list[str], seed: int) -> dict[str, Any]:
    """Text that arrives while a picture is made: of the same reply, if it says more after the picture was begun, and of
    another reply that is asked for at that moment.
    """
    own, other, pictures = [], [], 0
    for text in requests:
        media: Media | None = None
        after = 0
        for part in ask(assistant, text, seed):
            if isinstance(part, Media):
                media = media or part
            elif isinstance(part, str) and media is not None and not media.wait(0):
                after += 1
        if media is None:
            continue
        pictures += 1
        own.append(after)
        between = 0
        if not media.wait(0):
            for part in ask(assistant, MEANWHILE, seed):
                between += isinstance(part, str) and not media.wait(0)
        other.append(between)
        media.wait()
    return {
        "pictures": pictures,
        "deltas of the same reply": sum(own),
        "pictures with deltas of another reply": sum(count > 0 for count in other),
        "deltas of another reply": sum(other),
    }
