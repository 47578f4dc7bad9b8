"""What a diagram of a system shows, for the terminal; ``svg.py`` draws the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmllm.config.pieces import split
from mmllm.config.run import ModelConfig

if TYPE_CHECKING:
    from mmllm.plan.parts import Parts


@dataclass(frozen=True)
class Box:
    """A part: its ``title``, a ``note`` below (its size, its tokens), and the numbers of the stages that train it, from 1."""

    title: str
    note: str
    stages: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """One modality and the boxes between it and the backbone, in the direction of the data; ``note`` is about its tokens."""

    name: str
    boxes: tuple[Box, ...]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """The modalities in and out, text last and first, and the boxes of the backbone."""

    inputs: tuple[Row, ...]
    backbone: tuple[Box, ...]
    outputs: tuple[Row, ...]
    stages: tuple[str, ...]


def picture(plan: Parts, config: ModelConfig) -> Picture:
    """The diagram of a system."""

    def box(part: str, title: str) -> Box:
        known = plan.parameters.get(part)
        trained = tuple(
            number
            for number, stage in enumerate(plan.stages, start=1)
            if any(split(piece)[0] == part for piece in stage.parts)
        )
        return Box(title, "" if known is None else count(known), trained)

    inputs = []
    for name, one in plan.inputs.items():
        boxes = [box(f"inputs.{name}.encoder", one.encoder)]
        if f"inputs.{name}.encoder.adapter" in plan.parameters:
            boxes.append(box(f"inputs.{name}.encoder.adapter", "adapter"))
        boxes.append(box(f"inputs.{name}.projector", one.projector))
        if (fusion := config.inputs[name].fusion) is not None:
            boxes.append(box(f"inputs.{name}.fusion", fusion.kind))
        tokens = sorted(set(one.tokens.values()))
        inputs.append(Row(name, tuple(boxes), f"{tokens[0]} to {tokens[-1]}" if len(tokens) > 1 else str(tokens[0])))
    outputs = [Row("text", ())]
    for name, out in plan.outputs.items():
        boxes = [box(f"outputs.{name}.generator", out.generator)]
        if out.projector is not None:
            boxes.insert(0, box(f"outputs.{name}.projector", out.projector))
        outputs.append(Row(name, tuple(boxes), str(out.signal_tokens)))
    core = [box("backbone", config.backbone.kind)]
    if config.backbone.adapter is not None:
        core.append(box("backbone.adapter", config.backbone.adapter.kind))
    if "backbone.new_tokens" in plan.parameters:
        core.append(box("backbone.new_tokens", "new tokens"))
    return Picture((*inputs, Row("text", ())), tuple(core), tuple(outputs), tuple(stage.name for stage in plan.stages))


def count(number: int) -> str:
    """``1234567`` as ``1.23 M``."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def draw_text(shown: Picture) -> str:
    """The diagram for a terminal: modalities in on the left, out on the right; a star marks what a stage trains."""
    left = _columns([[row.name, *(_label(box) for box in row.boxes)] for row in shown.inputs])
    ends = [f" {row.note} ─▶ " if row.note else "─▶ " for row in shown.inputs]
    side = max(len(text) + len(end) for text, end in zip(left, ends, strict=True))
    before = [text + "─" * (side - len(text) - len(end)) + end for text, end in zip(left, ends, strict=True)]
    core = [_label(box) for box in shown.backbone]
    after = [
        " ─▶ ".join(([row.note] if row.note else [""]) + [_label(box) for box in row.boxes] + [row.name]).lstrip()
        for row in shown.outputs
    ]
    height = max(len(before), len(core), len(after))
    width = max(len(text) for text in core)
    lines = ["  " + " " * side + "┌" + "─" * (width + 2) + "┐"]
    for a, b, c in zip(_middle(before, height), _middle(core, height), _middle(after, height), strict=True):
        lines.append(f"  {a:<{side}}│ {b:<{width}} │ {c}".rstrip())
    lines.append("  " + " " * side + "└" + "─" * (width + 2) + "┘")
    return "\n".join(lines)


def _label(box: Box) -> str:
    return box.title + "*" * bool(box.stages)


def _columns(rows: list[list[str]]) -> list[str]:
    """Cells joined by arrows, each in its column."""
    count = max(len(row) for row in rows)
    widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(count)]
    lines = []
    for row in rows:
        text = row[0].ljust(widths[0])
        for i, cell in enumerate(row[1:], start=1):
            text += f" ─▶ {cell.ljust(widths[i])}"
        lines.append(text.rstrip() + " ")
    return lines


def _middle(lines: list[str], height: int) -> list[str]:
    above = (height - len(lines)) // 2
    return [""] * above + lines + [""] * (height - len(lines) - above)
