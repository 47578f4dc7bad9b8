"""Write docs/zoo.md: a table and a diagram of every configuration, from the configurations themselves.

    python docs/make_zoo.py            # after a configuration was added or changed

Names, licences and papers come from the comments at the head of a file, everything else from its plan (offline). The page is
checked by `tests/test_zoo_page.py`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmllm.config.base import BuildContext, ComponentConfig
from mmllm.config.load import load
from mmllm.config.run import RunConfig
from mmllm.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
PAGE = ROOT / "docs" / "zoo.md"
LABEL = re.compile(r"(As published|Different here|Not verified|Weights|Data)\b[^:]*:")
COLUMNS = (
    "configuration",
    "encoder",
    "projector",
    "backbone",
    "out",
    "generator",
    "trained per stage",
    "weights",
    "paper",
)

INTRODUCTION = """# The zoo

Every configuration that ships, written by `python docs/make_zoo.py` from the files. Each file says at its head what is as
published, what differs and why, where the numbers stand, and how to run it. `mmllm plan` works for all without a download.

A published system here is its recipe, not its weights. Where its own parts are not among mmllm's, the nearest stand in,
and the file says so. Licences are those of the weights that a recipe starts from."""
PUBLISHED = """## Published sizes

Numbers of parameters that a paper states, or that the shapes in the reference code give, beside the plan's.
`tests/test_zoo_page.py` holds them to 1 % where no reason is given."""

sys.path.insert(0, str(ROOT / "tests"))
from zoo_sizes import SIZES, Size  # noqa: E402


@dataclass(frozen=True)
class Header:
    """What the comments at the head of a configuration say: what it is, and its paragraphs by their label."""

    about: str
    labelled: dict[str, str]

    @property
    def papers(self) -> list[str]:
        """The arXiv numbers of the first paragraph, in order."""
        return list(dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{5})", self.about)))


@dataclass(frozen=True)
class Entry:
    """A configuration, its plan and its header."""

    path: Path
    config: RunConfig
    plan: Plan
    header: Header

    @property
    def name(self) -> str:
        """Its path without the suffix, as ``mmllm list`` has it."""
        return self.path.relative_to(CONFIGS).with_suffix("").as_posix()


def entry(path: Path) -> Entry:
    """Read and plan a configuration. Raises ``ConfigError`` with all that is wrong with it."""
    config = load(path)
    return Entry(path, config, make_plan(config, BuildContext(root=path.parent)), header(path))


def header(path: Path) -> Header:
    """The comments at the head of ``path``, up to the commands."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line == "#":
            break
        lines.append(line.removeprefix("#").strip())
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if LABEL.match(line):
            paragraphs.append([])
        paragraphs[-1].append(line)
    about, *rest = (" ".join(words) for words in paragraphs)
    labelled: dict[str, str] = {}
    for text in rest:
        label, _, said = text.partition(":")
        word = label.split()[0]
        labelled[word] = f"{labelled[word]} {said.strip()}" if word in labelled else said.strip()
    return Header(about, labelled)


def count(number: int) -> str:
    """``1234567`` as ``1.23 M``."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def source(part: ComponentConfig) -> str:
    """What a component is made of, in a word: the last part of its hub id or file, else its architecture's name."""
    pieces = [member.model_dump() for member in part.members().values()]
    return " + ".join(_source(piece) for piece in pieces)


def _source(numbers: dict[str, object]) -> str:
    pretrained, architecture = numbers.get("pretrained"), numbers.get("architecture")
    if isinstance(pretrained, str):
        return pretrained.rpartition("/")[2].removesuffix(".safetensors")
    if isinstance(numbers.get("arch"), str):
        return str(numbers["arch"])
    if isinstance(architecture, dict):
        named = (architecture.get(key) for key in ("model_type", "pipeline", "model"))
        return next((str(name) for name in named if name), "of its own")
    return "of its own"


def adapted(part: ComponentConfig, adapter: ComponentConfig | None) -> str:
    """``source`` with its adapter."""
    return source(part) if adapter is None else f"{source(part)} + {adapter.kind}"


def cell(lines: Iterable[str]) -> str:
    """Several lines in one cell of a table."""
    return "<br>".join(line.replace("|", "\\|") for line in lines) or "–"


def row(one: Entry) -> str:
    """The configuration's row of the table, in the order of ``COLUMNS``."""
    model, plan = one.config.model, one.plan
    several = len(model.inputs) > 1

    def marked(name: str, text: str) -> str:
        return f"{name}: {text}" if several else text

    cells = [
        f"[{one.name}](../configs/{one.name}.yaml)",
        cell(
            marked(name, f"{part.encoder.kind} {adapted(part.encoder, part.encoder.adapter)}")
            for name, part in model.inputs.items()
        ),
        cell(marked(name, part.projector.kind) for name, part in model.inputs.items()),
        adapted(model.backbone, model.backbone.adapter),
        cell(
            f"{name}: {'codes' if part.projector is None else part.projector.kind}"
            for name, part in model.outputs.items()
        ),
        cell(source(part.generator) for part in model.outputs.values()),
        cell(f"{stage.name} {count(stage.trainable)}" for stage in plan.stages),
        cell([one.header.labelled["Weights"]] if "Weights" in one.header.labelled else []),
        cell(f"[{number}](https://arxiv.org/abs/{number})" for number in one.header.papers),
    ]
    return f"| {' | '.join(cells)} |"


def diagram(one: Entry) -> str:
    """A Mermaid flowchart. What any stage trains has a thick border."""
    model, plan = one.config.model, one.plan
    # New tokens have rows of their own; that they train says nothing of the backbone.
    trained = {name for stage in plan.stages for name in stage.parts if name != "backbone.new_tokens"}

    def node(key: str, part: str, *words: str) -> str:
        thick = ":::trained" if any(f"{name}.".startswith(f"{part}.") for name in trained) else ""
        size = plan.parameters.get(part)
        text = "<br>".join([*words, *([count(size)] if size else [])])
        return f'{key}["{text}"]{thick}'

    backbone, adapter = model.backbone, model.backbone.adapter
    words = [backbone.kind, source(backbone), *([] if adapter is None else [f"+ {adapter.kind}"])]
    lines = [
        "flowchart LR",
        f"  {node('backbone', 'backbone', *words)}",
        "  text([text]) --> backbone --> reply([text])",
    ]
    for name, part in model.inputs.items():
        at = f"inputs.{name}"
        sizes = sorted(set(plan.inputs[name].tokens.values()))
        tokens = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} – {sizes[-1]}"
        encoder = node(f"{name}_encoder", f"{at}.encoder", part.encoder.kind, source(part.encoder))
        projector = node(f"{name}_projector", f"{at}.projector", part.projector.kind)
        lines.append(f'  {name}([{name}]) --> {encoder} --> {projector} -- "{tokens} tokens" --> backbone')
    for name, made in model.outputs.items():
        tokens = f"{plan.outputs[name].signal_tokens} tokens"
        generator = f'{name}_generator["{made.generator.kind}<br>{source(made.generator)}"]'
        between = (
            ""
            if made.projector is None
            else f"{node(f'{name}_out', f'outputs.{name}.projector', made.projector.kind)} --> "
        )
        lines.append(f'  backbone -- "{tokens}" --> {between}{generator} --> made_{name}([{name}])')
    return "\n".join([*lines, "  classDef trained stroke-width:3px"])


def block(one: Entry) -> str:
    """What the configuration says of itself, and its diagram, folded."""
    parts = [
        one.header.about,
        *(
            f"{'*Different here:* ' if k == 'Different' else '*Not verified:* '}{v}"
            for k, v in one.header.labelled.items()
            if k in ("Different", "Not")
        ),
    ]
    text = "\n\n".join(parts)
    return f"<details>\n<summary>{one.name}</summary>\n\n{text}\n\n```mermaid\n{diagram(one)}\n```\n\n</details>"


def group(one: Entry) -> tuple[bool, str]:
    """The heading that a configuration stands under, made of its modalities; what only writes comes first."""
    model = one.config.model
    return bool(model.outputs), f"{', '.join(['text', *model.inputs])} to {', '.join(['text', *model.outputs])}"


def sizes(entries: dict[str, Entry]) -> list[str]:
    """The table of published sizes."""
    lines = [
        "| configuration | part | published | here | source | why they differ |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for fact in SIZES:
        here = size_here(entries[fact.config], fact)
        lines.append(
            f"| {fact.config} | `{fact.part}` | {fact.published:,} | {here:,} | {fact.source} | {fact.differs} |"
        )
    return lines


def size_here(one: Entry, fact: Size) -> int:
    """What the plan counts for the part, or the piece of a part that a stage trains."""
    known = {name: number for stage in one.plan.stages for name, number in stage.parts.items()} | one.plan.parameters
    return known[fact.part]


def page(entries: list[Entry]) -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    headings = sorted({group(one) for one in entries})
    for heading in headings:
        rows = [row(one) for one in entries if group(one) == heading]
        lines += [
            "",
            f"## {heading[1].capitalize()}",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "| --- " * len(COLUMNS) + "|",
            *rows,
        ]
    lines += ["", "## Diagrams", "", "Parts with a thick border train in some stage, by themselves or by an adapter."]
    for one in entries:
        lines += ["", block(one)]
    lines += ["", PUBLISHED, "", *sizes({one.path.stem: one for one in entries})]
    return "\n".join(lines) + "\n"


def paths() -> list[Path]:
    """All configurations, in order."""
    return sorted(CONFIGS.rglob("*.yaml"))


if __name__ == "__main__":
    PAGE.write_text(page([entry(path) for path in paths()]), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
