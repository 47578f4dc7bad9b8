"""The scores of `evaluate_drawing.py` in Markdown, for the model card: every figure, and every aim that is missed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = dict[str, Any]
NAMES = {
    "kinds": "exactly the shapes asked for: count, colour, shape",
    "places": "places (\"at the top left\")",
    "relations": "relations (\"left of\")",
    "position": "places or relations",
    "background": "background",
    "all": "everything asked for",
}  # fmt: skip
# What is wanted, where it stands in the report, and how much: at least of a share, at most of seconds.
SHARES = (
    ("exactly the shapes asked for", ("assistant", "kinds"), 0.90),
    ("right position", ("assistant", "position"), 0.85),
    ("shapes, of what the generator reaches by itself", ("ratio", "kinds"), 0.95),
    ("position, of what the generator reaches by itself", ("ratio", "position"), 0.95),
    ("draws, then describes what was asked for", ("cycle", "as asked"), 0.85),
    ("answers in the right modality", ("decision", "right modality"), 0.98),
)
SECONDS = 4.0  # for one picture
SHOWN = 10  # failures


def found_in(work: Path) -> Report | None:
    """The report in the scores of a work folder, ``scores/drawing.json`` or the one of another ``scores*`` folder.

    None when there is none. Raises ``ValueError`` when there are several and none of them is in ``scores``.
    """
    files = sorted(work.glob("scores*/drawing.json"))
    chosen = [file for file in files if file.parent.name == "scores"] or files
    if len(chosen) > 1:
        listed = ", ".join(str(file.relative_to(work)) for file in chosen)
        raise ValueError(f"{work}: {listed}: one report is expected; move that of these weights to scores/drawing.json")
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


def aims(report: Report) -> str:
    """Every aim, what was found, and whether it is met."""
    rows: list[tuple[Any, ...]] = []
    for name, (part, fact), least in SHARES:
        found = report.get(part, {}).get(fact)
        met = "not measured" if found is None else verdict(found["share"] >= least)
        if found is None and part == "ratio" and report["ceiling"].get(fact, {}).get("share") == 0:
            met = "**no**, the generator gets none right"
        rows.append((name, f"≥ {least:.0%}", share(found), met))
    others: tuple[tuple[str, str, str, Callable[[Any], tuple[str, bool]]], ...] = (
        ("signs of signal tokens in a text", "0", "leaks", lambda v: (str(len(v)), not v)),
        (
            "a 64 x 64 picture on two cores, median seconds", f"≤ {SECONDS:.0f}", "speed",
            lambda v: (f"{v['picture']} (threads: {v['threads']})", v["picture"] is not None and v["picture"] <= SECONDS),
        ),
        (
            "text goes on while a picture is made", "always", "meanwhile",
            lambda v: (
                f"{v['pictures with deltas of another reply']} of {v['pictures']} pictures",
                0 < v["pictures"] == v["pictures with deltas of another reply"],
            ),
        ),
    )  # fmt: skip
    for name, wanted, part, judge in others:
        if part not in report:
            rows.append((name, wanted, "–", "not measured"))
            continue
        found, met = judge(report[part])
        rows.append((name, wanted, found, verdict(met)))
    return table(("aim", "wanted", "found (95 % interval)", "met"), rows)


def facts_table(report: Report) -> str:
    """Ceiling, assistant and their ratio, and changes, fact by fact."""
    rows = []
    for fact, name in NAMES.items():
        if fact in report["ceiling"]:
            parts = [report.get(part, {}).get(fact) for part in ("ceiling", "assistant", "ratio", "changes")]
            rows.append((name, report["ceiling"][fact]["n"], *map(share, parts)))
    head = ("fact", "n", "generator, its own text encoder", "assistant", "assistant / generator", "after a change")
    return table(head, rows)


def cut(text: str, length: int = 200) -> str:
    """``text`` for the cell of a table."""
    plain = " ".join(text.replace("|", "/").split())
    return plain if len(plain) <= length else plain[: length - 1] + "…"


def failures(listed: list[dict[str, str]]) -> str:
    if not listed:
        return "Failures: none."
    rows = [tuple(cut(one[name]) for name in ("asked", "reply", "read", "wrong")) for one in listed[:SHOWN]]
    shown = f"the first {len(rows)}, in the order of the test" if len(rows) < len(listed) else "all of them"
    return f"Failures: {len(listed)}; {shown}.\n\n" + table(("asked", "said", "in the picture", "wrong"), rows)


def section(report: Report | None) -> str:
    """The part of the model card about drawings."""
    if report is None:
        return "Not evaluated.\n"
    parts = [aims(report), facts_table(report)]
    if "assistant" not in report:
        return "\n\n".join([*parts, "The generator alone was evaluated, not the assistant."]) + "\n"
    rest = [
        (f"{part}: {fact}", v["n"], share(v))
        for part in ("cycle", "words", "decision")
        for fact, v in report[part].items()
    ]
    shapes = [
        (f"everything right, {number} asked for", v["n"], share(v)) for number, v in report.get("by shapes", {}).items()
    ]
    parts.append(table(("", "n", "share (95 % interval)"), rest + shapes))
    if report["leaks"]:
        parts.append(
            "Texts with signs of signal tokens:\n\n" + "\n".join(f"- `{cut(text)}`" for text in report["leaks"])
        )
    if "speed" in report:
        parts.append("One request: " + said(report["speed"]) + ". Text meanwhile: " + said(report["meanwhile"]) + ".")
    if "nearest" in report:
        parts.append(near(report["nearest"]))
    parts.append("Seconds of the evaluation's steps: " + said(report["seconds"]) + ".")
    if "failures" in report:
        parts.append(failures(report["failures"]))
    return "\n\n".join(parts) + "\n"


def said(numbers: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in numbers.items())


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
