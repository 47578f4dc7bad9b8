"""The scores of `evaluate_drawing.py` in Markdown, for the model card."""

from __future__ import annotations

from typing import Any

import score_card
from score_card import NO_LEAKS, Aim, Found, Layout, Report, at_least, said, seconds, verdict


def text_meanwhile(report: Report) -> Found | None:
    if "meanwhile" not in report:
        return None
    found = report["meanwhile"]
    going, pictures = found["pictures with deltas of another reply"], found["pictures"]
    return f"{going} of {pictures} pictures", verdict(0 < pictures == going)


LAYOUT = Layout(
    aims=(
        at_least("exactly the shapes asked for", "assistant", "kinds", 0.90),
        at_least("right position", "assistant", "position", 0.85),
        at_least("shapes, of what the generator reaches by itself", "ratio", "kinds", 0.95),
        at_least("position, of what the generator reaches by itself", "ratio", "position", 0.95),
        at_least("draws, then describes what was asked for", "cycle", "as asked", 0.85),
        at_least("answers in the right modality, of all that it makes", "decision", "right modality", 0.98),
        NO_LEAKS,
        seconds("a 64 x 64 picture on two cores, median seconds", "picture", 4.0),
        Aim("text goes on while a picture is made", "always", text_meanwhile),
    ),
    facts={
        "kinds": "exactly the shapes asked for: count, colour, shape",
        "places": "places (\"at the top left\")",
        "relations": "relations (\"left of\")",
        "position": "places or relations",
        "background": "background",
        "all": "everything asked for",
    },
    parts=(
        ("generator, its own text encoder", "ceiling"),
        ("assistant", "assistant"),
        ("assistant / generator", "ratio"),
        ("after a change", "changes"),
    ),
    others=("cycle", "words", "decision"),
    read=("read", "in the picture"),
)  # fmt: skip


def section(report: Report | None) -> str:
    """The part of the model card about drawings."""
    return score_card.section(report, LAYOUT, more)


def more(report: Report) -> tuple[dict[str, Any], list[str]]:
    shapes = {f"everything right, {number} asked for": v for number, v in report.get("by shapes", {}).items()}
    meanwhile = [f"Text meanwhile: {said(report['meanwhile'])}."] if "meanwhile" in report else []
    return shapes, meanwhile + ([near(report["nearest"])] if "nearest" in report else [])


def near(found: dict[str, Any]) -> str:
    """How far pictures are from those of the training, in words."""
    made, true = found["pictures made"], found["true pictures"]
    drawn = f"{made['median']} (smallest {made['smallest']})" if made else "unknown, as none was made"
    return (
        f"Nearest of {found['searched']} training pictures, root mean square difference of pixel values (0 to 255), median: "
        f"the assistant's pictures {drawn}, true pictures of the same wishes {true['median']} (smallest {true['smallest']}). "
        f"Of {true['n']} captions, {found['captions that occur']} occur there, "
        f'{found["captions that occur in other words"]} more in other words ("a right of b" for "b left of a").'
    )
