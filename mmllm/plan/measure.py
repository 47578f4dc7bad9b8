"""Every stage of a configuration rehearsed on fake tensors: memory, operations, time, disk."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from mmllm.config.base import BuildContext
from mmllm.config.contradictions import matching
from mmllm.config.run import RunConfig, StageConfig
from mmllm.errors import MediaError, MmllmError, brief
from mmllm.plan.batches import Medium, make_batch, modalities, usual_medium
from mmllm.plan.hub import generator_parameters
from mmllm.plan.memory import MOMENTS, Memory, Sizes, Traffic, sizes, stage_memory, step_traffic
from mmllm.plan.setting import Setting

if TYPE_CHECKING:
    from mmllm.model import MultimodalLM
    from mmllm.plan.simulate import Footprint, Rehearsal


@dataclass(frozen=True)
class StageCost:
    """One stage on one device. ``length`` tokens a sample, of which ``media`` says how many each modality's medium takes
    (``{"image": ("512x512", 576)}``).

    ``flops`` are those of an optimizer step over all devices, ``forward_flops`` the forward passes' share by part;
    ``tokens`` are read in it. ``steps`` is None where neither `max_steps` nor the data tell, and then ``hours`` too;
    ``step_seconds`` is at the setting's utilisation. ``checkpoint`` is the size on disk of one checkpoint to resume from,
    ``traffic`` what a device exchanges with the others in an optimizer step.
    """

    memory: Memory
    micro_batch_size: int
    length: int
    media: dict[str, tuple[str, int]]
    tokens: int
    flops: int
    forward_flops: dict[str, int]
    step_seconds: float
    steps: int | None
    hours: float | None
    checkpoint: int
    traffic: Traffic


@dataclass(frozen=True)
class Inference:
    """Talking to the model: bytes of ``weights`` in half precision (float32 with ``precision: fp32``), of the ``cache`` of one
    conversation of ``length`` tokens, and the ``peak`` with weights while it is read.
    """

    length: int
    weights: int
    cache: int
    peak: int


@dataclass(frozen=True)
class Costs:
    """``stages`` by name. ``disk`` is what a run's checkpoints and its final model take at most. ``notes`` say what is not
    counted.
    """

    stages: dict[str, StageCost]
    inference: Inference | None
    disk: int
    notes: list[str]


# Steps rehearsed before, by all that they depend on: stages that differ in their rates alone need the same.
Seen = dict[str, "Footprint"]


def measure(
    config: RunConfig, context: BuildContext, setting: Setting, *, inference: bool = True, seen: Seen | None = None
) -> Costs:
    """The costs of ``config``, which has no contradictions. ``context`` is one without weights; ``seen`` is filled, and used
    by a later call.
    """
    import torch

    from mmllm.model import MultimodalLM
    from mmllm.plan.simulate import Rehearsal
    from mmllm.training.stages import set_dtypes

    with torch.device("meta"):
        model = MultimodalLM.from_config(config.model, context)
    patterns = chain.from_iterable(stage.train for stage in config.stages)
    set_dtypes(model, matching(patterns, model.parts()), config.precision)
    if config.short_cuts:
        model.backbone.take_short_cuts()
    shapes = {name: output.generator.condition_shape(context) for name, output in config.model.outputs.items()}
    rehearsal = Rehearsal(model, shapes)
    notes: list[str] = []
    absent = _absent_generators(config, context, model, notes)
    media = _media(config, context, notes)
    notes += [
        f"stage {stage.name}: the features that processes exchange for `itm` are not counted"
        for stage in config.stages
        if setting.devices > 1 and "itm" in stage.objectives
    ]
    if rehearsal.stepwise:
        notes.append(
            "backbone: the scan as transformers' own code does it, which keeps a state for every token; with mamba_ssm's "
            "kernels on a GPU a step needs far less memory and time"
        )
    stages: dict[str, StageCost] = {}
    trained: dict[str, int] = {}  # bytes by parameter
    seen = {} if seen is None else seen
    for stage in config.stages:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # transformers', about names: not the reader's business
                stages[stage.name] = _stage(config, stage, context, setting, rehearsal, media, absent, trained, seen)
        except Exception as error:
            notes.append(_unrehearsed(f"stage {stage.name}", error))
    talk = None
    if inference:
        try:
            talk = _inference(config, context, setting, rehearsal, media, absent)
        except Exception as error:
            notes.append(_unrehearsed("inference", error))
    kept = max((cost.checkpoint for cost in stages.values()), default=0)
    disk = config.keep_last * kept + sum(trained.values())
    return Costs(stages, talk, disk, notes)


def _unrehearsed(what: str, error: Exception) -> str:
    """The note that ``what`` could not be rehearsed, where that lies in the nature of fake tensors. Raises all other errors."""
    from mmllm.plan.simulate import is_unknowable

    if not is_unknowable(error):
        error.add_note(f"(while {what} was rehearsed; `mmllm plan --quick` leaves the rehearsal out)")
        raise error
    return f"{what} could not be rehearsed: {brief(error, 160)}"


def _stage(
    config: RunConfig,
    stage: StageConfig,
    context: BuildContext,
    setting: Setting,
    rehearsal: Rehearsal,
    media: Mapping[str, Medium],
    absent: Mapping[str, Sizes],
    trained: dict[str, int],
    seen: Seen,
) -> StageCost:
    from mmllm.training.stages import freeze, resolve

    model = rehearsal.model
    parts = resolve(stage, model.parts())
    freeze(model, parts, gradient_checkpointing=stage.gradient_checkpointing)
    length = min(setting.length or stage.max_length, stage.max_length)
    present = {name: media[name] for name in modalities(config.model, stage, model.parts()) if name in media}
    batch = make_batch(config.model, stage, context, present, length=length, supervised=setting.supervised)
    per_device = -(-stage.batch_size // setting.devices)
    rounds = -(-per_device // stage.micro_batch_size)
    objectives: dict[str, float] = {name: weight for name, weight in stage.objectives.items() if name != "denoise"}
    kept = [one.train for one in config.stages]  # what any of them trains is float32 in all
    system = [
        config.model.model_dump_json(),
        config.precision,
        kept,
        [part.name for part in parts],
        sorted(batch.media),
    ]
    shape = [stage.gradient_checkpointing, stage.micro_batch_size, length, setting.supervised, objectives, rounds > 1]
    key = repr((system, shape))
    if key not in seen:
        seen[key] = rehearsal.step(batch, objectives, config.precision, accumulating=rounds > 1)
    footprint = seen[key]
    if stage.gradient_checkpointing:
        model.backbone.model.gradient_checkpointing_disable()  # type: ignore[operator]
    parts_sizes = {**sizes(model.parts()), **absent}
    memory = stage_memory(parts_sizes, footprint, setting)
    share = stage.batch_size / stage.micro_batch_size  # of a global batch to a micro-batch
    machine = setting.machine
    peak = machine.full if config.precision == "fp32" else machine.half
    seconds = footprint.flops * share / setting.devices / (peak * setting.utilisation)
    steps = number_of_steps(config, stage, context, setting)
    learned = {key: p.numel() * p.element_size() for part in parts for key, p in part.parameters.items()}
    trained |= learned
    return StageCost(
        memory,
        stage.micro_batch_size,
        length,
        {name: (media[name][0], media[name][2]) for name in batch.media},
        stage.batch_size * length,
        round(footprint.flops * share),
        {name: round(count * share) for name, count in footprint.forward.items()},
        seconds,
        steps,
        None if steps is None else steps * seconds / 3600,
        sum(trained.values()) + MOMENTS * sum(learned.values()),
        step_traffic(parts_sizes, setting, rounds),
    )


def number_of_steps(config: RunConfig, stage: StageConfig, context: BuildContext, setting: Setting) -> int | None:
    """Optimizer steps of a stage; None when they depend on data that are not there and ``setting.samples`` is not given."""
    from mmllm.data.dataset import open_stage
    from mmllm.processing.processor import Processor
    from mmllm.training.batches import epoch_ends

    if stage.max_steps is not None and stage.epochs is None:
        return stage.max_steps
    epochs = stage.epochs or 1.0
    steps = None if setting.samples is None else round(epochs * setting.samples / stage.batch_size + 0.4999)
    if steps is None:
        try:
            processor = None if stage.mixture == "rows" else Processor.from_config(config.model, context)
            steps = epoch_ends(open_stage(stage, config.seed, context, processor), stage)[-1]
        except (MmllmError, OSError):
            return stage.max_steps
    return steps if stage.max_steps is None else min(steps, stage.max_steps)


def _media(config: RunConfig, context: BuildContext, notes: list[str]) -> dict[str, Medium]:
    found = {}
    for name, part in config.model.inputs.items():
        try:
            found[name] = usual_medium(part, context)
        except MediaError as error:
            notes.append(f"inputs.{name}: {brief(error, 160)}; its media are not counted")
    return found


def _absent_generators(
    config: RunConfig, context: BuildContext, model: MultimodalLM, notes: list[str]
) -> dict[str, Sizes]:
    """The generators that a plan does not build: their weights, as far as the table knows them."""
    width, found = 4 if config.precision == "fp32" else 2, {}
    for name, output in config.model.outputs.items():
        part = f"outputs.{name}.generator"
        if part in model.parts():
            continue
        reference = str(output.generator.model_dump(mode="json").get("pretrained"))
        count = generator_parameters(reference, context)
        if count is None:
            notes.append(f"{part}: the size of {reference} is not known, its weights are not counted")
        else:
            found[part] = Sizes(count * width, 0, 0, count * width, 0)
    if any("denoise" in stage.objectives for stage in config.stages):
        notes.append("the objective `denoise`: the generator's own passes are not counted")
    return found


def _inference(
    config: RunConfig,
    context: BuildContext,
    setting: Setting,
    rehearsal: Rehearsal,
    media: Mapping[str, Medium],
    absent: Mapping[str, Sizes],
) -> Inference | None:
    import torch

    from mmllm.training.stages import HALF

    longest = max((stage.max_length for stage in config.stages), default=2048)
    length = setting.context or longest
    dtype = HALF.get(config.precision, torch.float32)
    rehearsal.cast(dtype)
    one = StageConfig.model_construct(
        name="talk", train=[], lr=1.0, data=[], micro_batch_size=1, objectives={"text": 1.0}
    )
    batch = make_batch(config.model, one, context, media, length=length, supervised=1.0)
    cache, peak = rehearsal.prefill(batch, dtype)
    weights = sum(p.numel() * p.element_size() for p in rehearsal.model.parameters())
    weights += sum(one.weights for one in absent.values())
    return Inference(length, weights, cache, weights + peak)
