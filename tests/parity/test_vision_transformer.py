"""The vit encoder equals transformers' image processors and vision models at every layer.

Float32, CPU, tiny random checkpoints written by ``save_pretrained``. Each tolerance stands beside the largest difference
seen when it was set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmllm.config.base import BuildContext
from mmllm.encoders.vision_transformer import VitConfig

LAYERS = 3
NUMBERS = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.2, "hidden_dropout_prob": 0.3, "attention_dropout": 0.3, "drop_path_rate": 0.3,
}  # fmt: skip
# Model, its own numbers, its image processor with its settings, and the tokens before the patches.
MODELS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], int]] = {
    "vit": ("ViTModel", {}, "ViTImageProcessor", {"size": {"height": 32, "width": 32}}, 1),
    "deit": (
        "DeiTModel", {}, "DeiTImageProcessor",
        {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}, 2,
    ),
    "dinov2": (
        "Dinov2Model", {"image_size": 48, "use_swiglu_ffn": True}, "BitImageProcessor",
        {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}, 1,
    ),
    "registers": (
        "Dinov2WithRegistersModel", {"num_register_tokens": 3}, "BitImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 2}, 4,
    ),
    "dinov3": (
        "DINOv3ViTModel", {"num_register_tokens": 4, "use_gated_mlp": True}, "DINOv3ViTImageProcessor",
        {"size": {"height": 32, "width": 32}}, 5,
    ),
    "siglip": ("SiglipVisionModel", {}, "SiglipImageProcessor", {"size": {"height": 32, "width": 32}}, 0),
    "clip": (
        "CLIPVisionModel", {}, "CLIPImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, 1,
    ),
    "beit": ("BeitModel", {"use_shared_relative_position_bias": True}, "BeitImageProcessor",
             {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}, 1),
    "aimv2": ("Aimv2VisionModel", {}, "CLIPImageProcessor",
              {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}, 0),
    "ijepa": ("IJepaModel", {}, "ViTImageProcessor", {"size": {"height": 32, "width": 32}}, 0),
}  # fmt: skip


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    shapes = ((40, 60), (100, 25), (32, 32))
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


def random_model(cls: Any, numbers: dict[str, Any]) -> Any:
    """A model of which no parameter is at a trivial value."""
    torch.manual_seed(0)
    known = cls.config_class()
    model = cls(cls.config_class(**{name: value for name, value in numbers.items() if hasattr(known, name)})).eval()
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn_like(value)
    return model


def write(name: str, folder: Path) -> tuple[Any, Any, int]:
    """The reference processor and model, saved, and the number of tokens before the patches."""
    import transformers

    model_name, own, processor_name, settings, prefix = MODELS[name]
    model = random_model(getattr(transformers, model_name), NUMBERS | own)
    processor = getattr(transformers, processor_name)(
        image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3], **settings
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor, model, prefix


def ours(folder: Path, **options: Any) -> tuple[Tensor, Any]:
    """Our features of ``pictures()``, and the batch."""
    config, context = VitConfig(pretrained=str(folder), **options), BuildContext()
    preprocess = config.preprocessor(context)
    items = [preprocess(picture) for picture in pictures()]
    batch = preprocess.collate(items)
    with torch.no_grad():
        features, mask = config.build(context).train()(batch)
    assert mask.sum(1).tolist() == [preprocess.num_tokens(item) for item in items]
    return features, batch


@pytest.mark.parametrize("name", MODELS)
def test_every_layer(name: str, tmp_path: Path) -> None:
    """With its norm and without, in the encoder's training mode. Measured 0 (their own modules); allowed 1e-5."""
    processor, model, prefix = write(name, tmp_path)
    pixels = processor(pictures(), return_tensors="pt")["pixel_values"]
    model.config.tie_last_hidden_states = False  # so that the last of them is the last block's output
    with torch.no_grad():
        reference = model(pixels, output_hidden_states=True)
    for layer in range(-LAYERS, 0):
        features, batch = ours(tmp_path, select_layer=layer, norm=False)
        assert torch.equal(batch["pixels"], pixels)
        torch.testing.assert_close(features, reference.hidden_states[layer][:, prefix:], atol=1e-5, rtol=0)
    last = reference.last_hidden_state
    torch.testing.assert_close(ours(tmp_path)[0], last[:, prefix:], atol=1e-5, rtol=0)
    if prefix:
        torch.testing.assert_close(ours(tmp_path, select="cls")[0], last[:, :1], atol=1e-5, rtol=0)
        both = torch.cat([last[:, :1], last[:, prefix:]], dim=1)
        torch.testing.assert_close(ours(tmp_path, select="cls_patch")[0], both, atol=1e-5, rtol=0)


def test_an_earlier_layer_with_the_final_norm(tmp_path: Path) -> None:
    """As DINOv2's own ``get_intermediate_layers(norm=True)``. Measured 0 (their own modules); allowed 1e-5."""
    processor, model, prefix = write("dinov2", tmp_path)
    with torch.no_grad():
        seen = model(**processor(pictures(), return_tensors="pt"), output_hidden_states=True).hidden_states[-2]
        expected = model.layernorm(seen)[:, prefix:]
    torch.testing.assert_close(ours(tmp_path, select_layer=-2, norm=True)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "siglip"])
def test_another_size(name: str, tmp_path: Path) -> None:
    """The model's own interpolation of positions. Measured 0 (their own modules); allowed 1e-5."""
    _, model, prefix = write(name, tmp_path)
    features, batch = ours(tmp_path, image_size=64)
    assert batch["pixels"].shape == (3, 3, 64, 64)
    options = {"interpolate_pos_encoding": True} if name in ("vit", "siglip") else {}
    with torch.no_grad():
        expected = model(batch["pixels"], **options).last_hidden_state[:, prefix:]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "saved", ["SiglipModel", "CLIPModel", "ViTForImageClassification", "Dinov2ForImageClassification"]
)
def test_the_tower_of_a_larger_checkpoint(saved: str, tmp_path: Path) -> None:
    """Text towers and heads are left out. Measured 0 (their own modules); allowed 1e-5."""
    import transformers

    cls = getattr(transformers, saved)
    numbers: dict[str, Any] = dict(NUMBERS)
    if saved.endswith("Model"):
        text = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 8,
        }
        numbers = {"vision_config": numbers, "text_config": text}
    model = random_model(cls, numbers)
    model.save_pretrained(tmp_path)
    tower = model.vision_model if saved.endswith("Model") else model.base_model
    features, batch = ours(tmp_path, select_layer=-1)
    with torch.no_grad():
        expected = tower(batch["pixels"]).last_hidden_state
    torch.testing.assert_close(features, expected[:, expected.shape[1] - 16 :], atol=1e-5, rtol=0)


def test_naflex_keeps_the_aspect_ratio(tmp_path: Path) -> None:
    """Patches, mask and features of SigLIP 2's own classes. Measured 0 (their own modules); allowed 1e-5."""
    import transformers

    numbers = {name: value for name, value in NUMBERS.items() if name != "image_size"} | {"num_patches": 16}
    model = random_model(transformers.Siglip2VisionModel, numbers)
    model.save_pretrained(tmp_path)
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=20)
    processor.save_pretrained(tmp_path)
    inputs = processor(pictures(), return_tensors="pt")
    model.config.tie_last_hidden_states = False
    with torch.no_grad():
        reference = model(**inputs, output_hidden_states=True)
    real = inputs["pixel_attention_mask"].bool()
    for options, expected in (
        ({}, reference.last_hidden_state),
        ({"select_layer": -2}, reference.hidden_states[-2]),
    ):
        features, batch = ours(tmp_path, **options)
        assert torch.equal(batch["mask"], real)
        torch.testing.assert_close(features[real], expected[real], atol=1e-5, rtol=0)
        assert not features[~real].any()
    preprocess = VitConfig(pretrained=str(tmp_path)).preprocessor(BuildContext())
    grids = [preprocess.grid(preprocess(picture)) for picture in pictures()]
    assert grids == [tuple(shape) for shape in inputs["spatial_shapes"].tolist()]


def test_half_precision(tmp_path: Path) -> None:
    """Allowed 6e-2 of the largest value."""
    processor, model, prefix = write("dinov2", tmp_path)
    with torch.no_grad():
        expected = model(**processor(pictures(), return_tensors="pt")).last_hidden_state[:, prefix:]
        context = BuildContext(dtype=torch.bfloat16)
        config = VitConfig(pretrained=str(tmp_path))
        preprocess = config.preprocessor(context)
        found, _ = config.build(context)(preprocess.collate([preprocess(picture) for picture in pictures()]))
    assert found.dtype == torch.bfloat16
    off = (found.float() - expected).abs().max() / expected.abs().max()
    assert off < 6e-2
