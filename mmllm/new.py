"""``mmllm new``: a configuration from a few choices, which ``plan`` and ``train --dry-run`` take as it is.

Whatever is registered can be chosen. What stands beside a ``kind`` is the component's own suggestion
(``ComponentConfig.suggested``); the stages are those of the survey, MM pretraining and MM instruction tuning.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mmllm.config.base import BuildContext, component_class, kinds, load_plugins, suggest
from mmllm.config.families import AdapterConfig, CodeGeneratorConfig, EncoderConfig, GeneratorConfig
from mmllm.config.load import apply_overrides, parse
from mmllm.errors import ConfigError, MmllmError

NONE = "none"  # the answer that leaves a part out
DEFAULTS = {
    "input_projector": "mlp",
    "output_projector": "tiny_transformer",
    "backbone": "causal_lm",
    "adapter": "lora",
}
Problems = list[tuple[str, str]]


@dataclass(frozen=True)
class Way:
    """One modality's way in or out: the kind of its encoder or generator, and of its projector (None: the default)."""

    name: str
    kind: str
    projector: str | None = None


@dataclass
class Choices:
    """What a configuration is to be made of. ``adapter`` may be ``none``; ``stages`` None: all that apply."""

    inputs: list[Way] = field(default_factory=list)
    outputs: list[Way] = field(default_factory=list)
    backbone: str = DEFAULTS["backbone"]
    adapter: str = DEFAULTS["adapter"]
    stages: list[str] | None = None
    plugins: list[str] = field(default_factory=list)


def run_new(file: Path, options: Mapping[str, Any], overrides: Sequence[str] = ()) -> int:
    """Write ``file`` as ``options`` say, or, without any and at a terminal, as a dialogue finds out; 0.

    Raises ``MmllmError`` when the file is there, ``ConfigError`` for choices that are unknown or cannot go together.
    """
    if file.exists():
        raise MmllmError(f"{file} is there already; choose another name, or remove it first")
    if problems := load_plugins(options["plugin"], file.parent):
        raise ConfigError(problems, "--plugin")
    if any(value for name, value in options.items() if name != "plugin"):
        choices = from_options(options)
    elif sys.stdin.isatty():
        from mmllm.dialogue import dialogue

        choices = dialogue(input, print)
        choices.plugins = list(options["plugin"])
    else:
        text = "nothing chosen, and no terminal to ask at; for example --input image=clip, see mmllm list"
        raise ConfigError([("", text)], "mmllm new")
    try:
        text = compose(choices, file, overrides)
    except ConfigError as error:
        raise ConfigError(error.problems, f"mmllm new {file}") from error
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("x", encoding="utf-8") as written:
        written.write(text)
    print(f"{file} is written. Next:\n  mmllm plan {file}\n  mmllm train {file} --dry-run")
    return 0


def from_options(options: Mapping[str, Any]) -> Choices:
    """The choices that the command line's options are. Raises ``ConfigError`` for words that are not ``NAME=KIND…``."""
    problems: Problems = []
    ways: dict[str, list[Way]] = {"input": [], "output": []}
    for option, words in ((option, options[option]) for option in ways):
        for word in words:
            name, equals, kind = word.partition("=")
            kind, _, projector = kind.partition(":")
            if not equals or not name or not kind:
                problems.append((f"--{option}", f"{word!r}; expected NAME=KIND or NAME=KIND:PROJECTOR"))
            elif name in [way.name for way in ways[option]]:
                problems.append((f"--{option}", f"{name!r} is given twice; give each a name of its own"))
            else:
                ways[option].append(Way(name, kind, projector or None))
    if problems:
        raise ConfigError(problems, "mmllm new")
    given = {name: options[name] for name in ("backbone", "adapter") if options[name] is not None}
    stages = None if options["stages"] is None else [name for name in options["stages"].split(",") if name]
    return Choices(ways["input"], ways["output"], **given, stages=stages, plugins=list(options["plugin"]))


def compose(choices: Choices, file: Path, overrides: Sequence[str] = ()) -> str:
    """The text of a configuration at ``file``, which need not be there. Raises ``ConfigError`` with everything that is
    unknown, or that ``mmllm plan`` refuses.
    """
    tree = tree_of(choices, file.stem)
    apply_overrides(tree, overrides)
    from mmllm.plan import make_plan

    make_plan(parse(tree, plugin_folder=file.parent), BuildContext(root=file.resolve().parent))
    body = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return header(tree, file) + body


def tree_of(choices: Choices, name: str) -> dict[str, Any]:
    """The nested mapping of a configuration. Raises ``ConfigError`` with all unknown kinds and stages."""
    problems: Problems = []
    model: dict[str, Any] = {}
    for key, family, projectors, ways in (
        ("inputs", "encoder", "input_projector", choices.inputs),
        ("outputs", "generator", "output_projector", choices.outputs),
    ):
        for way in ways:
            node: dict[str, Any] = {}
            made = part_of(family, way.kind, f"{key}.{way.name}.{family}", problems, way.name)
            if not is_code_generator(family, way.kind) or way.projector is not None:
                kind = way.projector or DEFAULTS[projectors]
                node["projector"] = part_of(projectors, kind, f"{key}.{way.name}.projector", problems)
            # The order of the data's way: encoder and projector, projector and generator.
            model.setdefault(key, {})[way.name] = {family: made, **node} if key == "inputs" else {**node, family: made}
    backbone = part_of("backbone", choices.backbone, "backbone", problems, "text")
    if choices.adapter != NONE:
        backbone["adapter"] = part_of("adapter", choices.adapter, "backbone.adapter", problems)
    model["backbone"] = backbone
    model = {key: model[key] for key in ("inputs", "backbone", "outputs") if key in model}
    if not choices.inputs and not choices.outputs:
        problems.append(("inputs", "no input and no output; expected at least one, such as --input image=clip"))
    known = [stage for stage, wanted in STAGES.items() if wanted.applies(choices)]
    chosen = known if choices.stages is None else choices.stages
    for stage in chosen:
        if stage not in known:
            there = "does not apply to these parts" if stage in STAGES else "unknown stage"
            problems.append(("stages", f"{stage!r}: {there}; known: {', '.join(known)}{suggest(stage, known)}"))
    if problems:
        raise ConfigError(problems)
    tree: dict[str, Any] = {"output": f"runs/{name}", "precision": "bf16"}
    if choices.plugins:
        tree["plugins"] = choices.plugins
    return {**tree, "model": model, "stages": [STAGES[stage].tree(stage, choices) for stage in chosen]}


def part_of(family: str, kind: str, path: str, problems: Problems, modality: str | None = None) -> dict[str, Any]:
    """The mapping of one component, with what it suggests for ``modality``. What is wrong is added to ``problems``."""
    known = kinds(family)
    if kind not in known:
        found = f"unknown {family.replace('_', ' ')} {kind!r}; known: {', '.join(known)}"
        problems.append((path, found + suggest(kind, known)))
        return {}
    taken = component_class(family, kind).suggested
    if modality is not None and taken and modality not in taken and modality in modalities(family):
        others = [other for other in known if modality in component_class(family, other).suggested]
        problems.append((path, f"{kind} is for {', '.join(taken)}; for {modality} there are {', '.join(others)}"))
    first: Mapping[str, Any] = next(iter(taken.values()), {})
    return {"kind": kind, **taken.get(modality or "", first)}


def modalities(family: str) -> dict[str, list[str]]:
    """The modalities of a family's kinds and, for each, the kinds that are for it. A kind that suggests nothing is for what
    its default takes or makes, or, where it has none, for every modality.
    """
    found: dict[str, list[str]] = {}
    unknown = []
    for kind in kinds(family):
        media = [*component_class(family, kind).suggested] or default_media(family, kind)
        for modality in media:
            found.setdefault(modality, []).append(kind)
        if not media:
            unknown.append(kind)
    return {modality: sorted([*of, *unknown]) for modality, of in found.items()}


def default_media(family: str, kind: str) -> list[str]:
    """What kind of media a component's default is for, as a list of one; empty where it does not say."""
    cls = component_class(family, kind)
    if issubclass(cls, GeneratorConfig):
        return [cls.media]
    if not issubclass(cls, EncoderConfig):
        return []
    try:
        return [cls.model_validate({"kind": kind}).tiny().preprocessor(BuildContext(weights=False)).media]
    except (ValidationError, MmllmError):
        return []


def is_code_generator(family: str, kind: str) -> bool:
    """Whether an output of this kind has no projector: the backbone writes its codes."""
    return (
        family == "generator"
        and kind in kinds(family)
        and issubclass(component_class(family, kind), CodeGeneratorConfig)
    )


@dataclass(frozen=True)
class Stage:
    """A stage as ``mmllm new`` writes it: what it is for, its numbers, whether it applies, and what trains in it."""

    about: str
    numbers: Mapping[str, Any]
    applies: Callable[[Choices], bool]
    train: Callable[[Choices], list[str]]

    def tree(self, name: str, choices: Choices) -> dict[str, Any]:
        stage = {
            "name": name,
            "train": self.train(choices),
            **self.numbers,
            "data": [f"data/{name}.jsonl"],
            "epochs": 1,
        }
        if any(pattern.startswith("outputs.") for pattern in stage["train"]):
            stage["objectives"] = {"text": 1.0, "condition": 1.0}
        if "backbone" in stage["train"] or _checkpointing(choices):
            stage["gradient_checkpointing"] = True
        return stage


def _checkpointing(choices: Choices) -> bool:
    cls = None if choices.adapter == NONE else component_class("adapter", choices.adapter)
    return cls is None or (issubclass(cls, AdapterConfig) and cls.checkpointing)


def _ways_out(choices: Choices) -> list[str]:
    """The patterns of what an output trains: its projector, where it has one, and the rows of its tokens."""
    if not choices.outputs:
        return []
    told = all(is_code_generator("generator", way.kind) for way in choices.outputs)
    return ["backbone.new_tokens"] if told else ["outputs.*", "backbone.new_tokens"]


def _instructed(choices: Choices) -> list[str]:
    ways_in = ["inputs.*.projector"] if choices.inputs else []
    return [*ways_in, "backbone" if choices.adapter == NONE else "backbone.adapter", *_ways_out(choices)]


# Rates and batches are LLaVA-1.5's (arXiv 2310.03744) for what goes in, NExT-GPT's (2309.05519) for what comes out.
STAGES: dict[str, Stage] = {
    "align": Stage(
        "MM pretraining: what goes in, with its captions",
        {"lr": 1e-3, "batch_size": 256, "micro_batch_size": 16},
        lambda choices: bool(choices.inputs),
        lambda choices: ["inputs.*.projector"],
    ),
    "generate": Stage(
        "MM pretraining: captions, and what is to be made of them",
        {"lr": 4e-4, "batch_size": 128, "micro_batch_size": 16},
        lambda choices: bool(choices.outputs),
        _ways_out,
    ),
    "instruct": Stage(
        "MM instruction tuning: dialogues",
        {"lr": 2e-4, "batch_size": 128, "micro_batch_size": 8},
        lambda choices: True,
        _instructed,
    ),
}


def header(tree: Mapping[str, Any], file: Path) -> str:
    """The comment at the top: what it is, which data it wants, the commands to run."""
    model = tree["model"]
    ways = [
        f"{name} through {part['encoder']['kind']} and {part['projector']['kind']}"
        for name, part in model.get("inputs", {}).items()
    ]
    backbone = model["backbone"]
    adapter = f" with {backbone['adapter']['kind']}" if "adapter" in backbone else ""
    made = [
        f"{name} by {' and '.join(part[key]['kind'] for key in ('projector', 'generator') if key in part)}"
        for name, part in model.get("outputs", {}).items()
    ]
    what = f"{', '.join(['Text', *ways])} into {backbone['kind']}{adapter}; answers: {', '.join(['text', *made])}."
    lines = [
        *textwrap.wrap(what, 118, break_long_words=False),
        "Written by `mmllm new`: checkpoints and numbers are a start, change them as you like. Replace the data, which are",
        "messages files beside this one (docs/data.md; `mmllm data validate` checks them):",
        *(f"  {stage['data'][0]}: {STAGES[stage['name']].about}" for stage in tree["stages"]),
        "",
        f"  mmllm plan {file}",
        f"  mmllm train {file} --dry-run",
        f"  mmllm train {file}",
        f"  mmllm chat --model {tree['output']}",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)
