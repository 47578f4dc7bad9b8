"""`mmllm new`: whatever is registered can be chosen, and what is written plans and runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from mmllm.cli import main
from mmllm.config import base
from mmllm.config.base import BUILTIN, BuildContext, component_class, kinds, register
from mmllm.config.load import load
from mmllm.config.run import RunConfig
from mmllm.dialogue import dialogue
from mmllm.errors import ConfigError, MmllmError
from mmllm.new import NONE, STAGES, Choices, Way, compose, is_code_generator, modalities, tree_of
from mmllm.plan import make_plan
from mmllm.projectors.mlp import MLPConfig

FAMILIES = ("encoder", "input_projector", "backbone", "adapter", "output_projector", "generator")


def chosen(index: int, options: list[str]) -> str:
    return options[index % len(options)]


def every_choice() -> list[Choices]:
    """As many choices as it takes for each kind to be chosen for each of its modalities; the others take turns."""
    encoders = [Way(name, kind) for name, of in modalities("encoder").items() for kind in of]
    generators = [Way(name, kind) for name, of in modalities("generator").items() for kind in of]
    projectors, adapters = kinds("input_projector"), [*kinds("adapter"), NONE]
    found = []
    for i, way in enumerate(encoders):
        out = generators[i % len(generators)]
        told = is_code_generator("generator", out.kind)
        output = Way(out.name, out.kind, None if told else chosen(i, kinds("output_projector")))
        into = Way(way.name, way.kind, chosen(i, projectors))
        outputs = [output] if i % 3 else []
        found.append(Choices([into], outputs, chosen(i, kinds("backbone")), chosen(i, adapters)))
    return found


def name_of(choices: Choices) -> str:
    ways = [f"{way.name}={way.kind}:{way.projector}" for way in (*choices.inputs, *choices.outputs)]
    return ",".join([*ways, choices.backbone, choices.adapter])


@pytest.mark.parametrize("choices", every_choice(), ids=name_of)
def test_every_kind_can_be_chosen_and_plans(choices: Choices, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    refused: list[tuple[str, str]] = []
    try:
        file.write_text(compose(choices, file))  # plans before it answers
    except ConfigError as error:
        refused = error.problems
    if refused:  # parts that cannot go together by their nature are told under their own paths
        assert all(path.startswith("model.") and text for path, text in refused)
        pytest.skip(str(refused))
    config = load(file)
    assert [*config.model.inputs] == [way.name for way in choices.inputs]
    assert config.model.inputs[choices.inputs[0].name].encoder.kind == choices.inputs[0].kind
    assert config.model.inputs[choices.inputs[0].name].projector.kind == choices.inputs[0].projector
    assert (NONE if config.model.backbone.adapter is None else config.model.backbone.adapter.kind) == choices.adapter
    assert [stage.name for stage in config.stages] == [n for n, stage in STAGES.items() if stage.applies(choices)]


def test_every_kind_that_ships_is_valid_as_suggested() -> None:
    for family in FAMILIES:
        for kind in BUILTIN[family]:
            cls = component_class(family, kind)
            for values in cls.suggested.values() or [{}]:
                assert cls.model_validate({"kind": kind, **values}).kind == kind


def test_the_file_is_written_with_its_commands_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sub" / "my.yaml"
    parts = ["--input", "image=clip", "--input", "audio=whisper:qformer", "--output", "image=stable_diffusion:linear"]
    assert main(["new", str(file), *parts, "--adapter", "ia3", "stages.align.lr=0.5"]) == 0
    text = file.read_text()
    for command in (f"mmllm plan {file}", f"mmllm train {file} --dry-run", f"mmllm train {file}\n", "data/align.jsonl"):
        assert command in text.partition("output:")[0]
    config = load(file)
    assert config.stages[0].lr == 0.5
    assert yaml.safe_load(text)["model"]["inputs"]["audio"]["projector"] == {"kind": "qformer"}
    assert make_plan(config, BuildContext(root=file.parent)).stages[-1].parts.keys() == {
        *("inputs.image.projector", "inputs.audio.projector", "backbone.adapter", "backbone.new_tokens"),
        "outputs.image.projector",
    }
    capsys.readouterr()
    assert main(["train", str(file), "--dry-run"]) == 0
    assert "everything works" in capsys.readouterr().out
    assert main(["new", str(file), *parts]) == 1
    assert "is there already" in capsys.readouterr().err
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ([], ["no terminal to ask at"]),
        (["--adapter", "lora"], ["no input and no output"]),
        (["--input", "image"], ["--input: 'image'; expected NAME=KIND"]),
        (["--input", "image=clip", "--input", "image=vit"], ["'image' is given twice"]),
        (
            ["--input", "image=clp", "--input", "audio=clip:mpl", "--stages", "algn,generate", "--backbone", "x"],
            [
                "inputs.image.encoder: unknown encoder 'clp'",
                "did you mean 'clip'",
                "inputs.audio.encoder: clip is for image; for audio there are",
                "did you mean 'mlp'",
                "stages: 'algn': unknown stage; known: align, instruct; did you mean 'align'?",
                "stages: 'generate': does not apply to these parts",
                "backbone: unknown backbone 'x'",
            ],
        ),
        (["--output", "image=vq:mlp"], ["model.outputs.image.projector: the backbone itself writes the codes of vq"]),
        (["--input", "image=clip", "stages.nope.lr=1"], ["no entry 'nope'"]),
        (["--input", "image=clip", "model.backbone.adaptr=1"], ["model.backbone.adaptr: unknown key"]),
        (["--input", "image=clip", "--plugin", "nowhere_to_be_found"], ["cannot import 'nowhere_to_be_found'"]),
    ],
)
def test_mistakes_are_told_all_at_once_and_nothing_is_written(
    arguments: list[str], texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", str(tmp_path / "my.yaml"), *arguments]) == 2
    told = capsys.readouterr().err
    for text in texts:
        assert text in told
    assert not list(tmp_path.iterdir())


def test_a_name_of_ones_own_takes_the_first_suggestion() -> None:
    tree = tree_of(Choices([Way("photo", "clip")]), "my")
    assert tree["model"]["inputs"]["photo"]["encoder"] == {
        "kind": "clip",
        **component_class("encoder", "clip").suggested["image"],
    }


@pytest.fixture
def foreign() -> Iterator[type[MLPConfig]]:
    """An input projector from elsewhere, registered for one test."""

    class ForeignConfig(MLPConfig):
        """Somebody else's projector."""

        kind: Literal["foreign"] = "foreign"  # type: ignore[assignment]

    yield register(ForeignConfig)
    del base._registered["input_projector"]["foreign"]


PLUGIN = """
from typing import Literal
from mmllm.config.base import register
from mmllm.projectors.mlp import LinearConfig

@register
class PluginConfig(LinearConfig):
    kind: Literal["of_a_plugin"] = "of_a_plugin"
"""


def test_kinds_of_a_plugin_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "parts_of_a_test.py").write_text(PLUGIN)
    file = tmp_path / "my.yaml"
    try:
        assert main(["new", str(file), "--input", "image=vit:of_a_plugin", "--plugin", "parts_of_a_test"]) == 0
        config = load(file, local_plugins=True)
    finally:
        del base._registered["input_projector"]["of_a_plugin"]
    assert config.plugins == ["parts_of_a_test"]
    assert config.model.inputs["image"].projector.kind == "of_a_plugin"


def answers(*lines: str) -> Any:
    left = iter(lines)

    def read(prompt: str) -> str:
        line = next(left, None)
        if line is None:
            raise EOFError
        return line

    return read


def test_the_dialogue_offers_what_is_registered(foreign: type[MLPConfig]) -> None:
    said: list[str] = []
    number = str(kinds("input_projector").index("foreign") + 1)
    read = answers("image, audio", "vit", number, "whisper", "", "", NONE, "image", "vq", "align,instruct")
    choices = dialogue(read, said.append)
    assert choices.inputs == [Way("image", "vit", "foreign"), Way("audio", "whisper", "mlp")]
    assert choices.outputs == [Way("image", "vq", None)]
    assert (choices.backbone, choices.adapter, choices.stages) == ("causal_lm", NONE, ["align", "instruct"])
    assert any("foreign" in line and "Somebody else's projector." in line for line in said)
    tree = tree_of(choices, "my")
    assert tree["stages"][1]["train"] == ["inputs.*.projector", "backbone", "backbone.new_tokens"]
    assert RunConfig.model_validate(tree).model.inputs["image"].projector.kind == "foreign"


def test_the_dialogue_asks_again_and_has_defaults() -> None:
    said: list[str] = []
    choices = dialogue(answers("smell", "", "99", "vit,clip", "clip", *[""] * 6), said.append)
    assert [way.name for way in choices.inputs] == ["image"]
    assert choices.inputs[0].kind == "clip"
    assert choices.outputs == []
    assert sum("not among the answers" in line for line in said) == 2
    assert sum("one of them, please" in line for line in said) == 1
    with pytest.raises(MmllmError, match="nothing was written"):
        dialogue(answers("image"), said.append)


def test_at_a_terminal_without_options_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    lines = iter(["", "vit", *[""] * 5])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["new", str(tmp_path / "my.yaml")]) == 0
    assert load(tmp_path / "my.yaml").model.inputs["image"].encoder.kind == "vit"
