"""The gallery's sections about pictures: drawings beside the generator's own, changes, nearest training pictures, failures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from drawing_facts import read_back, wrong
from drawing_trials import Changed, Drawn, ceiling, changed, described, drawn, held_out_wishes
from drawings import caption
from gallery_page import Choice, Page, escape, verdict
from nearest_drawings import TrainingDrawings
from PIL import Image

FEW = 6  # rows of the sections that need several pictures each


def write(assistant: Any, page: Page, choice: Choice) -> None:
    """All sections about pictures."""
    wanted = held_out_wishes(choice.count, choice.seed)
    # One at a time, so that each has the same noise as the generator's own.
    made = drawn(assistant, wanted, choice.seed, batch=1)
    generator = assistant.model.outputs["image"].frozen()
    own = ceiling(generator, wanted[: choice.shown], choice.seed)
    few = made[: min(FEW, choice.shown)]
    with tempfile.TemporaryDirectory() as folder:
        changes = changed(assistant, few, choice.seed, Path(folder), batch=1)
        shown = [one for one in few if one.picture is not None]
        told = described(assistant, [one.picture for one in shown if one.picture is not None], Path(folder))
    page.add("## Pictures")
    asked_for(page, made, own)
    changed_after(page, changes)
    told_about(page, list(zip(shown, told, strict=True)))
    nearest(page, shown, TrainingDrawings(choice.searched, choice.training_seed))
    failures(page, made, choice.shown)


def image(page: Page, name: str, picture: Image.Image | None, shows: str) -> str:
    return "no picture" if picture is None else page.picture(f"{name}.png", picture, shows)


def asked_for(page: Page, made: list[Drawn], own: list[Image.Image]) -> None:
    right = sum(not wrong(one.facts) for one in made)
    page.add(
        "### Asked for and drawn",
        f"The first {len(own)} of {len(made)} requests; of all {len(made)}, {right} pictures show everything that was asked for, "
        "as `demo/picture_parser.py` reads their pixels. The generator by itself starts from the same noise and is told the "
        "caption by its own text encoder: what the assistant could reach at best.",
    )
    rows = []
    for number, (one, picture) in enumerate(zip(made, own, strict=False), start=1):
        name, words = f"asked-{number:02d}", caption(one.wish)
        rows.append((
            escape(one.request),
            image(page, f"{name}-generator", picture, f"The generator's picture of {words}"),
            image(page, f"{name}-assistant", one.picture, f"The assistant's picture of {words}"),
            escape(one.words),
            verdict(wrong(one.facts)),
        ))  # fmt: skip
    page.table(("request", "generator by itself", "assistant", "its words", "parser"), rows)


def changed_after(page: Page, changes: list[Changed]) -> None:
    page.add(
        "### Changed in the next turn",
        "The same conversation goes on. What is asked for now was kept from all trainings too, and requests from which no "
        "change leads to such a one are passed over; the parser judges the second picture alone.",
    )
    rows = []
    for number, change in enumerate(changes, start=1):
        name = f"change-{number:02d}"
        rows.append((
            escape(change.before.request),
            image(page, f"{name}-before", change.before.picture, "Before the change"),
            escape(change.after.request),
            image(page, f"{name}-after", change.after.picture, "After the change"),
            escape(change.after.words),
            verdict(wrong(change.after.facts)),
        ))  # fmt: skip
    page.table(("first", "before", "then", "after", "its words", "parser"), rows)


def told_about(page: Page, told: list[tuple[Drawn, str]]) -> None:
    page.add(
        "### Drawn, then described",
        "Each picture goes back to the assistant in a new conversation: \"Describe the picture.\"",
    )  # fmt: skip
    rows = [
        (
            image(page, f"told-{number:02d}", one.picture, f"The assistant's picture of {caption(one.wish)}"),
            escape(caption(one.wish)),
            escape(text),
            escape(read_back(one.parsed)),
        )
        for number, (one, text) in enumerate(told, start=1)
    ]
    page.table(("picture", "asked for", "what the assistant sees", "what the parser reads"), rows)


def nearest(page: Page, shown: list[Drawn], training: TrainingDrawings) -> None:
    page.add(
        "### Nearest in the training",
        f"Of the first {len(training.drawn)} pictures that the generator's training drew: the nearest by pixels (root mean square "
        "difference of values from 0 to 255), and the one whose caption says the most alike.",
    )
    pictures = [one.picture for one in shown if one.picture is not None]
    rows = []
    near = training.by_pixels(pictures) if pictures else []
    for number, (one, by_pixels) in enumerate(zip(shown, near, strict=True), start=1):
        name, alike = f"nearest-{number:02d}", training.by_facts(one.wish)
        words = caption(one.wish)
        pixels, facts_ = caption(by_pixels.wish), caption(alike.wish)
        rows.append((
            escape(words),
            image(page, f"{name}-drawn", one.picture, f"The assistant's picture of {words}"),
            image(page, f"{name}-pixels", by_pixels.picture(), f"A training picture of {pixels}"),
            f"{by_pixels.measure:.1f}: {escape(pixels)}",
            image(page, f"{name}-caption", alike.picture(), f"A training picture of {facts_}"),
            f"{alike.measure:.0%} of the facts: {escape(facts_)}",
        ))  # fmt: skip
    page.table(("asked for", "drawn", "nearest by pixels", "", "nearest caption", ""), rows)


def failures(page: Page, made: list[Drawn], most: int) -> None:
    def row(number: int, one: Drawn) -> tuple[str, ...]:
        shows = f"The assistant's picture of {caption(one.wish)}"
        picture = image(page, f"failure-{number:02d}", one.picture, shows)
        return escape(one.request), picture, escape(read_back(one.parsed)), verdict(wrong(one.facts))

    head = ("request", "drawn", "what the parser reads", "")
    page.failures(made, lambda one: wrong(one.facts), most, ("The parser", "pictures"), head, row)
