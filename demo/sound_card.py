"""The scores of `evaluate_sounds.py` in Markdown, for the model card."""

from __future__ import annotations

from typing import Any

import score_card
from score_card import Layout, Report, at_least, seconds
from sound_wishes import SECONDS

LAYOUT = Layout(
    aims=(
        at_least("one digit: \"say seven\"", "assistant", "one digit", 0.90),
        at_least("kind of sound", "assistant", "kind", 0.90),
        seconds(f"a one-second sound on two cores, median seconds (taken with {SECONDS:.0f} seconds of sound)", "sound", 4.0),
    ),
    facts={
        "one digit": "one digit",
        "several digits": "two or three digits, all in order",
        "kind": "kind of sound",
        "facts of a sound": "everything said of a sound: kind, count, pitch, direction, length, speed, parts, \"quiet\"",
        "all": "everything asked for",
    },
    parts=(
        ("true sounds", "judge"),
        ("generator, its own text encoder", "ceiling"),
        ("assistant", "assistant"),
        ("assistant / generator", "ratio"),
    ),
    others=("words",),
    read=("heard", "heard"),
)  # fmt: skip


def section(report: Report | None) -> str:
    """The part of the model card about sounds."""
    return score_card.section(report, LAYOUT, more)


def more(report: Report) -> tuple[dict[str, Any], list[str]]:
    judged = report.get("judge", {}).get("all")
    if judged is None:
        return {}, []
    return {}, [f"The column of true sounds is the judge's own score (n = {judged['n']}), the most that can be heard."]
