"""What a configuration amounts to, before anything is downloaded or trained: parts, memory, time, disk, licences."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mmllm.config.base import BuildContext
from mmllm.config.contradictions import with_lengths
from mmllm.config.run import RunConfig
from mmllm.errors import ConfigError
from mmllm.plan.hub import Source, sources
from mmllm.plan.measure import Costs, measure
from mmllm.plan.parts import EXAMPLES, InputPlan, OutputPlan, Parts, StagePlan, count_parts
from mmllm.plan.setting import DEVICES, SHARDINGS, Setting
from mmllm.plan.text import render

__all__ = [
    "DEVICES",
    "EXAMPLES",
    "SHARDINGS",
    "InputPlan",
    "OutputPlan",
    "Plan",
    "Setting",
    "StagePlan",
    "make_plan",
    "render",
]


@dataclass(frozen=True)
class Plan(Parts):
    """The parts, the ``setting`` that the rest holds for, where the weights come from, and what a run costs (None when that
    was not asked for).
    """

    setting: Setting = field(default_factory=Setting)
    sources: tuple[Source, ...] = ()
    costs: Costs | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(config: RunConfig, context: BuildContext, setting: Setting | None = None, *, costs: bool = False) -> Plan:
    """Build the model on the meta device and count; with ``costs`` also rehearse every stage without memory (seconds for
    a 7B model). Raises ``ConfigError`` with every contradiction found.
    """
    setting = setting or Setting()
    parts = count_parts(config, context)
    if problems := _unfit(config, setting):
        raise ConfigError(problems)
    offline = BuildContext(weights=False, root=context.root, trust_remote_code=context.trust_remote_code)
    found = measure(with_lengths(config, offline), offline, setting) if costs else None
    files = tuple(sources(config.model, offline, parts.parameters))
    return Plan(**vars(parts), setting=setting, sources=files, costs=found)


def _unfit(config: RunConfig, setting: Setting) -> list[tuple[str, str]]:
    """What the setting's devices cannot do for the configuration."""
    problems = [
        (
            f"stages.{index}.batch_size",
            f"{stage.batch_size} samples for {setting.devices} devices leave some without any; raise it, or take fewer",
        )
        for index, stage in enumerate(config.stages)
        if stage.batch_size < setting.devices
    ]
    if config.precision == "fp16" and setting.machine.kind == "cpu":
        problems.append(("precision", "fp16 needs a GPU; use bf16 or fp32 on the CPU"))
    return problems
