"""What a configuration's parts and stages say against each other: found by numbers and names, before anything is trained.

``mmllm plan`` and training ask the same function, so what one accepts the other does as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from mmllm.config.base import BuildContext, problems_at, suggest
from mmllm.config.run import RunConfig, StageConfig

Problems = list[tuple[str, str]]


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names, in their order, that a shell-style pattern fits. Generators stay frozen: no pattern means them."""
    patterns = list(patterns)
    return [name for name in _trainable(names) if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _trainable(names: Iterable[str]) -> list[str]:
    return [name for name in names if not (name.startswith("outputs.") and name.endswith(".generator"))]


def rate(stage: StageConfig, part: str) -> float:
    """The peak learning rate of a trained part: the first pattern of ``part_lr`` that fits counts, else ``lr``."""
    return next((lr for pattern, lr in stage.part_lr.items() if fnmatchcase(part, pattern)), stage.lr)


def pattern_problems(where: str, train: Iterable[str], part_lr: Iterable[str], names: Collection[str]) -> Problems:
    """Patterns of a stage's ``train`` that fit none of the parts ``names``, and of ``part_lr`` that fit no trained one.

    ``where`` is the stage's dotted path.
    """
    train, names = list(train), _trainable(names)
    trained = matching(train, names)
    problems = [
        (
            f"{where}.train.{i}",
            f"{pattern!r} matches no part{suggest(pattern, names)}; the parts are {', '.join(names)}",
        )
        for i, pattern in enumerate(train)
        if not matching([pattern], names)
    ]
    # With nothing trained the mistake is in `train`, and is told above.
    return problems + [
        (
            f"{where}.part_lr.{pattern}",
            f"{pattern!r} matches no trained part{suggest(pattern, trained)}; trained are {', '.join(trained)}",
        )
        for pattern in part_lr
        if trained and not matching([pattern], trained)
    ]


def with_lengths(config: RunConfig, context: BuildContext) -> RunConfig:
    """``config`` with the backbone's positions as ``max_length`` of the stages that name none and would get more."""
    positions = None
    with problems_at("model.backbone", [], context):  # what the backbone refuses is told where it is built
        positions = config.model.backbone.max_positions(context)
    stages = [
        stage
        if positions is None or "max_length" in stage.model_fields_set or stage.max_length <= positions
        else stage.model_copy(update={"max_length": positions})
        for stage in config.stages
    ]
    return config.model_copy(update={"stages": stages})


def contradictions(config: RunConfig, context: BuildContext, names: Collection[str]) -> Problems:
    """``(dotted path, message)`` of everything in ``config`` that cannot go together; ``names`` are the model's parts.

    What is in files that ``context`` does not allow to read (a hub's tokenizer, in a plan) is left out.
    """
    problems: Problems = []
    backbone, tokens, rows, positions = config.model.backbone, None, 0, None
    with problems_at("model.backbone", problems, context):
        tokens, rows = backbone.num_tokens(context), backbone.vocab_rows(context)
        positions = backbone.max_positions(context)
    if tokens is not None and tokens > rows:
        problems.append(
            (
                "model.backbone",
                f"the tokenizer has {tokens} tokens, but the embedding table only {rows} rows; correct `vocab_size` or "
                "the tokenizer",
            )
        )
    for index, stage in enumerate(config.stages):
        where = f"stages.{index}"
        problems += pattern_problems(where, stage.train, stage.part_lr, names)
        if stage.micro_batch_size > stage.batch_size:
            text = f"{stage.micro_batch_size} is more than batch_size {stage.batch_size}"
            problems.append((f"{where}.micro_batch_size", text))
        if positions is not None and stage.max_length > positions:
            text = f"{stage.max_length} tokens, but the backbone has {positions} positions; lower max_length to that"
            problems.append((f"{where}.max_length", text))
    return problems
