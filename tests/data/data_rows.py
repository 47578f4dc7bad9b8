"""A row in the messages layout."""

from __future__ import annotations

from typing import Any


def row(id: str, question: str = "How many?", answer: str = "three", **extra: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": id, "messages": turns, **extra}
