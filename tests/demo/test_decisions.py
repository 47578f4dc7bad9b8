"""Requests of all kinds, and whether an assistant answers them in the right modality."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[2] / "demo"), str(Path(__file__).parent)]

from decision_trials import decisions, mixed_requests
from drawing_facts import summary
from scripted import answers, tiny_assistant


def test_only_what_an_assistant_makes_is_asked_for() -> None:
    assert {tuple(wanted) for _, wanted in mixed_requests(("image",), 200, 0)} == {(), ("image",)}
    assert not any(wanted for _, wanted in mixed_requests((), 50, 0))
    all_kinds = Counter(tuple(wanted) for _, wanted in mixed_requests(("image", "audio", "video"), 1000, 0))
    assert set(all_kinds) == {(), ("image",), ("audio",), ("video",), ("image", "audio")}
    assert 0.3 < all_kinds[()] / 1000 < 0.47
    assert mixed_requests(("image",), 20, 1) == mixed_requests(("image",), 20, 1)
    assert mixed_requests(("image",), 20, 1) != mixed_requests(("image",), 20, 2)


def test_every_modality_has_its_own_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = tiny_assistant("image", "audio")
    answers(assistant, monkeypatch, "image")
    right, leaks = decisions(assistant, 30, 0)
    found = summary(right)
    assert found["image"]["share"] == 1.0
    assert found["audio"]["share"] == found["text alone"]["share"] == 0.0
    assert found["right modality"]["n"] == 30
    assert found["right modality"]["share"] == found["image"]["n"] / 30
    assert leaks == []
