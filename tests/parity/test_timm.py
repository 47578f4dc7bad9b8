"""The timm encoder equals timm's transforms, ``forward_features`` and ``forward_intermediates``.

Float32, CPU, timm's own test models at random values, written by timm. Each tolerance stands beside the largest
difference seen when it was set.
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
from mmllm.encoders.timm_backbone import TimmConfig

# Name and number of tokens before the patches: a class token, a register, none.
MODELS = {"test_vit": 1, "test_vit3": 1, "test_nfnet": 0, "test_convnext": 0, "test_resnet": 0, "test_mambaout": 0}
NHWC = {"test_mambaout"}


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in ((40, 60), (100, 25))]


def write(name: str, folder: Path, **arguments: Any) -> Any:
    """timm's model in timm's layout, as timm reads it back."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5, **arguments)
    with torch.no_grad():
        for value in model.parameters():  # away from the zeros that residual branches start from
            value += 0.1 * torch.randn_like(value)
        for key, value in model.named_buffers():
            if "running" in key:
                value += 0.3 * torch.rand_like(value)
    save_for_hf(model, str(folder), safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def ours(folder: Path, **options: Any) -> tuple[Tensor, Tensor]:
    config, context = TimmConfig(pretrained=str(folder), **options), BuildContext()
    preprocess = config.preprocessor(context)
    items = [preprocess(picture) for picture in pictures()]
    batch = preprocess.collate(items)
    with torch.no_grad():
        features, mask = config.build(context).train()(batch)
    assert mask.sum(1).tolist() == [preprocess.num_tokens(item) for item in items]
    return features, batch["pixels"]


def flat(level: Tensor) -> Tensor:
    return level.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", MODELS)
def test_every_level(name: str, tmp_path: Path) -> None:
    """In the encoder's training mode, so without moving statistics. Measured 0 (their own modules); allowed 1e-5."""
    import timm

    reference = write(name, tmp_path)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(reference), is_training=False)
    pixels = torch.stack([transform(picture) for picture in pictures()])
    with torch.no_grad():
        output, levels = reference.forward_intermediates(pixels)
        assert torch.equal(output, reference.forward_features(pixels))
    for layer in range(-len(levels), 0):
        features, seen = ours(tmp_path, select_layer=layer, norm=False)
        assert torch.equal(seen, pixels)
        torch.testing.assert_close(features, flat(levels[layer]), atol=1e-5, rtol=0)
    prefix = MODELS[name]
    if output.ndim == 4:
        output = output.flatten(1, 2) if name in NHWC else flat(output)
    torch.testing.assert_close(ours(tmp_path)[0], output[:, prefix:], atol=1e-5, rtol=0)


def test_the_class_token_without_registers(tmp_path: Path) -> None:
    """Of the output, and of a level with the final norm. Measured 0 (their own modules); allowed 1e-5."""
    reference = write("test_vit", tmp_path, reg_tokens=2)
    both, pixels = ours(tmp_path, select="cls_patch")
    with torch.no_grad():
        output = reference.forward_features(pixels)
        ((level, before),) = reference.forward_intermediates(
            pixels, indices=[-2], norm=True, return_prefix_tokens=True, intermediates_only=True
        )
    torch.testing.assert_close(both, torch.cat([output[:, :1], output[:, 3:]], dim=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(tmp_path, select="cls")[0], output[:, :1], atol=1e-5, rtol=0)
    found, _ = ours(tmp_path, select_layer=-2, norm=True, select="cls_patch")
    torch.testing.assert_close(found, torch.cat([before[:, :1], flat(level)], dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["test_vit", "test_nfnet"])
def test_another_size(name: str, tmp_path: Path) -> None:
    """Measured 0 (their own modules); allowed 1e-5."""
    reference = write(name, tmp_path)
    features, pixels = ours(tmp_path, image_size=96, norm=False)
    assert pixels.shape[2:] == (96, 96)
    if name == "test_vit":
        reference.set_input_size((96, 96))
    with torch.no_grad():
        expected = reference.forward_intermediates(pixels, intermediates_only=True)[-1]
    torch.testing.assert_close(features, flat(expected), atol=1e-5, rtol=0)
