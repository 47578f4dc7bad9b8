"""The clip encoder equals open_clip and transformers at every layer, on tiny checkpoints written by those libraries.

Float32, CPU. Each tolerance stands beside the largest difference seen when it was set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mmllm.config.base import BuildContext
from mmllm.encoders.clip import ClipConfig

LAYERS = 3
TEXT = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
VIT = {"layers": LAYERS, "width": 32, "head_width": 8, "mlp_ratio": 2.0, "patch_size": 8, "image_size": 32}
HF_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 8,
}
TOWERS: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "clipa": {**VIT, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "layer_scale": {**VIT, "ls_init_value": 0.1},
    "coca": {**VIT, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 64},
    "timm_vit": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
    "timm_convnext": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
}


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 60), (100, 25), (32, 32))
    ]


def write_open_clip(
    folder: Path, vision: dict[str, Any], *, quick_gelu: bool = False, dtype: torch.dtype = torch.float32
) -> Any:
    """A tiny CLIP in open_clip's layout; returns open_clip's own model of it."""
    import open_clip

    model_cfg = {"embed_dim": 16, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": TEXT}
    model = open_clip.CLIP(**model_cfg)
    for parameter in model.parameters():  # away from the zeros that residual branches start from
        torch.nn.init.normal_(parameter, std=0.15) if parameter.ndim < 2 else torch.nn.init.normal_(parameter, std=0.08)
    folder.mkdir()
    preprocess = {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
        "interpolation": "bilinear",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    state = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return model.eval()


def ours(folder: Path, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Our features of ``pictures()`` with their mask, and the batch."""
    config = ClipConfig(pretrained="./" + folder.name, **options)
    context = BuildContext(root=folder.parent)
    preprocess = config.preprocessor(context)
    batch = preprocess.collate([preprocess(picture) for picture in pictures()])
    with torch.no_grad():
        features, mask = config.build(context)(batch)
    return features, mask, batch


@pytest.mark.parametrize("name", TOWERS)
def test_open_clip_towers(tmp_path: Path, name: str) -> None:
    """Measured: 0 for every tower (the same operations); allowed 1e-6."""
    reference = write_open_clip(tmp_path / "clip", TOWERS[name], quick_gelu=name == "clipa").visual
    for select_layer in (-1, -2, -3):
        features, mask, batch = ours(tmp_path / "clip", select_layer=select_layer)
        levels = {"resnet": 5, "timm_vit": 6, "timm_convnext": 4}.get(name, LAYERS)
        with torch.no_grad():
            options = {"stop_early": False, "intermediates_only": True, "output_fmt": "NCHW"}
            expected = reference.forward_intermediates(batch["pixels"], indices=list(range(levels)), **options)
        expected = expected["image_intermediates"][select_layer].flatten(2).transpose(1, 2)
        assert mask.all()
        torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", TOWERS)
def test_open_clip_pooled(tmp_path: Path, name: str) -> None:
    """The tower's own pooling without the projection. Measured: 0 for every tower; allowed 1e-6."""
    reference = write_open_clip(tmp_path / "clip", TOWERS[name], quick_gelu=name == "clipa").visual
    features, mask, batch = ours(tmp_path / "clip", select_layer="pooled")
    reference.proj, reference.output_tokens = None, False
    with torch.no_grad():
        expected = (reference.trunk if name.startswith("timm") else reference)(batch["pixels"])
    assert features.shape == (3, 1, expected.shape[1])
    assert mask.all()
    torch.testing.assert_close(features[:, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["vit", "timm_vit"])
def test_open_clip_class_token(tmp_path: Path, name: str) -> None:
    """Measured: 0; allowed 1e-6."""
    reference = write_open_clip(tmp_path / "clip", TOWERS[name]).visual
    features, _, batch = ours(tmp_path / "clip", keep_class_token=True)
    with torch.no_grad():
        found = reference.forward_intermediates(
            batch["pixels"], indices=[4 if name == "timm_vit" else 1], intermediates_only=True, output_extra_tokens=True
        )
    torch.testing.assert_close(features[:, :1], found["image_intermediates_prefix"][0], atol=1e-6, rtol=0)
    patches = found["image_intermediates"][0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(features[:, 1:], patches, atol=1e-6, rtol=0)


def test_open_clip_preprocessing(tmp_path: Path) -> None:
    """Measured: 0; allowed 0: the checkpoint's own transform is used."""
    import open_clip

    write_open_clip(tmp_path / "clip", VIT)
    _, _, batch = ours(tmp_path / "clip")
    name = f"local-dir:{tmp_path / 'clip'}"
    _, _, transform = open_clip.create_model_and_transforms(name)
    assert torch.equal(batch["pixels"], torch.stack([transform(picture) for picture in pictures()]))


def test_visual_tensors_alone_suffice(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_open_clip(tmp_path / "clip", VIT)
    before, _, _ = ours(tmp_path / "clip")
    path = tmp_path / "clip" / "open_clip_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k.startswith("visual.")}, path)
    assert torch.equal(ours(tmp_path / "clip")[0], before)


def test_half_precision_checkpoint(tmp_path: Path) -> None:
    """Measured 3.9e-4 in float32 (the weights were rounded to fp16), 1.5e-2 in bfloat16; allowed 2e-3 and 6e-2."""
    reference = write_open_clip(tmp_path / "clip", VIT, dtype=torch.float16).visual
    features, _, batch = ours(tmp_path / "clip", select_layer=-1)
    with torch.no_grad():
        found = reference.forward_intermediates(batch["pixels"], indices=[2], intermediates_only=True, output_fmt="NLC")
    expected = found["image_intermediates"][0]
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, atol=2e-3, rtol=0)
    context = BuildContext(root=tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        low, _ = ClipConfig(pretrained="./clip", select_layer=-1).build(context)(batch)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, atol=6e-2, rtol=0)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("saved", ["CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_transformers_clip(tmp_path: Path, saved: str, activation: str) -> None:
    """Every hidden state, class token included. Measured 9.5e-7 (another order of sums); allowed 5e-6."""
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    vision |= {
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": activation,
        "layer_norm_eps": 1e-4,
        "initializer_range": 0.2,
    }
    config = transformers.CLIPVisionConfig(**vision)
    if saved == "CLIPModel":
        config = transformers.CLIPConfig(vision_config=vision, text_config=HF_TEXT, projection_dim=8)
    model = getattr(transformers, saved)(config).eval()
    model.save_pretrained(tmp_path / "clip")
    tower = model if saved == "CLIPVisionModel" else model.vision_model
    for select_layer in (-1, -2, -3):
        features, _, batch = ours(tmp_path / "clip", select_layer=select_layer, keep_class_token=True)
        with torch.no_grad():
            expected = tower(batch["pixels"], output_hidden_states=True).hidden_states[select_layer]
        torch.testing.assert_close(features, expected, atol=5e-6, rtol=0)
    features, _, batch = ours(tmp_path / "clip", select_layer="pooled")
    with torch.no_grad():
        expected = tower(batch["pixels"]).pooler_output[:, None]
    torch.testing.assert_close(features, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("saved", ["SiglipModel", "SiglipVisionModel"])
def test_transformers_siglip(tmp_path: Path, saved: str) -> None:
    """Measured 0 (their own module); allowed 1e-6."""
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    config = transformers.SiglipVisionConfig(**vision)
    if saved == "SiglipModel":
        config = transformers.SiglipConfig(vision_config=vision, text_config=HF_TEXT)
    model = getattr(transformers, saved)(config).eval()
    model.save_pretrained(tmp_path / "siglip")
    tower = model if saved == "SiglipVisionModel" else model.vision_model
    for select_layer in (-1, -2, -3):
        features, _, batch = ours(tmp_path / "siglip", select_layer=select_layer)
        assert batch["pixels"].shape == (3, 3, 32, 32)
        with torch.no_grad():
            seen = tower.embeddings(batch["pixels"])
            for layer in tower.encoder.layers[: LAYERS + 1 + select_layer]:
                seen = layer(seen, None)
        torch.testing.assert_close(features, seen, atol=1e-6, rtol=0)
    features, _, batch = ours(tmp_path / "siglip", select_layer="pooled")
    with torch.no_grad():
        torch.testing.assert_close(features[:, 0], tower(batch["pixels"]).pooler_output, atol=1e-6, rtol=0)


def test_transformers_preprocessing(tmp_path: Path) -> None:
    """Against ``CLIPImageProcessor``. Measured 0.0196, one grey level (it resizes tensors); allowed 0.025."""
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    config.image_size, config.patch_size = 32, 8
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = transformers.CLIPImageProcessor(**size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    processor.save_pretrained(tmp_path / "clip")
    _, _, batch = ours(tmp_path / "clip")
    expected = processor(pictures(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixels"], expected, atol=0.025, rtol=0)


def test_native_equals_the_fixed_square(tmp_path: Path) -> None:
    """On the square the checkpoint was made for. Measured 1.8e-7 (a product instead of a convolution); allowed 5e-6."""
    write_open_clip(tmp_path / "clip", VIT)
    square, _, _ = ours(tmp_path / "clip", keep_class_token=True)
    native, mask, _ = ours(tmp_path / "clip", keep_class_token=True, fit="native")
    assert mask[2].sum() == 17
    torch.testing.assert_close(native[2, :17], square[2], atol=5e-6, rtol=0)
