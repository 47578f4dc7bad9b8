"""The scores of `evaluate_clips.py` in Markdown, for the model card."""

from __future__ import annotations

import score_card
from score_card import Layout, Report, at_least

LAYOUT = Layout(
    aims=(at_least("direction and shape", "assistant", "direction and shape", 0.85),),
    facts={
        "direction and shape": "direction and shape",
        "direction": "direction: which way, back or not, growing, shrinking",
        "shape": "shape",
        "color": "colour",
        "background": "background",
        "pace": "pace, where it is said",
        "alone": "one shape and no other in every frame",
        "all": "everything asked for",
    },
    parts=(
        ("generator, its own text encoder", "ceiling"),
        ("assistant", "assistant"),
        ("assistant / generator", "ratio"),
    ),
    others=("words",),
    read=("read", "in the clip"),
)


def section(report: Report | None) -> str:
    """The part of the model card about clips."""
    return score_card.section(report, LAYOUT)
