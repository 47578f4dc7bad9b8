"""What a configuration's parts and stages say against each other: found by numbers and names, before anything is trained.

``mmllm plan`` and training ask the same function, so what one accepts the other does as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from mmllm.config import pieces
from mmllm.config.base import BuildContext, problems_at, suggest
from mmllm.config.run import PROMPTING, Objective, RunConfig, StageConfig

Problems = list[tuple[str, str]]


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The parts ``names``, in their order, that a shell-style pattern fits, and the pieces of others (``backbone.layers.0-3``,
    ``inputs.image.projector.modules.language_projection``) that a pattern asks for. Generators stay frozen: no pattern means them.
    """
    patterns = list(patterns)
    found: list[str] = []
    for name in _trainable(names):
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            found.append(name)
            continue
        asked = ((pattern, *pieces.split(pattern)) for pattern in patterns)
        found += [
            f"{name}{pattern.removeprefix(part)}"
            for pattern, part, piece in asked
            if piece is not None and fnmatchcase(name, part)
        ]
    return list(dict.fromkeys(found))


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


def _piece_problems(where: str, train: Iterable[str], parts: Mapping[str, Collection[str]]) -> Problems:
    """Pieces of a stage's ``train`` that ask for what is not there, or share parameters with another."""
    problems = []
    taken: dict[str, str] = {}
    for piece in matching(train, parts):
        part, asked = pieces.split(piece)
        found, modules = pieces.members(part, parts[part], asked), pieces.modules_of(part, parts[part])
        if isinstance(asked, range):
            known = sorted(set(pieces.layers_of(parts[part]).values()))
            absent = not asked or not set(asked) <= set(known)
            there = f"{part} has layers 0 to {known[-1]}" if known else f"{part} has no layers"
        elif isinstance(asked, frozenset) and (unknown := sorted(asked.difference(modules))):
            absent, there = True, f"{part} has no {', '.join(unknown)}, but {', '.join(modules)}"
        else:
            absent, there = not found, f"{part} has {', '.join(modules)}"
        if absent:
            problems.append((f"{where}.train", f"{piece!r}: {there}"))
        elif shared := {taken[name] for name in found if name in taken}:
            what = "layers" if isinstance(asked, range) else "parameters"
            problems.append(
                (f"{where}.train", f"{piece!r} shares {what} with {', '.join(sorted(shared))}; name each once")
            )
        taken |= dict.fromkeys(found, piece)
    return problems


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


# The objective that alone trains a part of an output.
TRAINED_BY: dict[str, Objective] = {"retrieval": "contrastive", "decision": "decision"}

# The objectives that alone train a part of an input.
TAUGHT_BY: dict[str, tuple[Objective, ...]] = {"alignment": ("itc", "itm", "itg"), "prompt": PROMPTING}


def _objective_problems(where: str, stage: StageConfig, names: Collection[str]) -> Problems:
    """Objectives without a part that they are about, and such parts trained without their objective."""
    problems = []
    trained = matching(stage.train, names)
    for part, objective in TRAINED_BY.items():
        own = [name for name in names if name.startswith("outputs.") and name.endswith(f".{part}")]
        if objective in stage.objectives and not own:
            text = f"no output has a {part} head; set model.outputs.<name>.{part}"
            problems.append((f"{where}.objectives.{objective}", text))
        if objective not in stage.objectives and (idle := [name for name in own if name in trained]):
            text = f"{', '.join(idle)}: learns from `{objective}` alone; add it to the objectives, or name other parts"
            problems.append((f"{where}.train", text))
    for part, by in TAUGHT_BY.items():
        own = [name for name in names if name.startswith("inputs.") and name.endswith(f".{part}")]
        # The projector is drawn to a prompt by `alignment`, which teaches the prompt itself nothing.
        for objective in (*by, *(("alignment",) if part == "prompt" else ())):
            if objective in stage.objectives and not own:
                text = f"no input has a part {part!r}; set model.inputs.<name>.{part}"
                problems.append((f"{where}.objectives.{objective}", text))
        idle = [name for name in trained if pieces.split(name)[0] in own]
        if idle and not any(objective in stage.objectives for objective in by):
            text = (
                f"{', '.join(idle)}: learns from {', '.join(by)} alone; add one to the objectives, or name other parts"
            )
            problems.append((f"{where}.train", text))
    return problems


def contradictions(config: RunConfig, context: BuildContext, parts: Mapping[str, Collection[str]]) -> Problems:
    """``(dotted path, message)`` of everything in ``config`` that cannot go together; ``parts`` are the model's, each with
    the names of its parameters.

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
    problems += [
        (
            f"model.outputs.{name}.retrieval",
            f"needs the encoder of an input `{name}` to see the media with; the inputs are "
            f"{', '.join(config.model.inputs) or 'none'}",
        )
        for name, output in config.model.outputs.items()
        if output.retrieval is not None and name not in config.model.inputs
    ]
    for index, stage in enumerate(config.stages):
        where = f"stages.{index}"
        problems += _objective_problems(where, stage, parts)
        problems += pattern_problems(where, stage.train, stage.part_lr, parts)
        problems += _piece_problems(where, stage.train, parts)
        own = [name for name in matching(stage.train, parts) if pieces.split(name)[0] == "backbone"]
        if own and backbone.quantize is not None:
            text = f"{own[0]}: quantised weights cannot be trained; train backbone.adapter, or leave out `quantize`"
            problems.append((f"{where}.train", text))
        if stage.gradient_checkpointing and backbone.adapter is not None and not backbone.adapter.checkpointing:
            text = f"{backbone.adapter.kind} needs the cache, which checkpointing takes away; leave it out"
            problems.append((f"{where}.gradient_checkpointing", text))
        if stage.micro_batch_size > stage.batch_size:
            text = f"{stage.micro_batch_size} is more than batch_size {stage.batch_size}"
            problems.append((f"{where}.micro_batch_size", text))
        if positions is not None and stage.max_length > positions:
            text = f"{stage.max_length} tokens, but the backbone has {positions} positions; lower max_length to that"
            problems.append((f"{where}.max_length", text))
    return problems
