"""``check_component`` on every registered kind in its variants; and that it notices each broken clause."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

import mmllm
from mmllm.adapters.bottleneck import BottleneckConfig
from mmllm.adapters.ia3 import IA3Config
from mmllm.adapters.lora import LoraConfig
from mmllm.backbones.causal_lm import CausalLMConfig
from mmllm.config.base import BUILTIN, BuildContext, component_class
from mmllm.config.families import AdapterConfig, ProjectorConfig
from mmllm.encoders.clip import ClipConfig
from mmllm.encoders.whisper import WhisperConfig
from mmllm.encoders.whisper_module import WhisperPreprocessor
from mmllm.projectors.base import Projector
from mmllm.testing import ContractError, check_component

FAMILIES = ("encoder", "input_projector", "fusion", "backbone", "adapter", "output_projector", "generator")
EXAMPLES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "encoder": {
        "beats": [{}, {"select_layer": -3}, {"architecture": {"embed_dim": 768, "conv_pos": 95}}],
        "cformer": [{}, {"rate": 12.5, "max_seconds": 30}],
        "clap": [
            {"pretrained": "laion/clap-htsat-unfused"},
            {"pretrained": "laion/clap-htsat-fused", "long": "fusion"},
            {"pretrained": "laion/clap-htsat-fused", "output": "pooled"},
            {"pretrained": "laion/larger_clap_general", "output": "embedding", "long": "crop"},
            {"architecture": {"padding": "pad", "enable_patch_layer_norm": False}, "output": "embedding"},
        ],
        "clip": [
            {"arch": "ViT-B-32"},
            {"arch": "ViT-L-14-CLIPA", "select_layer": -1, "fit": "pad"},
            {"arch": "ViT-B-16", "fit": "native", "keep_class_token": True},
            {"arch": "EVA02-B-16", "keep_class_token": True, "fit": "squash"},
            {"arch": "RN50", "fit": "crop"},
            {"pretrained": "openai/clip-vit-large-patch14-336"},
            {"pretrained": "google/siglip-so400m-patch14-384", "select_layer": -1},
            {"pretrained": "openai/clip-vit-large-patch14", "select_layer": "pooled"},
            {"pretrained": "google/siglip-base-patch16-224", "select_layer": "pooled"},
            {"arch": "EVA02-B-16", "select_layer": "pooled"},
            {"arch": "RN50", "select_layer": "pooled"},
        ],
        "frames": [
            {"encoder": {"kind": "vit", "pretrained": "google/siglip-so400m-patch14-384"}, "spatial_stride": 2},
            {"encoder": {"kind": "clip", "arch": "ViT-B-16", "fit": "native"}},
            {"encoder": {"kind": "clip", "arch": "ViT-B-16", "fit": "native"}, "pooling": "mean", "spread": "middles"},
            {"encoder": {"kind": "tiled", "encoder": {"kind": "clip", "arch": "ViT-B-32", "fit": "squash"}}},
            {
                "encoder": {"kind": "vit", "pretrained": "google/siglip2-base-patch16-naflex"},
                "frames": 100,
                "pooling": "spatio_temporal",
            },
            {
                "encoder": {
                    "kind": "fused",
                    "encoders": {
                        "clip": {"kind": "clip", "arch": "ViT-B-32"},
                        "dino": {"kind": "vit", "architecture": {"model_type": "dinov2"}},
                    },
                }
            },
        ],
        "fused": [
            {
                "encoders": {
                    "siglip": {"kind": "vit", "pretrained": "google/siglip-so400m-patch14-384", "select_layer": -2},
                    "dino": {"kind": "vit", "architecture": {"model_type": "dinov2"}},
                }
            },
            {
                "encoders": {
                    "naflex": {"kind": "vit", "pretrained": "google/siglip2-base-patch16-naflex"},
                    "native": {"kind": "clip", "arch": "ViT-B-16", "fit": "native"},
                }
            },
            {
                "encoders": {"whisper": {"kind": "whisper", "arch": "large-v2"}, "beats": {"kind": "beats"}},
                "lengths": "pad",
            },
            {
                "encoders": {
                    "clip": {"kind": "clip", "pretrained": "openai/clip-vit-large-patch14"},
                    "siglip": {"kind": "vit", "pretrained": "google/siglip2-base-patch16-naflex"},
                },
                "along": "sequence",
            },
        ],
        "hubert": [
            {"pretrained": "facebook/hubert-base-ls960"},
            {"pretrained": "facebook/hubert-large-ll60k", "select_layer": -2},
            {"pretrained": "facebook/wav2vec2-base-960h"},
            {"pretrained": "microsoft/wavlm-base-plus", "select_layer": -4},
            {"pretrained": "microsoft/wavlm-large"},
            {"architecture": {"conv_pos_batch_norm": True, "feat_proj_layer_norm": False, "do_normalize": False}},
        ],
        "imagebind": [
            {"modality": "image"},
            {"modality": "image", "output": "tokens"},
            {"modality": "video", "clips": 2},
            {"modality": "video", "clips": 1, "output": "tokens"},
            {"modality": "audio"},
            {"modality": "audio", "output": "tokens"},
            {"modality": "audio", "output": "clips"},
            {"modality": "video", "output": "clips", "clips": 2},
            {"modality": "depth"},
            {"modality": "thermal"},
            {"modality": "text"},
            {"modality": "text", "output": "tokens"},
            {"modality": "imu"},
        ],
        "tiled": [
            {"encoder": {"kind": "clip", "pretrained": "openai/clip-vit-large-patch14-336", "fit": "squash"}},
            {"encoder": {"kind": "timm", "arch": "vit_base_patch16_224"}, "overview": False, "row_ends": False},
        ],
        "point_bert": [{}, {"output": "pooled"}, {"output": "embedding", "architecture": {"point_dims": 3}}],
        "timm": [
            {"pretrained": "timm/dm_nfnet_f6.dm_in1k"},
            {"arch": "vit_large_patch14_reg4_dinov2.lvd142m", "select_layer": -2, "select": "cls_patch"},
            {"arch": "mambaout_base", "fit": "squash"},
            {"arch": "resnet50", "select_layer": -3, "norm": True},
        ],
        "videomae": [
            {"pretrained": "MCG-NJU/videomae-base"},
            {"pretrained": "MCG-NJU/videomae-large-finetuned-kinetics", "select_layer": -2, "spread": "middles"},
            {"architecture": {"tubelet_size": 4}, "norm": False},
        ],
        "vit": [
            {"pretrained": "google/vit-base-patch16-224", "select": "cls_patch"},
            {"pretrained": "facebook/deit-base-distilled-patch16-224", "select_layer": -2},
            {"pretrained": "facebook/dinov2-giant", "norm": False},
            {"pretrained": "facebook/dinov2-with-registers-base", "select": "cls", "fit": "crop"},
            {"pretrained": "facebook/dinov3-vith16plus-pretrain-lvd1689m", "select_layer": -2, "norm": True},
            {"pretrained": "google/siglip-so400m-patch14-384", "select_layer": -2, "fit": "squash"},
            {"pretrained": "google/siglip2-base-patch16-naflex"},
            {"architecture": {"model_type": "ijepa"}, "fit": "pad"},
        ],
        "vjepa2": [
            {"pretrained": "facebook/vjepa2-vitl-fpc64-256"},
            {"pretrained": "facebook/vjepa2-vitg-fpc64-384", "select_layer": -2},
        ],
        "whisper": [{"arch": "large-v3"}, {"pretrained": "openai/whisper-tiny", "select_layer": -2}],
    },
    "input_projector": {
        "linear": [{}, {"stack": 3}, {"expand": 4}],
        "mlp": [
            {},
            {"activation": "swiglu", "bias": False, "stack": 8},
            {"depth": 3, "stack": 4, "norm": True},
            {"stack": 2, "expand": 3},
        ],
        "qformer": [
            {},
            {"norm": True, "num_queries": 2, "cross_attention_every": 1},
            {"window": 4, "num_queries": 1, "extra_queries": 3},
            {"window": 3, "stride": 2},
        ],
        "mq_former": [{"queries": {"clip": 32, "dino": 8}}, {"queries": {"a": 1, "b": 1, "c": 1}}],
        "temporal_qformer": [
            {},
            {"norm": True},
            {"frame": {"norm": True, "num_queries": 3}, "clip": {"extra_queries": 2}},
        ],
        "cross_attention": [{}, {"num_queries": 3}],
        "group": [{}, {"num_group_tokens": [3], "num_output_groups": [5], "depths": [2, 1]}],
        "pixel_shuffle": [{}, {"factor": 3, "depth": 1, "bias": False}, {"norm": True, "activation": "swiglu"}],
        "pool": [{"factor": 2}, {"size": [2, 3], "depth": 3, "activation": "relu"}],
        "ldp": [{}, {"size": [2, 5]}],
    },
    "fusion": {
        "gated_cross_attention": [
            {},
            {"norm": "rms", "feedforward": "swiglu", "qk_norm": True, "gates": "vector", "media_dim": 20},
        ]
    },
    "backbone": {
        "seq2seq": [{}, {"architecture": {"model_type": "bart"}}],
        "causal_lm": [
            {"pretrained": "lmsys/vicuna-7b-v1.5"},
            {"architecture": {"model_type": "qwen3"}},
            {"architecture": {"model_type": "gpt2"}, "adapter": {"kind": "lora"}},
            {"architecture": {"model_type": "opt"}, "tie_signals": True},
        ],
    },
    "output_projector": {
        "linear": [{}],
        "mlp": [{}, {"depth": 3}],
        "tiny_transformer": [{}],
        "qformer": [{}, {"cross_attention_every": 2, "num_layers": 2}],
    },
    "generator": {
        "stable_diffusion": [
            {},
            {"architecture": {"pipeline": "StableDiffusionXLPipeline"}, "scheduler": "EulerDiscreteScheduler"},
            {"architecture": {"pipeline": "StableDiffusion3Pipeline"}, "condition_length": 20},
            {"architecture": {"pipeline": "FluxPipeline"}},
            {"architecture": {"pipeline": "SanaPipeline"}, "width": 32, "height": 32},
        ],
        "audio_diffusion": [
            {},
            {"architecture": {"pipeline": "AudioLDM2Pipeline"}},
            {"architecture": {"pipeline": "StableAudioPipeline"}},
        ],
        "vq": [{}, {"pretrained": "amused/amused-256", "subfolder": "vqvae", "pixel_range": [0, 1]}],
        "audio_codec": [{}, {"architecture": {"model": "DacModel"}, "codebooks": 3}],
        "video_diffusion": [{"num_frames": 5}, {"architecture": {"pipeline": "WanPipeline"}, "num_frames": 5}],
    },
    "adapter": {
        "lora": [{}, {"targets": ["q_proj", "v_proj"], "dropout": 0.1}],
        "ia3": [{}, {"targets": ["q_proj", "up_proj", "down_proj"], "feedforward": ["down_proj"]}],
        "prefix_tuning": [{}, {"projection_dim": 5}],
        "adapter": [
            {},
            {"placement": "parallel", "targets": ["mlp"], "scale": 4.0, "activation": "gelu", "dropout": 0.1},
        ],
    },
}
# Examples of modalities that have no files.
MEDIA: dict[str, list[Any]] = {
    "text": ["", "a dog", "a long story " * 40],
    "imu": [np.ones((6, 1)), np.linspace(-1, 1, 600).reshape(6, 100)],
}
CASES = [
    (f, kind, example) for f, kinds in EXAMPLES.items() for kind, examples in kinds.items() for example in examples
]


def test_every_registered_kind_has_an_example() -> None:
    assert {family: set(EXAMPLES[family]) for family in FAMILIES} == {
        family: set(BUILTIN[family]) for family in FAMILIES
    }


@pytest.mark.parametrize(("family", "kind", "example"), CASES, ids=[f"{k}-{i}" for i, (_, k, _) in enumerate(CASES)])
def test_contract(family: str, kind: str, example: dict[str, Any]) -> None:
    media = MEDIA.get(example.get("modality", ""))
    check_component(component_class(family, kind).model_validate(example), media=media)


@pytest.mark.parametrize(
    "adapter", [LoraConfig(), IA3Config(), BottleneckConfig(), BottleneckConfig(placement="parallel")]
)
def test_most_adapters_start_as_the_base_model(adapter: AdapterConfig) -> None:
    """B and `up` start at zero, scales at one. Measured 0; allowed 0."""
    base = CausalLMConfig().tiny().build(BuildContext(weights=False), num_new_tokens=0).model.eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        found = adapter.tiny().attach(base).model.eval()(input_ids=ids).logits
    assert torch.equal(found, expected)


# Components with one fault each: the check must name the clause.
class Leaky(Projector):
    """Averages over the padding too."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, output_dim)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(features.mean(1, keepdim=True)), torch.ones(len(features), 1, dtype=torch.bool)


class Unused(Leaky):
    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__(input_dim, output_dim)
        self.forgotten = nn.Parameter(torch.zeros(2))

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mean = (features * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        return self.linear(mean), torch.ones(len(features), 1, dtype=torch.bool)


class FaultyConfig(ProjectorConfig):
    kind: str = "faulty"
    module: str = "Unused"
    outputs: int = 1

    def num_outputs(self, length: int) -> int:
        return self.outputs

    def tiny(self) -> FaultyConfig:
        return self

    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> Projector:
        return {"Leaky": Leaky, "Unused": Unused}[self.module](input_dim, output_dim).to(context.dtype)


@pytest.mark.parametrize(
    ("config", "clause"),
    [
        (FaultyConfig(module="Leaky"), "features behind the mask never influence real outputs"),
        (FaultyConfig(module="Unused"), "gradients reach every parameter"),
        (FaultyConfig(outputs=0), "num_outputs is at least 1"),
        (FaultyConfig(outputs=2), r"outputs are \(N, Q, output_dim\)"),
    ],
)
def test_projector_faults_are_named(config: FaultyConfig, clause: str) -> None:
    with pytest.raises(ContractError, match=f"input_projector 'faulty' breaks the clause “{clause}”"):
        check_component(config)


class Miscounting(WhisperPreprocessor):
    def num_tokens(self, item: dict[str, Tensor]) -> int:
        return super().num_tokens(item) + 1


class Random(WhisperPreprocessor):
    def __call__(self, media: Any) -> dict[str, Tensor]:
        item = super().__call__(media)
        return {**item, "mels": item["mels"] + torch.randn(())}


@pytest.mark.parametrize(
    ("preprocessor", "clause"),
    [(Miscounting, "num_tokens is the number of real features"), (Random, "preprocessing is deterministic")],
)
def test_encoder_faults_are_named(preprocessor: Any, clause: str) -> None:
    class Faulty(WhisperConfig):
        def tiny(self) -> Faulty:
            return Faulty.model_validate(super().tiny().model_dump())

        def preprocessor(self, context: BuildContext) -> WhisperPreprocessor:
            return preprocessor(16, 25, 600.0)  # type: ignore[no-any-return]

    with pytest.raises(ContractError, match=clause):
        check_component(Faulty(arch="tiny"))


def test_a_config_that_does_not_survive_a_dump() -> None:
    class Forgetful(ClipConfig):
        def model_dump(self, **options: Any) -> dict[str, Any]:
            return {**super().model_dump(**options), "fit": "pad"}

    with pytest.raises(ContractError, match="a config survives dump and load"):
        check_component(Forgetful(arch="ViT-B-32"))


def test_other_families_are_refused() -> None:
    from mmllm.config.families import AnyReader

    reader = TypeAdapter(AnyReader).validate_python({"kind": "messages", "path": "data.jsonl"})
    with pytest.raises(TypeError, match="expected one of encoder, input_projector, fusion, output_projector"):
        check_component(reader)


def clauses(file: Path) -> set[str]:
    """The clauses that a module checks: what stands as text in its calls, or goes there by way of `clause`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).lstrip("_") in ("require", "equal", "check_prefix"):
            texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            found |= {
                text for text in texts[:1] if isinstance(text, str) and "clause" not in map(ast.unparse, node.args)
            }
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "clause":
            found.add(ast.literal_eval(node.value))
        elif isinstance(node, ast.For) and "clause" in ast.unparse(node.target):
            found |= {part.value for part in ast.walk(node.iter) if isinstance(part, ast.Constant)}
    return found


def test_the_table_in_the_docs_has_every_clause() -> None:
    package, docs = Path(mmllm.__file__).parent, Path(__file__).parent.parent / "docs" / "components.md"
    checked = clauses(package / "testing.py") | clauses(package / "contract_of_generators.py")
    assert len(checked) > 50
    rows = [line.split("|") for line in docs.read_text().splitlines() if line.count("|") == 4]
    cells = {row[2].split("(it is sent")[0].split("(other codes")[0].strip() for row in rows}
    assert not checked - cells, "clauses without a row in docs/components.md"
    assert not cells - checked - {"clause", "---"}, "rows of no clause"
