"""The diagram of a system as SVG: modalities in on the left, the backbone, modalities out on the right."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from mmllm.config.run import RunConfig
from mmllm.plan.diagram import Box, Picture, Row, count, picture

if TYPE_CHECKING:
    from mmllm.plan.parts import Parts

WIDE, HIGH = 158, 54  # of a box
STEP, GAP, EDGE = 78, 44, 24  # from row to row, between boxes, around all
INK, SOFT, LINE, PAPER = "#1f2933", "#667380", "#9aa5b1", "#ffffff"
FROZEN, TRAINED = ("#e8eef4", "#b6c4d2"), ("#fde7cf", "#e09b4f")


def draw(plan: Parts, config: RunConfig) -> str:
    """An SVG document with explicit colours on white, so that it reads the same on light and dark pages."""
    shown = picture(plan, config.model)
    deep = max(len(row.boxes) for row in shown.inputs), max(len(row.boxes) for row in shown.outputs)
    rows = max(len(shown.inputs), len(shown.outputs))
    name = max(84, min(160, 18 + max(9 * len(row.name) for row in (*shown.inputs, *shown.outputs))))
    middle = EDGE + name + deep[0] * (WIDE + GAP) + GAP
    core = max(rows * STEP - (STEP - HIGH), len(shown.backbone) * STEP - (STEP - HIGH) + 2 * 14)
    width = middle + WIDE + 28 + GAP + deep[1] * (WIDE + GAP) + 30 + name + EDGE
    top, height = EDGE + 34, EDGE + 34 + core + 62
    parts = [_text(EDGE, EDGE + 6, _title(plan), 16, INK, weight=600)]
    parts += [_input(row, _row_y(i, len(shown.inputs), top, core), middle, name) for i, row in enumerate(shown.inputs)]
    parts.append(_backbone(shown, middle, top, core))
    right = middle + WIDE + 28
    parts += [
        _output(row, _row_y(i, len(shown.outputs), top, core), right, width - EDGE - name)
        for i, row in enumerate(shown.outputs)
    ]
    parts.append(_legend(shown, height - EDGE))
    marker = (
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0.6 L7 4 L0 7.4 Z" fill="{LINE}"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" role="img">'
        f"<title>{escape(_title(plan))}</title>{marker}"
        f'<rect width="{width}" height="{height}" rx="10" fill="{PAPER}"/>' + "".join(parts) + "</svg>\n"
    )


def _title(plan: Parts) -> str:
    names = [*plan.inputs, "text"], ["text", *plan.outputs]
    return f"{', '.join(names[0])} to {', '.join(names[1])}: {count(plan.total)} parameters"


def _row_y(index: int, rows: int, top: float, core: float) -> float:
    """The middle of a row, where ``rows`` are spread over the height of the backbone."""
    return top + core * (index + 0.5) / rows


def _input(row: Row, y: float, end: float, name: float) -> str:
    drawn = [_text(EDGE, y + 5, _short(row.name, name, 15), 15, INK, weight=600)]
    x: float = EDGE + name
    start = EDGE + min(name, 9 * len(row.name) + 8)
    for box in row.boxes:
        drawn += [_arrow(start, x, y), _box(box, x, y)]
        start = x + WIDE
        x = start + GAP
    drawn.append(_arrow(start, end, y, _tokens(row), at=end - 8))
    return "".join(drawn)


def _output(row: Row, y: float, start: float, stop: float) -> str:
    drawn = []
    x = stop - len(row.boxes) * (WIDE + GAP) + GAP - 30
    note = f"{row.note} signals" if len(row.boxes) > 1 else "codes" if row.boxes else ""
    for number, box in enumerate(row.boxes):
        drawn += [_arrow(start, x, y, note if number == 0 else ""), _box(box, x, y)]
        start = x + WIDE
        x = start + GAP
    drawn.append(_arrow(start, stop, y))
    drawn.append(_text(stop + 8, y + 5, row.name, 15, INK, weight=600))
    return "".join(drawn)


def _tokens(row: Row) -> str:
    if not row.note:
        return ""
    return "1 token" if row.note == "1" else f"{row.note} tokens"


def _backbone(shown: Picture, x: float, top: float, core: float) -> str:
    drawn = [f'<rect x="{x}" y="{top}" width="{WIDE + 28}" height="{core}" rx="10" fill="#f5f7fa" stroke="{LINE}"/>']
    for i, box in enumerate(shown.backbone):
        drawn.append(_box(box, x + 14, _row_y(i, len(shown.backbone), top, core)))
    return "".join(drawn)


def _box(box: Box, x: float, y: float) -> str:
    fill, edge = TRAINED if box.stages else FROZEN
    note = box.note + ("" if box.stages else ", frozen" if box.note else "frozen")
    badges = "".join(
        f'<circle cx="{x + WIDE - 13 - 19 * i}" cy="{y - HIGH / 2}" r="8.5" fill="{edge}"/>'
        + _text(x + WIDE - 13 - 19 * i, y - HIGH / 2 + 4, str(stage), 11, PAPER, anchor="middle", weight=700)
        for i, stage in enumerate(reversed(box.stages))
    )
    return (
        f'<rect x="{x}" y="{y - HIGH / 2}" width="{WIDE}" height="{HIGH}" rx="8" fill="{fill}" stroke="{edge}"/>'
        + _text(x + WIDE / 2, y - 3, _short(box.title, WIDE - 12, 14), 14, INK, anchor="middle", weight=600)
        + _text(x + WIDE / 2, y + 16, note, 12, SOFT, anchor="middle")
        + badges
    )


def _arrow(start: float, end: float, y: float, note: str = "", at: float | None = None) -> str:
    line = f'<path d="M{start} {y} H{end - 2}" stroke="{LINE}" stroke-width="1.6" fill="none" marker-end="url(#tip)"/>'
    if not note:
        return line
    if at is not None:
        return line + _text(at, y - 7, note, 11.5, SOFT, anchor="end")
    return line + _text(start + 6, y - 7, note, 11.5, SOFT)


def _legend(shown: Picture, y: float) -> str:
    x: float = EDGE
    drawn = []
    for number, name in enumerate(shown.stages, start=1):
        drawn.append(f'<circle cx="{x + 8}" cy="{y - 4}" r="8.5" fill="{TRAINED[1]}"/>')
        drawn.append(_text(x + 8, y, str(number), 11, PAPER, anchor="middle", weight=700))
        drawn.append(_text(x + 22, y, name, 12.5, INK))
        x += 44 + 7.4 * len(name)
    text = "numbers: the stages that train a part" if shown.stages else "no stage trains anything"
    return "".join([*drawn, _text(x, y, text, 12, SOFT)])


def _text(x: float, y: float, text: str, size: float, fill: str, *, anchor: str = "start", weight: int = 400) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )


def _short(text: str, width: float, size: float) -> str:
    """``text`` cut to about ``width`` pixels."""
    room = int(width / (0.58 * size))
    return text if len(text) <= room else text[: room - 1] + "…"
