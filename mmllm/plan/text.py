"""The plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from mmllm.config.pieces import split
from mmllm.config.run import ModelConfig, RunConfig
from mmllm.plan.diagram import count, draw_text, picture

if TYPE_CHECKING:
    from mmllm.plan import Plan
    from mmllm.plan.measure import Costs, StageCost


def _state(part: str, trained: Collection[str]) -> str:
    """What a stage that trains the parts and pieces ``trained`` does with ``part``."""
    if part in trained:
        return "train"
    return "in part" if part in {split(piece)[0] for piece in trained} else "frozen"


def render(plan: Plan, config: RunConfig, *, details: bool = False) -> str:
    """The plan of ``config``; ``details`` adds memory by part, operations by part, and what the numbers assume."""
    blocks = [draw_text(picture(plan, config.model)), _parts(plan, config.model), _parameters(plan)]
    if plan.costs is not None and plan.costs.stages:
        blocks.append(_stages(plan, plan.costs))
        if details:
            blocks += [_memory(name, cost) for name, cost in plan.costs.stages.items()]
            blocks.append(_operations(plan.costs))
        blocks.append(_talk(plan.costs))
    if plan.sources:
        blocks.append(_weights(plan))
    if plan.costs is not None:
        notes = list(plan.costs.notes) + (_assumptions(plan) if details else [])
        blocks.append("\n".join(f"  * {note}" for note in notes))
    return "\n\n".join(block for block in blocks if block)


def _parts(plan: Plan, config: ModelConfig) -> str:
    lines = ["parts"]
    for name, part in plan.inputs.items():
        sizes = ", ".join(f"{label}: {n}" for label, n in part.tokens.items())
        lines += [
            f"  {name}",
            f"    encoder    {part.encoder:<16} (N, S, {part.feature_dim})   {count(plan.parameters[f'inputs.{name}.encoder'])}",
            f"    projector  {part.projector:<16} (N, Q, {plan.hidden_dim})   {count(plan.parameters[f'inputs.{name}.projector'])}",
            f"    tokens     {sizes}",
        ]
        if (fusion := config.inputs[name].fusion) is not None:
            size = count(plan.parameters[f"inputs.{name}.fusion"])
            lines.append(f"    fusion     {fusion.kind:<16} in the blocks, (B, T, {plan.hidden_dim})   {size}")
    lines += [
        f"  backbone     {config.backbone.kind:<16} (B, T, {plan.hidden_dim}) -> (B, T, {plan.vocab_rows})",
    ]
    if plan.quantized_bytes is not None and config.backbone.quantize is not None:
        lines.append(
            f"    quantised  {config.backbone.quantize.bits} bits{'':<10} {plan.quantized_bytes / 1e9:.3g} GB of weights"
        )
    for name, out in plan.outputs.items():
        weights = plan.parameters.get(f"outputs.{name}.generator")
        lines += [f"  {name}", f"    tokens     {out.signal_tokens} for each, {out.rows} in the table"]
        if out.projector is not None:
            shapes = ", ".join(f"{stream} (N, {length}, {dim})" for stream, (length, dim) in out.condition.items())
            size = count(plan.parameters[f"outputs.{name}.projector"])
            given = f"(N, {out.signal_tokens}, {plan.hidden_dim})"
            lines.append(f"    projector  {out.projector:<16} {given} -> {shapes}   {size}")
        lines.append(f"    generator  {out.generator:<16} frozen   {'' if weights is None else count(weights)}")
        for head, shape in (("retrieval", "(N, dim) of signals and media"), ("decision", "(N, 2)")):
            if (size_of := plan.parameters.get(f"outputs.{name}.{head}")) is not None:
                lines.append(f"    {head:<10} {'linear':<16} {shape}   {count(size_of)}")
    return "\n".join(lines)


def _parameters(plan: Plan) -> str:
    trained = [set(stage.parts) for stage in plan.stages]
    rows = [["part", "count", *(stage.name for stage in plan.stages)]]
    rows += [
        [name, count(number), *(_state(name, parts) for parts in trained)] for name, number in plan.parameters.items()
    ]
    rows.append(["total", count(plan.total), *(count(stage.trainable) for stage in plan.stages)])
    return f"parameters\n{table(rows)}"


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows of cells in columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        indent
        + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def size(number: float) -> str:
    """Bytes: ``13476831232`` as ``13.5 GB``."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}" if number < 999.5 * unit else f"{number / unit:.0f} {name}"
    return f"{number:.0f} B"


def duration(seconds: float | None) -> str:
    """``5400`` as ``1.5 h``; a dash for None."""
    if seconds is None:
        return "-"
    for unit, name in ((86400 * 3, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= unit:
            return f"{seconds / (86400 if name == 'd' else unit):.3g} {name}"
    return f"{seconds * 1000:.2g} ms"


def machines(plan: Plan) -> str:
    """``8 x h100, fsdp``."""
    setting = plan.setting
    shared = "" if setting.devices == 1 else f", {setting.sharding}"
    return f"{setting.devices} x {setting.device}{shared}"


def _stages(plan: Plan, costs: Costs) -> str:
    head = [
        "stage",
        "micro batch",
        "tokens",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "peak",
        "step",
        "steps",
        "time",
    ]
    rows = [head]
    for name, cost in costs.stages.items():
        memory = cost.memory
        sums = [sum(part.values()) for part in (memory.weights, memory.gradients, memory.optimizer, memory.activations)]
        rows.append(
            [
                name,
                str(cost.micro_batch_size),
                str(cost.length),
                *(size(number) for number in sums),
                size(memory.peak),
                duration(cost.step_seconds),
                "?" if cost.steps is None else f"{cost.steps:,}",
                "?" if cost.hours is None else duration(cost.hours * 3600),
            ]
        )
    share = f"{plan.setting.utilisation:.0%}"
    title = f"memory of a device and time ({machines(plan)}, {share} of its peak)"
    return f"{title}\n{table(rows)}"


def _memory(name: str, cost: StageCost) -> str:
    memory = cost.memory
    columns = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
    parts = list(dict.fromkeys(part for column in columns for part in column))
    rows = [["part", "weights", "gradients", "optimizer", "activations"]]
    rows += [[part, *(size(column[part]) if column.get(part) else "" for column in columns)] for part in parts]
    if memory.exchange:
        rows.append(["exchange", "", "", "", size(memory.exchange)])
        traffic = cost.traffic
        rows.append([f"a step gets {size(traffic.gathered)}, gives {size(traffic.reduced)}", "", "", "", ""])
    rows.append([f"peak ({memory.when})", "", "", "", size(memory.peak)])
    return f"memory of {name}\n{table(rows)}"


def _operations(costs: Costs) -> str:
    names = list(costs.stages)
    parts = list(dict.fromkeys(part for cost in costs.stages.values() for part in cost.forward_flops))
    rows = [["forward pass", *names]]
    rows += [[part, *(_flops(costs.stages[name].forward_flops.get(part, 0)) for name in names)] for part in parts]
    rows.append(["with backward pass", *(_flops(costs.stages[name].flops) for name in names)])
    rows.append(["tokens", *(f"{costs.stages[name].tokens:,}" for name in names)])
    return f"operations of a step\n{table(rows)}"


def _flops(number: int) -> str:
    for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number / 1e6:.3g} MFLOP"


def _talk(costs: Costs) -> str:
    lines = []
    if (talk := costs.inference) is not None:
        cache = f"{size(talk.cache)} of cache for {talk.length} tokens"
        lines.append(f"talking to it   {size(talk.peak)}: {size(talk.weights)} of weights, {cache}")
    lines.append(f"disk            {size(costs.disk)} for its checkpoints and the final model")
    return "\n".join(lines)


def _weights(plan: Plan) -> str:
    rows = [["pretrained", "download", "licence"]]
    for one in plan.sources:
        known = (
            "?" if one.bytes is None else "local" if not one.bytes else ("~" if one.estimated else "") + size(one.bytes)
        )
        rows.append([one.pretrained, known, one.licence])
    total = sum(one.bytes or 0 for one in plan.sources)
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"  {a.ljust(widths[0])}  {b.rjust(widths[1])}  {c}" for a, b, c in rows]
    title = f"weights to download: {size(total)}" if total else "weights"
    return "\n".join([title, *lines])


def _assumptions(plan: Plan) -> list[str]:
    setting = plan.setting
    media = {
        name: f"{label}, {count} tokens"
        for cost in (plan.costs.stages if plan.costs else {}).values()
        for name, (label, count) in cost.media.items()
    }
    return [
        "every sample has the given tokens, one medium of each modality among them"
        + (f" ({'; '.join(f'{name}: {text}' for name, text in media.items())})" if media else "")
        + f"; {setting.supervised:.0%} of the others are supervised",
        "memory is that of torch's tensors; a GPU's driver, libraries and fragmentation take 0.5 to 2 GB beside it",
        f"{setting.device}: {setting.machine.source}",
    ]
