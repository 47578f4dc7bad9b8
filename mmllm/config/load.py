"""Configurations from YAML: ``base:`` merging, dotted overrides, every mistake at once; and back to YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mmllm.config.base import load_plugins, problems_of
from mmllm.config.contradictions import pattern_problems
from mmllm.config.run import RunConfig
from mmllm.errors import ConfigError

MAX_BYTES = 1_000_000
Problems = list[tuple[str, str]]


def load(path: str | Path, overrides: Sequence[str] = (), *, local_plugins: bool = False) -> RunConfig:
    """Read a YAML configuration, merge its ``base:`` files under it, apply ``a.b=c`` overrides and validate.

    ``local_plugins`` also looks for plugins in the file's own folder: for files that the user wrote, not for a model that
    came from elsewhere, whose folder could hold anything. Raises ``ConfigError`` with all problems found: YAML syntax,
    duplicate keys, unknown keys and kinds, wrong values, stage patterns that match no part.
    """
    problems: Problems = []
    tree = _read(Path(path), problems, ())
    if tree is None:  # nothing can be said of the keys of a file that cannot be read
        raise ConfigError(problems, str(path))
    for text in overrides:
        _override(tree, text, problems)
    return parse(tree, str(path), problems, plugin_folder=Path(path).parent if local_plugins else None)


def parse(
    tree: Mapping[str, Any],
    source: str = "config",
    problems: Sequence[tuple[str, str]] = (),
    *,
    plugin_folder: Path | None = None,
) -> RunConfig:
    """Validate a nested mapping. ``problems`` are mistakes found earlier, reported together with those found here."""
    found = list(problems)
    plugins = tree.get("plugins")
    if isinstance(plugins, list):
        found += load_plugins([str(name) for name in plugins], plugin_folder)
    config = None
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        found += problems_of(error, RunConfig)
    found += _unmatched_patterns(tree)
    if found or config is None:
        raise ConfigError(found, source)
    return config


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set ``a.b=c`` in a nested mapping, in place. Raises ``ConfigError`` with all that cannot be set."""
    problems: Problems = []
    for override in overrides:
        _override(tree, override, problems)
    if problems:
        raise ConfigError(problems)


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML, every default written out; ``load`` of it gives an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """``config`` with ``a.b=c`` overrides applied. Raises ``ConfigError`` with all problems found."""
    tree, problems = config.model_dump(mode="json"), list[tuple[str, str]]()
    for text in overrides:
        _override(tree, text, problems)
    if problems:
        raise ConfigError(problems)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(problems_of(error, RunConfig)) from error


def merge(low: Any, high: Any) -> Any:
    """``high`` over ``low``: mappings merge, everything else replaces; a mapping with another ``kind`` replaces its node."""
    if not (isinstance(low, dict) and isinstance(high, dict)):
        return high
    if "kind" in low and "kind" in high and low["kind"] != high["kind"]:
        return high
    return {**low, **{key: merge(low[key], value) if key in low else value for key, value in high.items()}}


def _read(path: Path, problems: Problems, including: tuple[Path, ...]) -> dict[str, Any] | None:
    """The tree of a file and its bases; None, and a problem, when one of them cannot be read."""
    where = path.name
    resolved = path.resolve()
    if resolved in including:
        problems.append((f"{where}:base", f"includes itself by way of {' -> '.join(p.name for p in including)}"))
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                [("", f"{path.stat().st_size:,} bytes; a configuration has at most {MAX_BYTES:,}")], str(path)
            )
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        if not including:
            raise ConfigError([("", f"cannot read the file: {error}")], str(path)) from error
        problems.append((f"{including[-1].name}:base", f"cannot read {str(path)!r}: {error}"))
        return None
    tree = _parse_yaml(text, where, problems)
    if tree is None:
        return None
    bases = tree.pop("base", [])
    if isinstance(bases, str):
        bases = [bases]
    if not (isinstance(bases, list) and all(isinstance(b, str) for b in bases)):
        problems.append((f"{where}:base", f"expected a list of file names, found {bases!r}"))
        bases = []
    trees = [_read(path.parent / base, problems, (*including, resolved)) for base in bases]
    merged: dict[str, Any] = {}
    for low in trees:
        if low is None:
            return None
        merged = merge(merged, low)
    return dict(merge(merged, tree))


class _Loader(yaml.SafeLoader):
    """SafeLoader that collects duplicate keys, aliases (they can multiply) and merge keys, and reads ``1e-3`` as a number.

    ``faults`` holds ``(line, message)``; what is refused is left out, so that the rest of the file is looked at as well.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.faults: list[tuple[int, str]] = []

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]
            text = "aliases (*name) are not used in configurations; use `base:` to share settings"
            self.faults.append((event.start_mark.line + 1, text))
            return yaml.ScalarNode("tag:yaml.org,2002:null", "null", event.start_mark, event.end_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for entry in list(node.value):
            key_node, line = entry[0], entry[0].start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                self.faults.append((line, "merge keys (<<) are not supported; use `base:` to share settings"))
                node.value.remove(entry)
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                key = str(key)
            if key in seen:
                self.faults.append((line, f"key {key!r} is given twice; keep one"))
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads 1e-3 (no dot) as text; a learning rate is a number to everybody.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, where: str, problems: Problems) -> dict[str, Any] | None:
    """The mapping that ``text`` is; None, and a problem, when it is none."""
    loader = _Loader(text)
    try:
        tree = loader.get_single_data()
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        problems.append((f"{where} line {mark.line + 1}" if mark else where, f"not valid YAML: {reason}"))
        return None
    except RecursionError:
        problems.append((where, "not valid YAML: nested too deeply"))
        return None
    finally:
        loader.dispose()
    problems += [(f"{where} line {line}", text) for line, text in loader.faults]
    if not isinstance(tree, dict):
        problems.append((where, f"expected a mapping at the top, found {type(tree).__name__}"))
        return None
    return tree


def _override(tree: dict[str, Any], text: str, problems: Problems) -> None:
    path, equals, value = text.partition("=")
    if not equals or not path:
        problems.append((text, "an override is written path.to.key=value"))
        return
    parsed: list[tuple[str, str]] = []
    holder = _parse_yaml(f"value: {value}", f"override {path}", parsed)
    if holder is None or parsed:
        problems += parsed
        return
    *parents, last = path.split(".")
    node: Any = tree
    for index, word in enumerate(parents):
        node = _step(node, word, ".".join(parents[: index + 1]), problems)
        if node is None:
            return
    if isinstance(node, list):
        position = _index(node, last, path, problems)
        if position is not None:
            node[position] = holder["value"]
    elif isinstance(node, dict):
        node[last] = holder["value"]
    else:
        problems.append((path, f"cannot set {last!r} in a plain value {node!r}"))


def parse_value(text: str, where: str) -> Any:
    """A single YAML value. Raises ``ConfigError`` naming ``where``."""
    problems: Problems = []
    holder = _parse_yaml(f"value: {text}", where, problems)
    if problems or holder is None:
        raise ConfigError(problems, where)
    return holder["value"]


def _step(node: Any, word: str, path: str, problems: Problems) -> Any:
    if isinstance(node, list):
        position = _index(node, word, path, problems)
        return None if position is None else node[position]
    if isinstance(node, dict):
        if node.get(word) is None:
            node[word] = {}
        return node[word]
    problems.append((path, f"cannot go into a plain value {node!r}"))
    return None


def _index(node: list[Any], word: str, path: str, problems: Problems) -> int | None:
    """A list is addressed by position, or by the ``name`` of its entries (stages)."""
    names = [str(item.get("name")) for item in node if isinstance(item, dict)]
    if word in names:
        return names.index(word)
    if word.isdigit() and int(word) < len(node):
        return int(word)
    problems.append((path, f"no entry {word!r}; there are {len(node)}{': ' + ', '.join(names) if names else ''}"))
    return None


def part_names(tree: Mapping[str, Any]) -> list[str]:
    """The trainable parts of a configuration, read off the raw mapping (which may be faulty elsewhere)."""
    model = _mapping(tree.get("model"))
    inputs, outputs, backbone = (_mapping(model.get(key)) for key in ("inputs", "outputs", "backbone"))
    names = [f"inputs.{name}.{part}" for name in inputs for part in ("encoder", "projector")]
    for name, part in inputs.items():
        names += [f"inputs.{name}.{own}" for own in ("alignment", "prompt") if _mapping(part).get(own) is not None]
    adapted = (name for name, part in inputs.items() if _mapping(_mapping(part).get("encoder")).get("adapter"))
    names += [f"inputs.{name}.encoder.adapter" for name in adapted]
    fused = [name for name, part in inputs.items() if _mapping(part).get("fusion") is not None]
    names += [f"inputs.{name}.fusion" for name in fused]
    names.append("backbone")
    if backbone.get("adapter"):
        names.append("backbone.adapter")
    if outputs or fused or any(_mapping(part).get("markers") for part in inputs.values()):
        names.append("backbone.new_tokens")
    for name, output in outputs.items():
        given = (part for part in ("retrieval", "decision") if _mapping(output).get(part) is not None)
        names += [f"outputs.{name}.{part}" for part in ("projector", *given)]
    return names


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _unmatched_patterns(tree: Mapping[str, Any]) -> Problems:
    """Stage patterns that name no part of the model, or no trained one in ``part_lr``; also stage names used twice."""
    stages = tree.get("stages")
    problems: Problems = []
    known = part_names(tree)
    seen: set[str] = set()
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, Mapping):
            continue
        train, rates = stage.get("train"), stage.get("part_lr")
        patterns = [pattern for pattern in train if isinstance(pattern, str)] if isinstance(train, list) else []
        problems += pattern_problems(f"stages.{index}", patterns, rates if isinstance(rates, Mapping) else (), known)
        name = stage.get("name")
        if isinstance(name, str) and name in seen:
            problems.append((f"stages.{index}.name", f"{name!r} names an earlier stage too; stage names are unique"))
        seen.add(str(name))
    return problems
