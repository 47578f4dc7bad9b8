"""Configurations: merging, overrides, round trip, and every mistake at once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmllm.config import base
from mmllm.config.families import ProjectorConfig
from mmllm.config.load import dump, load, merge, parse
from mmllm.errors import ConfigError

GOOD: dict[str, Any] = {
    "model": {
        "inputs": {"image": {"encoder": {"kind": "clip", "arch": "ViT-B-32"}, "projector": {"kind": "mlp"}}},
        "backbone": {"kind": "causal_lm", "pretrained": "some/llm", "adapter": {"kind": "lora", "rank": 8}},
    },
    "stages": [
        {
            "name": "align",
            "train": ["inputs.*.projector"],
            "lr": 1e-3,
            "data": [{"reader": {"kind": "messages", "path": "a.jsonl"}}],
        }
    ],
}


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def test_round_trip_is_equal(tmp_path: Path) -> None:
    config = parse(GOOD)
    (tmp_path / "c.yaml").write_text(dump(config))
    assert load(tmp_path / "c.yaml") == config


SIX_MISTAKES = """\
seed: 1
seed: 2
outptu: there
model:
  inputs:
    image:
      encoder: {kind: clop, arch: ViT-B-32}
      projector: {kind: mlp, dept: 2}
  backbone: {kind: causal_lm, pretrained: x, adapter: {kind: lora, rank: -1}}
stages:
  - {name: align, train: [inputs.image.projektor], lr: 1e-3, data: [{reader: {kind: messages, path: a.jsonl}}]}
"""


def test_all_mistakes_are_reported_with_path_and_suggestion(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(SIX_MISTAKES)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "bad.yaml", ["stages.align.lr=fast"])
    problems = dict(caught.value.problems)
    assert set(problems) == {
        "bad.yaml line 2",
        "outptu",
        "model.inputs.image.encoder",
        "model.inputs.image.projector.dept",
        "model.backbone.adapter.rank",
        "stages.0.train.0",
        "stages.0.lr",
    }
    assert "'output'" in problems["outptu"]
    assert "'clip'" in problems["model.inputs.image.encoder"]
    assert "'depth'" in problems["model.inputs.image.projector.dept"]
    assert "'inputs.image.projector'" in problems["stages.0.train.0"]


def test_mistakes_and_help_are_reported_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(SIX_MISTAKES)
    program = (
        "import sys\nfrom mmllm.cli import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'peft', 'gradio', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, "plan", str(tmp_path / "bad.yaml")], capture_output=True, text=True
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("\n") == 7
    run = subprocess.run(
        [sys.executable, "-c", program.replace("sys.exit(code)", ""), "list"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_base_files_merge_and_a_changed_kind_replaces_its_node(tmp_path: Path) -> None:
    write(tmp_path / "low.yaml", GOOD)
    high = {
        "base": ["low.yaml"],
        "seed": 5,
        "model": {
            "inputs": {"image": {"projector": {"kind": "linear", "stack": 2}}},
            "backbone": {"adapter": {"rank": 4}},
        },
    }
    config = load(write(tmp_path / "high.yaml", high))
    assert config.seed == 5
    assert config.model.inputs["image"].projector.model_dump() == {"kind": "linear", "stack": 2, "expand": 1}
    adapter = config.model.backbone.adapter
    assert adapter is not None
    assert adapter.model_dump()["rank"] == 4
    assert adapter.kind == "lora"
    assert config.stages == parse(GOOD).stages


def test_merge_replaces_lists() -> None:
    assert merge({"a": [1, 2], "b": {"c": 1}}, {"a": [3], "b": {"d": 2}}) == {"a": [3], "b": {"c": 1, "d": 2}}


def test_overrides_reach_mappings_and_stages_by_name_or_position(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", GOOD)
    config = load(
        path, ["seed=3", "stages.align.lr=2e-4", "stages.0.batch_size=4", "model.inputs.image.encoder.select_layer=-1"]
    )
    assert (config.seed, config.stages[0].lr, config.stages[0].batch_size) == (3, 2e-4, 4)
    with pytest.raises(ConfigError, match="no entry 'tune'; there are 1: align"):
        load(path, ["stages.tune.lr=1"])
    with pytest.raises(ConfigError, match="written path"):
        load(path, ["seed"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: &x [1]\nb: [*x, *x]", "aliases"),
        ("- 1", "expected a mapping at the top"),
        ("a: [", "not valid YAML"),
        ("a: " + "[" * 600, "nested too deeply"),
        ("a: " + "{a: " * 600, "nested too deeply"),
        ("x: " + "y" * 1_100_000, "at most"),
        ("base: [nowhere.yaml]", "cannot read"),
        ("base: [c.yaml]", "includes itself"),
    ],
)
def test_hostile_or_broken_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "c.yaml")
    assert time.monotonic() - start < 20


def test_third_parties_register_kinds_and_cannot_take_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_registered", {})

    class Mine(ProjectorConfig):
        kind: str = "mine"

    class Taken(ProjectorConfig):
        kind: str = "mlp"

    base.register(Mine)
    assert "mine" in base.kinds("input_projector")
    assert base.component_class("input_projector", "mine") is Mine
    with pytest.raises(ConfigError, match="already taken"):
        base.register(Taken)


def test_plugins_are_imported_and_a_missing_one_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_registered", {})
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_parts.py").write_text(
        "from typing import Literal\nfrom mmllm.config.base import register\nfrom mmllm.projectors.mlp import MLPConfig\n"
        "@register\nclass Wide(MLPConfig):\n    kind: Literal['wide'] = 'wide'\n"
    )
    tree = {**GOOD, "plugins": ["my_parts"]}
    tree["model"] = merge(GOOD["model"], {"inputs": {"image": {"projector": {"kind": "wide"}}}})
    assert parse(tree).model.inputs["image"].projector.kind == "wide"
    with pytest.raises(ConfigError, match="cannot import 'no_such_parts'"):
        parse({**GOOD, "plugins": ["no_such_parts"]})


@pytest.mark.parametrize(
    "override",
    [
        "part_lr={inputs.*: .inf}",
        "objectives={text: .inf}",
        "optimizer={clip: .inf}",
        "optimizer={eps: .nan}",
        "optimizer={weight_decay: .inf}",
        "lr=.nan",
        "lr=1.0e38",
    ],
)
def test_rates_and_weights_are_finite_numbers(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"finite|less than or equal"):
        load(write(tmp_path / "c.yaml", GOOD), [f"stages.align.{override}"])


def test_merge_keys_and_aliases_do_not_hide_other_mistakes(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: &m {backbone: {kind: causal_lm}}\nsead: 1\nstages: [{<<: *m, name: Bad}]\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yaml")
    text = str(caught.value)
    assert "line 3: merge keys (<<) are not supported" in text
    assert "line 3: aliases" in text
    assert "sead: unknown key" in text


def test_a_syntax_error_is_the_only_problem_told(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: [1\nmodel: {}\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yaml")
    assert len(caught.value.problems) == 1


TAKEN = """\
from typing import Literal
from mmllm.config.base import register
from mmllm.projectors.mlp import MLPConfig
@register
class Taken(MLPConfig):
    kind: Literal["mlp"] = "mlp"
"""


def test_every_faulty_plugin_is_a_problem_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_registered", {})
    for name, text in (("raising_parts", "1 / 0"), ("broken_parts", "def ("), ("taken_parts", TAKEN)):
        (tmp_path / f"{name}.py").write_text(text)
    names = ["raising_parts", "broken_parts", "taken_parts", "", "../x"]
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path / "c.yaml", {**GOOD, "plugins": names}), local_plugins=True)
    expected = ["ZeroDivisionError", "SyntaxError", "already taken", "not the name", "not the name"]
    assert [path for path, _ in caught.value.problems] == [f"plugins.{i}" for i in range(5)]
    for (_, message), text in zip(caught.value.problems, expected, strict=True):
        assert text in message


def test_plugins_beside_the_file_are_imported_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's folder that came from elsewhere must not bring code along."""
    monkeypatch.setattr(base, "_registered", {})
    (tmp_path / "parts_beside.py").write_text(TAKEN.replace('"mlp"', '"beside"'))
    tree = {**GOOD, "plugins": ["parts_beside"]}
    tree["model"] = merge(GOOD["model"], {"inputs": {"image": {"projector": {"kind": "beside"}}}})
    path = write(tmp_path / "c.yaml", tree)
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        load(path)
    assert load(path, local_plugins=True).model.inputs["image"].projector.kind == "beside"
    assert str(tmp_path) not in sys.path


def test_dotted_paths_in_values_are_never_imported(tmp_path: Path) -> None:
    tree = {**GOOD, "model": merge(GOOD["model"], {"backbone": {"kind": "os.system"}})}
    with pytest.raises(ConfigError, match="unknown backbone kind"):
        parse(tree)


def test_trust_remote_code_is_not_a_setting() -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        parse({**GOOD, "model": merge(GOOD["model"], {"backbone": {"trust_remote_code": True}})})
