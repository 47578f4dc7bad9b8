"""A batch as a stage would see it, made from the configuration alone: no tokenizer, no data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from mmllm.config.base import BuildContext
from mmllm.config.contradictions import matching
from mmllm.config.families import outputs_of
from mmllm.config.run import ALIGNING, PROMPTING, InputConfig, ModelConfig, StageConfig
from mmllm.errors import MediaError
from mmllm.plan.parts import EXAMPLES

if TYPE_CHECKING:
    from torch import Tensor

    from mmllm.config.alignment import CaptionConfig
    from mmllm.processing.batch import Batch, CaptionBatch, MadeBatch

# The example that stands for a usual medium, where an encoder takes it; else its first one.
USUAL = ("512x512", "30 s", "640x360")
# Its label, what the preprocessor makes of it, its tokens, and how its features lie, where the projector asks for that.
Medium = tuple[str, "dict[str, Tensor]", int, "tuple[int, ...] | None"]


def usual_medium(part: InputConfig, context: BuildContext) -> Medium:
    """The usual medium of an input. Raises ``MediaError`` when the encoder takes none of the examples."""
    preprocessor = part.encoder.preprocessor(context)
    examples = EXAMPLES[preprocessor.media]
    refusal: MediaError | None = None
    for label in sorted(examples, key=lambda name: name not in USUAL):
        try:
            item = preprocessor(examples[label](preprocessor.decode_options))
        except MediaError as error:
            refusal = error
            continue
        return label, item, *outputs_of(part.projector, preprocessor, item)
    raise refusal or MediaError(f"no example of {preprocessor.media!r}")


def modalities(config: ModelConfig, stage: StageConfig, parts: Collection[str]) -> list[str]:
    """The inputs that the data of a stage hold, as far as its configuration tells: none where it learns from sentences alone,
    else those it trains, or else all.
    """
    if set(stage.objectives) <= set(PROMPTING):
        return []
    trained = {name.split(".")[1] for name in matching(stage.train, parts) if name.startswith("inputs.")}
    return [name for name in config.inputs if name in trained] or list(config.inputs)


def make_batch(
    config: ModelConfig,
    stage: StageConfig,
    context: BuildContext,
    media: Mapping[str, Medium],
    *,
    length: int,
    supervised: float,
) -> Batch:
    """``stage.micro_batch_size`` samples of ``length`` tokens: in front one of each of ``media`` that still fits, then text, and
    one medium of every output at the end where an objective is about it. Captions and sentences are as long as the parts that
    read them allow. Tensors of fractions are on the meta device.
    """
    import torch

    from mmllm.processing.batch import Batch, MediaBatch

    rows = stage.micro_batch_size
    starts = torch.arange(rows)[:, None] * length
    ids = torch.zeros(rows, length, dtype=torch.int64)
    kept: dict[str, MediaBatch] = {}
    made = _made(config, stage, context, media, starts, length)
    room = length - 1 - sum(one.positions.shape[1] for one in made.values())
    used = 0
    for name, (_, item, count, layout) in media.items():
        part = config.inputs[name]
        taken = 0 if part.fusion else count  # what is seen inside the backbone takes none of its positions
        if used + taken > room:
            continue
        positions = (starts + torch.arange(used, used + taken)).flatten()
        collated = part.encoder.preprocessor(context).collate([item] * rows)
        layouts = None if layout is None else torch.tensor([layout] * rows)
        fused = torch.tensor([[row, used, count] for row in range(rows)]) if part.fusion else None
        kept[name] = MediaBatch(_shapes(collated), positions, torch.arange(rows * taken), count, layouts, fused)
        used += taken
    share = max(1, round(supervised * (length - 1 - used)))
    predict = (starts + torch.arange(length - 1 - share, length - 1)).flatten()
    replies = torch.tensor([[row, length - share, length] for row in range(rows)])
    if not {"text", "reconstruction"} & set(stage.objectives):
        predict = predict[:0]
    batch = Batch(ids, torch.ones_like(ids), predict, torch.zeros_like(predict), kept, made=made, replies=replies)
    for name, part in config.inputs.items():
        if part.alignment is not None and name in kept and set(ALIGNING) & set(stage.objectives):
            batch.captions[name] = _captions(part.alignment, rows)
        if part.prompt is not None and name in kept and "alignment" in stage.objectives:
            batch.prompted[name] = _captions(part.prompt, rows)
        if part.prompt is not None and set(PROMPTING) & set(stage.objectives):
            batch.sentences[name] = _captions(part.prompt, rows)
    return batch


def _captions(config: CaptionConfig, rows: int) -> CaptionBatch:
    import torch

    from mmllm.processing.batch import CaptionBatch

    ids = torch.zeros(rows, config.max_length, dtype=torch.int64)
    return CaptionBatch(torch.arange(rows), ids, torch.ones_like(ids, dtype=torch.bool), unknown=0)


def _made(
    config: ModelConfig,
    stage: StageConfig,
    context: BuildContext,
    media: Mapping[str, Medium],
    starts: Tensor,
    length: int,
) -> dict[str, MadeBatch]:
    import torch

    from mmllm.processing.batch import MadeBatch

    if not set(stage.objectives) - {"text"}:
        return {}
    rows, end, none = len(starts), length - 1, torch.zeros(0, dtype=torch.int64)
    all_rows = torch.arange(rows)
    made: dict[str, Any] = {}
    for name, output in config.outputs.items():
        if output.projector is None:
            continue
        count = len(output.generator.tokens(context, output.signal_tokens).places)
        positions, end = starts + torch.arange(end - count, end), end - count
        seen = None
        if "contrastive" in stage.objectives and output.retrieval is not None and name in media:
            encoder = config.inputs[name].encoder
            seen = _shapes(encoder.preprocessor(context).collate([media[name][1]] * rows))
        decided = all_rows if "decision" in stage.objectives and output.decision is not None else none
        shown = none if seen is None else all_rows
        told = "condition" in stage.objectives
        made[name] = MadeBatch(
            positions,
            captions=["a caption"] * rows if told else [],
            captioned=all_rows if told else none,
            targets=None,
            drawn=none,
            seen=seen,
            shown=shown,
            decided=decided,
            retrieved=torch.zeros_like(decided),
        )
    return made


def _shapes(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to("meta") if t.is_floating_point() else t for name, t in inputs.items()}
