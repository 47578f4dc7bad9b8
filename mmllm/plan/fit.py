"""Settings of a configuration that fit a device's memory, those that cost least quality first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from mmllm.config.base import BuildContext
from mmllm.config.contradictions import matching, with_lengths
from mmllm.config.load import override
from mmllm.config.run import RunConfig
from mmllm.errors import ConfigError
from mmllm.plan.measure import Costs, Seen, StageCost, measure
from mmllm.plan.parts import count_parts
from mmllm.plan.setting import GB, Setting
from mmllm.plan.text import duration, size

UNITS = {"MB": 1e6, "GB": GB, "TB": 1e12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# What driver, libraries and fragmentation take of a GPU, beside torch's tensors: a GB, and a part of it.
RESERVE, LOST = 1 * GB, 0.05
# LoRA's rate over that of all weights: LLaVA-1.5's own scripts (finetune.sh 2e-5, finetune_lora.sh 2e-4, projector 2e-5).
LORA_RATE = 10


@dataclass(frozen=True)
class Proposal:
    """``overrides`` are dotted ones for the command line, ``peak`` the bytes of the stage that needs most on each of the
    ``setting``'s devices, ``hours`` the time of all stages (None where their steps are not known). ``cost`` says what is paid.
    """

    cost: str
    overrides: list[str]
    setting: Setting
    peak: int
    step_seconds: float
    hours: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_size(text: str) -> float:
    """``24GB`` in bytes. Raises ``ConfigError``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip(), re.IGNORECASE)
    if found is None or found[2].upper() not in UNITS:
        raise ConfigError([("--fit", f"{text!r}; expected a size such as 24GB")])
    return float(found[1]) * UNITS[found[2].upper()]


def fit(config: RunConfig, context: BuildContext, setting: Setting, memory: float) -> list[Proposal]:
    """Up to three proposals with which every stage of ``config`` fits devices of ``memory`` bytes, the best first: the
    first step of the ladder that fits (see ``ladder``), and the next ones that need less or train faster.

    Empty when nothing fits. Raises ``ConfigError`` for a configuration with contradictions.
    """
    limit = (memory - RESERVE) * (1 - LOST) if setting.machine.kind == "cuda" else memory
    count_parts(config, context)
    offline = BuildContext(weights=False, root=context.root, trust_remote_code=context.trust_remote_code)
    config = with_lengths(config, offline)
    found: list[Proposal] = []
    seen: Seen = {}
    for cost, overrides, where in ladder(config, context, setting):
        proposal = _largest_batches(config, offline, where, overrides, cost, limit, seen)
        if proposal is not None and all(_better(proposal, other) for other in found):
            found.append(proposal)
        if len(found) == 3 or (found and not overrides):
            break
    return found


def _better(new: Proposal, old: Proposal) -> bool:
    return new.peak < 0.9 * old.peak or new.step_seconds < 0.9 * old.step_seconds


def ladder(config: RunConfig, context: BuildContext, setting: Setting) -> Iterator[tuple[str, list[str], Setting]]:
    """Ways to need less, each with all before it: ``(what it costs, overrides, setting)``. What only costs time comes before
    what changes what is learned. (Smaller micro-batches are tried on each step; the batch stays what it is.)
    """
    overrides: list[str] = []
    yield "nothing but smaller micro-batches", list(overrides), setting
    checkpointed = [
        f"stages.{stage.name}.gradient_checkpointing=true"
        for stage in config.stages
        if not stage.gradient_checkpointing
    ]
    adapter = config.model.backbone.adapter
    if checkpointed and (adapter is None or adapter.checkpointing):
        overrides += checkpointed
        yield "time: layers are computed again for the backward pass", list(overrides), setting
    if setting.devices > 1 and setting.sharding in ("none", "ddp"):  # what `train` can do of it
        setting = replace(setting, sharding="fsdp")
        yield f"time: fsdp shares the state out over {setting.devices} devices", list(overrides), setting
    if config.precision == "fp32":
        overrides.append("precision=bf16")
        yield "precision: frozen weights and products in bf16", list(overrides), setting
    whole = [stage for stage in config.stages if matching(stage.train, ["backbone"]) == ["backbone"]]
    if whole and adapter is None:
        overrides.append("model.backbone.adapter={kind: lora, rank: 64, alpha: 128}")
        for stage in whole:
            train = [pattern for pattern in stage.train if pattern not in ("backbone", "backbone*")]
            overrides.append(f"stages.{stage.name}.train=[{', '.join([*train, 'backbone.adapter'])}]")
            own = [rate for pattern, rate in stage.part_lr.items() if matching([pattern], ["backbone"])]
            rates = {"backbone.adapter": LORA_RATE * (own[0] if own else stage.lr)}
            rates |= {pattern: rate for pattern, rate in stage.part_lr.items() if matching([pattern], train)}
            overrides.append(f"stages.{stage.name}.part_lr={{{', '.join(f'{k}: {v:.6g}' for k, v in rates.items())}}}")
        text = f"quality: LoRA instead of the whole backbone, at {LORA_RATE} times its rate"
        yield text, list(overrides), setting
    if config.model.backbone.quantize is None:
        for bits in (8, 4):
            last = [*overrides, f"model.backbone.quantize.bits={bits}"]
            yield f"quality: the frozen backbone in {bits} bits", last, setting


def _largest_batches(
    config: RunConfig,
    context: BuildContext,
    setting: Setting,
    overrides: list[str],
    cost: str,
    limit: float,
    seen: Seen,
) -> Proposal | None:
    """The proposal with the largest micro-batches, powers of two below the configuration's own, that fit ``limit``. None
    without any, and when the overrides contradict the rest of the configuration (layers that are trained and quantised).
    """
    try:
        changed = override(config, overrides)
        count_parts(changed, context)
    except ConfigError:
        return None
    sizes = {stage.name: stage.micro_batch_size for stage in changed.stages}
    costs = _costs(changed, context, setting, seen)
    for _ in range(8):
        large = [name for name, one in costs.stages.items() if one.memory.peak > limit]
        if not large:
            break
        # The update does not get smaller with the micro-batches, nor does what is not of activations.
        if any(sizes[name] == 1 or _fixed(costs.stages[name]) > limit for name in large):
            return None
        for name in large:
            sizes[name] = _guess(costs, name, limit)
        batches = [f"stages.{name}.micro_batch_size={number}" for name, number in sizes.items()]
        changed = override(config, [*overrides, *batches])
        costs = _costs(changed, context, setting, seen)
    else:
        return None
    own = {stage.name: stage.micro_batch_size for stage in config.stages}
    smaller = [f"stages.{name}.micro_batch_size={number}" for name, number in sizes.items() if number != own[name]]
    hours = [one.hours for one in costs.stages.values()]
    return Proposal(
        cost if overrides or smaller or setting.sharding != "none" else "nothing: it fits as it is",
        [*overrides, *smaller],
        setting,
        max(one.memory.peak for one in costs.stages.values()),
        sum(one.step_seconds for one in costs.stages.values()),
        None if None in hours else sum(hour for hour in hours if hour is not None),
    )


def _fixed(cost: StageCost) -> int:
    """The part of a stage's peak that is there whatever the micro-batch."""
    moving = 0 if cost.memory.when == "update" else sum(cost.memory.activations.values())
    return cost.memory.peak - moving


def _guess(costs: Costs, name: str, limit: float) -> int:
    """A smaller micro-batch for a stage: activations grow with it, the rest does not. Powers of two, at most half."""
    one = costs.stages[name]
    share = (limit - _fixed(one)) / max(one.memory.peak - _fixed(one), 1)
    number = one.micro_batch_size // 2
    power: int = 1 << (max(1, number).bit_length() - 1)
    while power > 1 and power > share * one.micro_batch_size:
        power //= 2
    return power


def _costs(config: RunConfig, context: BuildContext, setting: Setting, seen: Seen) -> Costs:
    costs = measure(config, context, setting, inference=False, seen=seen)
    missing = [note for note in costs.notes if note.startswith("stage ")]
    if missing or not costs.stages:
        raise ConfigError([("--fit", "; ".join(missing) or "no stage to fit; the configuration has none")])
    return costs


def render_fit(proposals: list[Proposal], setting: Setting, memory: str) -> str:
    """The proposals as text for a terminal."""
    if not proposals:
        return (
            f"nothing found that fits {memory} with {setting.devices} device(s): more of them (--devices 8 --sharding fsdp), "
            "shorter samples (stages.<name>.max_length=…) or a smaller backbone would need less"
        )
    blocks = []
    for number, one in enumerate(proposals, start=1):
        shared = (
            "" if one.setting.devices == 1 else f" on each of {one.setting.devices} devices, {one.setting.sharding}"
        )
        hours = "" if one.hours is None else f", {duration(one.hours * 3600)} in all"
        lines = [
            f"{number}. {one.cost}",
            f"   peak {size(one.peak)}{shared}; a step {duration(one.step_seconds)}{hours}",
        ]
        quoted = (f'"{word}"' if " " in word or "[" in word else word for word in one.overrides)
        lines += [f"   {word} \\" for word in quoted]
        blocks.append("\n".join(lines).removesuffix(" \\"))
    left = f"{RESERVE / GB:.0f} GB and {LOST:.0%} are left to driver and allocator; " * (setting.machine.kind == "cuda")
    title = f"fits {memory} ({left}times are those of {setting.device}, --device names another)"
    return "\n\n".join([title, *blocks])
