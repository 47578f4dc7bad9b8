"""Scores in Markdown, for the model card: every figure, and every aim that is missed. What drawings, sounds and clips share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Report = dict[str, Any]
Found = tuple[str, str]  # what was found, and whether that is what was wanted
NOT_EVALUATED = "Not evaluated.\n"
SHOWN = 10  # failures


@dataclass(frozen=True)
class Aim:
    """``judge`` says what a report has found, None when it was not measured."""

    name: str
    wanted: str
    judge: Callable[[Report], Found | None]


@dataclass(frozen=True)
class Layout:
    """What a section shows: ``facts`` by these names (others by their own), in a column for each of the ``parts`` of the report
    (title, key); after that every share in the parts ``others``; of a failure what was found, by its key and the title of
    its column.
    """

    aims: tuple[Aim, ...]
    facts: dict[str, str]
    parts: tuple[tuple[str, str], ...]
    others: tuple[str, ...]
    read: tuple[str, str]


def at_least(name: str, part: str, fact: str, least: float) -> Aim:
    """A share of ``report[part][fact]``."""

    def judge(report: Report) -> Found | None:
        found = report.get(part, {}).get(fact)
        if found is not None:
            return share(found), verdict(found["share"] >= least)
        if part == "ratio" and report["ceiling"].get(fact, {}).get("share") == 0:
            return share(None), "**no**, the generator gets none right"
        return None

    return Aim(name, f"≥ {least:.0%}", judge)


def seconds(name: str, medium: str, most: float) -> Aim:
    """The median of ``report["speed"][medium]``."""

    def judge(report: Report) -> Found | None:
        if "speed" not in report:
            return None
        found, threads = report["speed"][medium], report["speed"]["threads"]
        return f"{found} (threads: {threads})", verdict(found is not None and found <= most)

    return Aim(name, f"≤ {most:.0f}", judge)


def leaks(report: Report) -> Found | None:
    return (str(len(report["leaks"])), verdict(not report["leaks"])) if "leaks" in report else None


NO_LEAKS = Aim("signs of signal tokens in a text", "0", leaks)


def found_in(work: Path, name: str) -> Report | None:
    """The report ``name`` in the scores of a work folder, ``scores/NAME`` or the one of another ``scores*`` folder.

    None when there is none. Raises ``ValueError`` when there are several and none of them is in ``scores``.
    """
    files = sorted(work.glob(f"scores*/{name}"))
    chosen = [file for file in files if file.parent.name == "scores"] or files
    if len(chosen) > 1:
        listed = ", ".join(str(file.relative_to(work)) for file in chosen)
        raise ValueError(f"{work}: {listed}: one report is expected; move that of these weights to scores/{name}")
    return json.loads(chosen[0].read_text(encoding="utf-8")) if chosen else None


def row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    return "\n".join([row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in rows)])


def share(found: dict[str, Any] | None) -> str:
    """A share with its interval."""
    if found is None:
        return "–"
    low, high = found["interval"]
    return f"{found['share']:.1%} ({low:.1%} – {high:.1%})"


def verdict(met: bool) -> str:
    return "yes" if met else "**no**"


def cut(text: str, length: int = 200) -> str:
    """``text`` for the cell of a table."""
    plain = " ".join(text.replace("|", "/").split())
    return plain if len(plain) <= length else plain[: length - 1] + "…"


def said(numbers: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in numbers.items())


def aims_table(aims: tuple[Aim, ...], report: Report) -> str:
    """Every aim, what was found, and whether it is met."""
    rows = [(aim.name, aim.wanted, *(aim.judge(report) or ("–", "not measured"))) for aim in aims]
    return table(("aim", "wanted", "found (95 % interval)", "met"), rows)


def facts_table(layout: Layout, report: Report) -> str:
    """Every fact of the ceiling, in each part of the report."""
    rows = []
    found = report["ceiling"]
    known = [fact for fact in layout.facts if fact in found]
    for fact in (*known, *(fact for fact in found if fact not in layout.facts)):
        parts = [report.get(part, {}).get(fact) for _, part in layout.parts]
        rows.append((layout.facts.get(fact, fact), found[fact]["n"], *map(share, parts)))
    return table(("fact", "n", *(title for title, _ in layout.parts)), rows)


def failures(listed: list[dict[str, str]], read: tuple[str, str]) -> str:
    if not listed:
        return "Failures: none."
    key, title = read
    rows = [tuple(cut(one[name]) for name in ("asked", "reply", key, "wrong")) for one in listed[:SHOWN]]
    shown = f"the first {len(rows)}, in the order of the test" if len(rows) < len(listed) else "all of them"
    return f"Failures: {len(listed)}; {shown}.\n\n" + table(("asked", "said", title, "wrong"), rows)


def section(
    report: Report | None, layout: Layout, more: Callable[[Report], tuple[dict[str, Any], list[str]]] | None = None
) -> str:
    """The part of the model card about one modality. ``more`` gives further shares by their names, and paragraphs."""
    if report is None:
        return NOT_EVALUATED
    blocks = [aims_table(layout.aims, report), facts_table(layout, report)]
    if "assistant" not in report:
        return "\n\n".join([*blocks, "The generator alone was evaluated, not the assistant."]) + "\n"
    shares = {f"{part}: {fact}": value for part in layout.others for fact, value in report.get(part, {}).items()}
    further, paragraphs = more(report) if more else ({}, [])
    rows = [(name, value["n"], share(value)) for name, value in (shares | further).items()]
    blocks.append(table(("", "n", "share (95 % interval)"), rows))
    if report.get("leaks"):
        listed = "\n".join(f"- `{cut(text)}`" for text in report["leaks"])
        blocks.append("Texts with signs of signal tokens:\n\n" + listed)
    if "speed" in report:
        blocks.append("One request: " + said(report["speed"]) + ".")
    blocks += paragraphs
    blocks.append("Seconds of the evaluation's steps: " + said(report["seconds"]) + ".")
    if "failures" in report:
        blocks.append(failures(report["failures"], layout.read))
    return "\n\n".join(blocks) + "\n"
