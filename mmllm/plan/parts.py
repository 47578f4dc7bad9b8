"""The parts of a configuration, before anything is downloaded or trained: built on the meta device and counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmllm.config.base import BuildContext, problems_at
from mmllm.config.contradictions import contradictions, matching, rate, with_lengths
from mmllm.config.families import outputs_of
from mmllm.config.pieces import select
from mmllm.config.run import InputConfig, OutputConfig, RunConfig, StageConfig
from mmllm.errors import ConfigError, MediaError


@dataclass(frozen=True)
class InputPlan:
    """One modality's way in. ``tokens`` maps an example input to the backbone tokens it takes."""

    encoder: str
    projector: str
    feature_dim: int
    tokens: dict[str, int]


@dataclass(frozen=True)
class OutputPlan:
    """One modality's way out. A medium takes ``signal_tokens`` tokens of a sequence, and the output ``rows`` new ones of the
    table. ``condition`` maps the streams of the generator's condition to (L, D); a generator of codes has neither that nor
    a projector.
    """

    projector: str | None
    generator: str
    signal_tokens: int
    rows: int
    condition: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class StagePlan:
    name: str
    trainable: int
    parts: dict[str, int]
    lr: dict[str, float]


@dataclass(frozen=True)
class Parts:
    """``parameters`` counts every part; ``hidden_dim`` is the backbone's width, which all projectors end in.
    ``quantized_bytes`` is the memory of a quantised backbone's frozen weights, scales and what stays as it is included; None
    for others.
    """

    hidden_dim: int
    vocab_rows: int
    inputs: dict[str, InputPlan]
    outputs: dict[str, OutputPlan]
    parameters: dict[str, int]
    total: int
    stages: list[StagePlan]
    quantized_bytes: int | None = None


def count_parts(config: RunConfig, context: BuildContext) -> Parts:
    """Build the model on the meta device and count. Raises ``ConfigError`` with every contradiction found."""
    import torch

    from mmllm.model import MultimodalLM

    offline = BuildContext(weights=False, root=context.root, trust_remote_code=context.trust_remote_code)
    config = with_lengths(config, offline)
    problems: list[tuple[str, str]] = []
    tokens = {
        name: _tokens(f"model.inputs.{name}", part, offline, problems) for name, part in config.model.inputs.items()
    }
    try:
        with torch.device("meta"):  # quantised weights are packed, so they could not be counted
            plain = config.model.backbone.model_copy(update={"quantize": None})
            model = MultimodalLM.from_config(config.model.model_copy(update={"backbone": plain}), offline)
    except ConfigError as error:
        problems += error.problems
    if not problems:
        written = {
            name: {"as the assistant writes it": len(part.generator.tokens(offline, part.signal_tokens).places)}
            for name, part in config.model.outputs.items()
        }
        problems += (
            contradictions(config, offline, model.parts()) + _too_long(config, tokens) + _too_long(config, written)
        )
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))  # a size that does not fit is met by preprocessor and encoder
    inputs = {
        name: InputPlan(part.encoder.kind, part.projector.kind, model.inputs[name].encoder.output_dim, tokens[name])  # type: ignore[union-attr, arg-type]
        for name, part in config.model.inputs.items()
    }
    sizes = {name: {key: p.numel() for key, p in part.items()} for name, part in model.parts().items()}
    parameters = {name: sum(part.values()) for name, part in sizes.items()}
    outputs = {name: _output_plan(part, offline) for name, part in config.model.outputs.items()}
    stages = [_stage_plan(stage, sizes) for stage in config.stages]
    backbone, total = model.backbone, sum(parameters.values())
    memory = _quantized_bytes(config, offline)
    return Parts(backbone.hidden_dim, backbone.vocab_rows, inputs, outputs, parameters, total, stages, memory)


def _quantized_bytes(config: RunConfig, context: BuildContext) -> int | None:
    """The bytes of the weights of a quantised backbone, as a run keeps them: matrices in its precision, vectors in float32."""
    import torch

    if config.model.backbone.quantize is None:
        return None
    bare = config.model.backbone.model_copy(update={"adapter": None})
    with torch.device("meta"):
        backbone = bare.build(context, num_new_tokens=0)
    matrix = 4 if config.precision == "fp32" else 2
    sizes = (
        (matrix if p.ndim >= 2 else 4) if p.is_floating_point() else p.element_size() for p in backbone.parameters()
    )
    return sum(p.numel() * size for p, size in zip(backbone.parameters(), sizes, strict=True))


def _output_plan(part: OutputConfig, context: BuildContext) -> OutputPlan:
    group = part.generator.tokens(context, part.signal_tokens)
    projector = None if part.projector is None else part.projector.kind
    shape = part.generator.condition_shape(context)
    return OutputPlan(projector, part.generator.kind, len(group.places), group.rows, shape)


def _picture(width: int, height: int) -> Any:
    from PIL import Image

    return Image.new("RGB", (width, height))


def _clip(options: dict[str, Any]) -> Any:
    return [_picture(640, 360)] * (options["frames"] * options.get("clips", 1))


def _sound(seconds: float, rate: int) -> Any:
    import numpy as np

    return np.zeros(int(seconds * rate), dtype=np.float32)


def _points(count: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).random((count, 6), dtype=np.float32)


# Example inputs per kind of media: what one would ask the plan about.
EXAMPLES: dict[str, dict[str, Callable[[dict[str, Any]], Any]]] = {
    "image": {"512x512": lambda _: _picture(512, 512), "1600x400": lambda _: _picture(1600, 400)},
    "audio": {
        "1 s": lambda options: _sound(1, options["sample_rate"]),
        "30 s": lambda options: _sound(30, options["sample_rate"]),
        "90 s": lambda options: _sound(90, options["sample_rate"]),
    },
    "video": {"640x360": _clip},
    "point_cloud": {"any": lambda options: _points(options["points"])},
    "text": {"a sentence": lambda _: "A dog lies on the grass."},
    "imu": {"2000 samples": lambda _: [[0.0] * 2000] * 6},
}


def _tokens(path: str, part: InputConfig, context: BuildContext, problems: list[tuple[str, str]]) -> dict[str, int]:
    """Backbone tokens that each example takes. What is refused is added to ``problems``."""
    tokens: dict[str, int] = {}
    with problems_at(f"{path}.encoder", problems, context):
        preprocessor = part.encoder.preprocessor(context)
        for label, make in EXAMPLES[preprocessor.media].items():
            try:
                item = preprocessor(make(preprocessor.decode_options))
            except MediaError as error:  # longer than this encoder takes; the plan shows what it does take
                refusal = error
                continue
            with problems_at(f"{path}.projector", problems, context):
                taken = 0 if part.fusion else outputs_of(part.projector, preprocessor, item)[0]
                tokens[label] = taken + 2 * part.markers
        if not tokens:
            raise refusal
    return tokens


def _too_long(config: RunConfig, tokens: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str]]:
    problems = []
    for index, stage in enumerate(config.stages):
        for name, examples in tokens.items():
            label, smallest = min(examples.items(), key=lambda item: item[1])
            if smallest >= stage.max_length:
                text = (
                    f"{stage.max_length} tokens, but one {name} ({label}) takes {smallest}; raise max_length "
                    "or choose a projector with fewer outputs"
                )
                problems.append((f"stages.{index}.max_length", text))
    return problems


def _stage_plan(stage: StageConfig, sizes: Mapping[str, Mapping[str, int]]) -> StagePlan:
    """``sizes`` are the numbers of elements of the model's parameters, by part."""
    parts = {name: sum(select(sizes, name).values()) for name in matching(stage.train, sizes)}
    return StagePlan(stage.name, sum(parts.values()), parts, {name: rate(stage, name) for name in parts})
