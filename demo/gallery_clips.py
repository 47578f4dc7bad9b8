"""The gallery's sections about clips: those asked for, as they move, and failures."""

from __future__ import annotations

from typing import Any

from clip_trials import Animated, animated, held_out_motions, read_back
from drawing_facts import wrong
from gallery_page import Choice, Page, escape, verdict
from moving import caption

SUFFIX = ".webp"  # a twentieth of the size of a GIF, whose palette suits no noise


def write(assistant: Any, page: Page, choice: Choice) -> None:
    """All sections about clips."""
    made = animated(assistant, held_out_motions(choice.count, choice.seed), choice.seed)
    page.add("## Clips")
    asked_for(page, made, choice.shown)
    failures(page, made, choice.shown)


def shown(page: Page, name: str, one: Animated) -> str:
    if one.clip is None:
        return "no clip"
    return page.picture(f"{name}{SUFFIX}", one.clip, f"The assistant's clip of {caption(one.motion)}")


def asked_for(page: Page, made: list[Animated], most: int) -> None:
    right = sum(one.facts["all"] for one in made)
    page.add(
        "### Asked for and animated",
        f"The first {min(most, len(made))} of {len(made)} requests; of all {len(made)}, {right} clips show everything that was "
        "asked for, as `demo/clip_parser.py` reads the pixels of every frame.",
    )
    rows = [
        (
            escape(one.request),
            shown(page, f"clip-{number:02d}", one),
            escape(one.words),
            escape(read_back(one.parsed)),
            verdict(wrong(one.facts)),
        )
        for number, one in enumerate(made[:most], start=1)
    ]
    page.table(("request", "clip", "its words", "what the parser reads", ""), rows)


def failures(page: Page, made: list[Animated], most: int) -> None:
    def row(number: int, one: Animated) -> tuple[str, ...]:
        clip = shown(page, f"clip-failure-{number:02d}", one)
        return escape(one.request), clip, escape(read_back(one.parsed)), verdict(wrong(one.facts))

    head = ("request", "clip", "what the parser reads", "")
    page.failures(made, lambda one: wrong(one.facts), most, ("The parser", "clips"), head, row)
