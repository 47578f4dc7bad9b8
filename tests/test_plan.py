"""`mmllm plan`: counts, shapes and contradictions, on the meta device with nothing downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmllm.cli import CONFIG_FOLDERS, main
from mmllm.config.base import BuildContext
from mmllm.config.contradictions import with_lengths
from mmllm.config.load import dump, load

CONFIGS = sorted(CONFIG_FOLDERS[1].rglob("*.yaml"))


def plan(config: Path | str, capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    assert main(["plan", str(config), "--json", "--quick", *overrides]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_llava_15_has_the_published_parts(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan("llava-1.5-7b", capsys)
    assert result["hidden_dim"] == 4096
    image = result["inputs"]["image"]
    # arXiv 2310.03744: 336 px in patches of 14 gives 576 tokens whatever the picture's size.
    assert image["feature_dim"] == 1024
    assert image["tokens"] == {"512x512": 576, "1600x400": 576}
    parameters = result["parameters"]
    assert parameters["inputs.image.projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert parameters["backbone"] == 6_738_415_616  # Llama-7B
    per_layer = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert parameters["backbone.adapter"] == 128 * per_layer * 32
    assert result["total"] == sum(parameters.values())
    align, instruct = result["stages"]
    assert align["trainable"] == parameters["inputs.image.projector"]
    assert instruct["trainable"] == parameters["inputs.image.projector"] + parameters["backbone.adapter"]
    assert instruct["lr"] == {"inputs.image.projector": 2e-5, "backbone.adapter": 2e-4}


def test_gill_trains_what_the_published_code_trains(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers of github.com/kohjingyu/gill at 4600b71 with the arguments of ``checkpoints/gill_opt/model_args.json``:
    those of its ``TextFcLayer`` (``gill/layers.py``), counted by running it, and of the layers of ``GILLModel``.
    """
    result = plan("gill", capsys)
    parameters = result["parameters"]
    assert (
        parameters["outputs.image.projector"] == 31_958_784
    )  # gen_text_hidden_fcs: TextFcLayer(…, mode="gill_mapper")
    # ret_text_hidden_fcs (mode="linear"), visual_fc, logit_scale
    assert parameters["outputs.image.retrieval"] == 1_048_832 + 262_400 + 1
    assert parameters["inputs.image.projector"] == 16_793_600  # visual_embeddings: 1024 to 4 x 4096
    assert parameters["backbone.new_tokens"] == 8 * 4096  # [IMG0] to [IMG7]; OPT's embeddings and head are one table
    assert parameters["outputs.image.decision"] == 4096 * 2 + 2  # decision_model
    assert parameters["inputs.image.encoder"] == 303_179_776  # transformers' CLIPVisionModel of ViT-L/14
    assert parameters["backbone"] == 6_658_473_984  # OPT-6.7B
    align, refine, decide = result["stages"]
    assert align["trainable"] == refine["trainable"] == 31_958_784 + 1_311_233 + 16_793_600 + 32_768
    assert decide["parts"] == {"outputs.image.decision": 8194}
    assert set(result["inputs"]["image"]["tokens"].values()) == {4}
    assert result["outputs"]["image"]["condition"] == {"text": [77, 768]}
    assert result["outputs"]["image"]["signal_tokens"] == 8


def test_next_gpt_has_the_published_parts(capsys: pytest.CaptureFixture[str]) -> None:
    """Every trained part as the authors' first code counts it: NExT-GPT-Lagacy/code/model of NExT-GPT/NExT-GPT, 60d618b."""
    result = plan("next_gpt", capsys)
    parameters = result["parameters"]
    for name, tokens in (("image", {"512x512": 3, "1600x400": 3}), ("video", {"640x360": 3})):
        assert result["inputs"][name]["feature_dim"] == 1024
        assert result["inputs"][name]["tokens"] == tokens  # one, between start and end
        assert parameters[f"inputs.{name}.encoder"] == 632_829_440  # the vision trunk, its stem and its head
        assert parameters[f"inputs.{name}.projector"] == 4_198_400  # `llama_proj`, Linear(1024, 4096)
    assert set(result["inputs"]["audio"]["tokens"].values()) == {3}
    # `TextFcLayer(4096, …, mode="transformer")` of layers.py; the paper's table 1 rounds to 31M, 32M and 31M.
    shapes = {"image": (4, [77, 768]), "video": (24, [77, 1024]), "audio": (8, [1, 512])}
    for name, count in (("image", 31_958_784), ("video", 32_090_112), ("audio", 31_788_544)):
        out = result["outputs"][name]
        assert (out["signal_tokens"], out["condition"]["text"]) == shapes[name]
        length, width = shapes[name][1]
        layers = 4 * (3_152_384 + 4_204_032) + 2 * 1024  # of nn.Transformer(512, 4, 4, 4, 2048), and its two last norms
        assert count == 4096 * 512 + 512 + layers + length * 512 + 512 * width + width
        assert parameters[f"outputs.{name}.projector"] == count
    assert (
        parameters["backbone.adapter"] == 32 * 4 * 2 * 32 * 4096 == 33_554_432
    )  # q, k, v, o of 32 layers; 33M in the paper
    signals, markers = 4 + 24 + 8, 2 * 3
    assert parameters["backbone.new_tokens"] == (signals + markers + signals) * 4096
    inputs, outputs, llm = (
        {part for part in parameters if part.startswith(s)} for s in ("inputs", "outputs", "backbone.")
    )
    projectors = {part for part in inputs if part.endswith("projector")}
    trained = [set(stage["parts"]) for stage in result["stages"]]
    new = {"backbone.new_tokens"}
    assert trained == [projectors | new, outputs | new, projectors | outputs | llm]
    assert [set(stage["lr"].values()) for stage in result["stages"]] == [{4e-4}, {4e-4}, {5e-4}]


def test_slam_asr_trains_what_the_published_projector_has(capsys: pytest.CaptureFixture[str]) -> None:
    """21.50M in the table of github.com/X-LANCE/SLAM-LLM, examples/asr_librispeech/README.md (c4db782)."""
    result = plan("slam-asr", capsys)
    projector = result["parameters"]["inputs.audio.projector"]
    assert projector == 5 * 1280 * 2048 + 2048 + 2048 * 4096 + 4096 == 21_501_952
    assert (
        result["parameters"]["inputs.audio.encoder"] == 962_496_128
    )  # HuBERT X-Large; 964M in its paper, with the head
    assert result["inputs"]["audio"]["tokens"] == {"1 s": 10, "30 s": 300}  # 49 and 1499 features; 90 s are refused
    assert [stage["trainable"] for stage in result["stages"]] == [projector]


def test_x_instructblip_hears_with_beats(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan("x-instructblip-audio", capsys)
    assert result["parameters"]["inputs.audio.encoder"] == 90_311_792  # "90M" in arXiv 2212.09058
    assert result["inputs"]["audio"]["feature_dim"] == 768
    assert result["inputs"]["audio"]["tokens"] == {"1 s": 32}  # longer examples are refused
    assert [set(stage["parts"]) for stage in result["stages"]] == [{"inputs.audio.projector"}]


def test_anymal_hears_with_clap(capsys: pytest.CaptureFixture[str]) -> None:
    """64 features of each window of 10 s, two to a token."""
    result = plan("anymal-audio", capsys)
    assert result["inputs"]["audio"]["tokens"] == {"1 s": 32, "30 s": 96, "90 s": 288}
    assert result["parameters"]["inputs.audio.projector"] == 2 * 768 * 5120 + 5120
    assert result["parameters"]["backbone"] == 13_015_864_320  # Llama-2-13B


def test_anymal_sees_with_dinov2(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan("anymal-image", capsys)
    assert result["inputs"]["image"]["feature_dim"] == 1536
    assert set(result["inputs"]["image"]["tokens"].values()) == {64}
    assert result["parameters"]["inputs.image.encoder"] == 1_136_479_232  # ViT-g/14, "1.1B" in arXiv 2304.07193


def test_prismatic_trains_what_the_published_code_trains(capsys: pytest.CaptureFixture[str]) -> None:
    """The layers of ``MLPProjector`` and ``FusedMLPProjector`` of prismatic/util/nn_utils.py (TRI-ML/prismatic-vlms, 4fcd061)."""
    siglip, fused = plan("prism-siglip-7b", capsys), plan("prism-dinosiglip-7b", capsys)
    assert siglip["parameters"]["inputs.image.projector"] == 1152 * 4096 + 4096 + 4096 * 4096 + 4096
    width = 1024 + 1152
    layers = [(width, 4 * width), (4 * width, 4096), (4096, 4096)]
    assert fused["parameters"]["inputs.image.projector"] == sum(a * b + b for a, b in layers)
    for result in (siglip, fused):
        assert set(result["inputs"]["image"]["tokens"].values()) == {27 * 27}
        assert [set(stage["parts"]) for stage in result["stages"]] == [{"inputs.image.projector", "backbone"}]
    # transformers' SiglipVisionModel without its pooling, and here without the last block and norm.
    block = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    assert siglip["parameters"]["inputs.image.encoder"] == 412_987_248 - block - 2 * 1152


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_has_a_plan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--quick"]) == 0
    text = capsys.readouterr().out
    assert "backbone" in text
    assert "total" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.align.max_length=8", "raise max_length"),
        ("stages.align.micro_batch_size=64", "more than batch_size"),
        ("stages.align.train=[inputs.video.projector]", "matches no part"),
        ("model.inputs.image.projector.num_heads=5", "64"),
        (
            "model.backbone.architecture.num_key_value_heads=3",
            "model.backbone.architecture.num_key_value_heads: 4 atten",
        ),
        (
            "model.backbone.architecture={model_type: llama, hidden_size: 66, num_attention_heads: 4}",
            "model.backbone.architecture: transformers refuses it",
        ),
        ("model.backbone.architecture.hidden_size=sixty", "'hidden_size' expected int"),
        ("model.backbone.architecture.hidden_sise=64", "architecture.hidden_sise: unknown"),
        ("model.backbone.architecture={model_type: t5}", "architecture.model_type: transformers has no causal LM 't5'"),
        ("model.backbone.architecture={model_type: gpt2, n_embd: 64, n_head: 5}", "`embed_dim` must be divisible"),
        ("stages.0.max_length=4096", "stages.0.max_length: 4096 tokens, but the backbone has"),
        ("model.backbone.architecture.vocab_size=100", "model.backbone: the tokenizer has 260 tokens"),
        ("model.backbone.attention=flash_attention_2", "model.backbone.attention: transformers refuses it"),
        ("model.backbone.adapter.targets=[nope]", "model.backbone.adapter.targets: peft refuses it"),
        ("model.backbone.pretrained=./nothere", "model.backbone: found no folder"),
        ("stages.align.part_lr={backbone: 1.0e-3}", "stages.0.part_lr.backbone: 'backbone' matches no trained part"),
        ("model.inputs.image.encoder.select_layer=-9", "model.inputs.image.encoder.select_layer: found -9"),
    ],
)
def test_a_contradiction_exits_2_and_says_what_to_change(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture = ["model.backbone.architecture=null"] if "pretrained" in override else []
    assert main(["plan", "clip-qformer-whisper-mlp", *architecture, override]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "clip-qformer-whisper-mlp.yaml: " in error
    assert len(error) < 700


def test_a_mistake_in_the_backbone_is_reported_beside_one_of_an_input(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model.inputs.image.encoder.select_layer=-9", "model.backbone.architecture.hidden_sise=64"]
    assert main(["plan", "clip-qformer-whisper-mlp", *overrides]) == 2
    error = capsys.readouterr().err
    assert "2 problems" in error
    assert "model.inputs.image.encoder.select_layer: found -9" in error
    assert "model.backbone.architecture.hidden_sise: unknown" in error


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        (["model.backbone.architecture={model_type: llama, hidden_size: 66, num_attention_heads: 4}"], 2),
        (["model.backbone.architecture.vocab_size=100"], 2),
        (["stages.0.max_length=4096"], 2),
        (["stages.align.part_lr={backbone: 1.0e-3}"], 2),
        (["model.inputs.image.encoder.select_layer=-9"], 2),
        (["model.backbone.architecture=null", "model.backbone.pretrained=./nothere"], 1),
    ],
)
def test_training_refuses_what_the_plan_refuses(
    overrides: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = "clip-qformer-whisper-mlp"
    assert main(["plan", config, *overrides]) == 2
    planned = capsys.readouterr().err.splitlines()[-1].strip()
    assert main(["train", config, f"output={tmp_path / 'run'}", *overrides]) == code
    assert planned in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gemma2", "bloom", "gpt2", "opt"])
def test_families_without_sdpa_have_a_plan_by_default(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    architecture = f"model.backbone.architecture={{model_type: {family}}}"
    plan("clip-qformer-whisper-mlp", capsys, architecture, "stages.0.max_length=512", "stages.1.max_length=512")


def test_the_configuration_in_the_readme_has_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (tmp_path / "my.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    assert set(plan(tmp_path / "my.yaml", capsys)["inputs"]) == {"image", "audio"}


def test_an_unknown_hub_architecture_is_a_contradiction_not_a_download(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"model": {"backbone": {"kind": "causal_lm", "pretrained": "no/such-model"}}}))
    assert main(["plan", str(path)]) == 2
    assert "architecture" in capsys.readouterr().err


def test_a_stage_without_max_length_gets_the_backbones_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, offline = CONFIG_FOLDERS[1] / "examples" / "clip-qformer-whisper-mlp.yaml", BuildContext(weights=False)
    gpt2 = "model.backbone.architecture={model_type: gpt2, n_positions: 640}"

    def lengths(*overrides: str) -> list[int]:
        return [stage.max_length for stage in with_lengths(load(file, overrides), offline).stages]

    assert lengths(gpt2) == [640, 640]
    assert lengths("stages.0.max_length=99") == [99, 2048]
    resolved = with_lengths(load(file, [gpt2]), offline)
    (tmp_path / "resolved.yaml").write_text(dump(resolved), encoding="utf-8")
    assert load(tmp_path / "resolved.yaml") == resolved
    assert main(["plan", str(file), gpt2]) == 0
    assert main(["plan", str(file), gpt2, "stages.0.max_length=641"]) == 2
    assert "640 positions" in capsys.readouterr().err
