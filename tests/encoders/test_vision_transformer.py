"""The vit encoder: sizes of published checkpoints, fits, gradients, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from mmllm.config.base import BuildContext
from mmllm.encoders.vision_transformer import VitConfig
from mmllm.errors import CheckpointError, ConfigError

NO_WEIGHTS = BuildContext(weights=False)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}

# Millions of parameters on the cards of the same weights in timm's layout (timm/vit_base_patch14_dinov2.lvd142m, …), which
# have no heads; DINOv3's README has 840 and 6716 too.
PUBLISHED = {
    "google/vit-base-patch16-224": 85.8,
    "facebook/dinov2-small": 22.1,
    "facebook/dinov2-base": 86.6,
    "facebook/dinov2-giant": 1136.5,
    "facebook/dinov2-with-registers-large": 304.4,
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": 28.7,
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": 840.5,
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": 6716.0,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_checkpoints_have_the_published_size(name: str) -> None:
    with torch.device("meta"):
        encoder = VitConfig(pretrained=name).build(NO_WEIGHTS)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], rel=2e-3)


def test_tokens_of_known_checkpoints() -> None:
    """DINOv2 is trained on 518 pixels, but its image processor gives 224."""
    found = {
        name: VitConfig(pretrained=name).preprocessor(NO_WEIGHTS).grid({})  # type: ignore[attr-defined]
        for name in ("facebook/dinov2-base", "google/siglip-so400m-patch14-384", "facebook/dino-vits8")
    }
    assert list(found.values()) == [(16, 16), (27, 27), (28, 28)]


@pytest.mark.parametrize(("fit", "corner", "middle"), [("crop", 1.0, 1.0), ("pad", 0.0, 1.0), ("squash", -1.0, 1.0)])
def test_fits(fit: str, corner: float, middle: float) -> None:
    """A wide black picture with a white square in its middle; the processor's mean and deviation are 0.5."""
    picture = Image.new("RGB", (96, 32))
    picture.paste((255, 255, 255), (32, 0, 64, 32))
    config = VitConfig.model_validate({"architecture": {"model_type": "vit", **SMALL}, "fit": fit})
    pixels = config.preprocessor(NO_WEIGHTS)(picture)["pixels"]
    assert pixels.shape == (3, 32, 32)
    assert float(pixels[0, 0, 1]) == pytest.approx(corner, abs=0.01)
    assert float(pixels[0, 16, 16]) == pytest.approx(middle, abs=0.01)


@pytest.mark.parametrize(
    "model_type", ["vit", "dinov2_with_registers", "siglip_vision_model", "clip_vision_model", "beit"]
)
@pytest.mark.parametrize("layer", [-1, -2])
def test_every_parameter_has_a_gradient(model_type: str, layer: int) -> None:
    """Poolings, mask tokens, heads and the norm behind what is read are not part of the module."""
    config = VitConfig(architecture={"model_type": model_type, **SMALL}, select_layer=layer)
    encoder = config.build(NO_WEIGHTS).train()
    features, _ = encoder({"pixels": torch.randn(2, 3, 32, 32)})
    (features * torch.randn_like(features)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretrained": "someone/vit"}, "architecture: unknown for 'someone/vit' without reading it"),
        ({"architecture": {"model_type": "dinov4"}}, "architecture.model_type: transformers has no model 'dinov4'"),
        ({"architecture": {"hidden_size": 32}}, "architecture.model_type: required, but not given"),
        ({"architecture": {"model_type": "vit", "hidden_sise": 3}}, "architecture.hidden_sise: unknown to transformers'"),
        ({"architecture": {"model_type": "convnext"}}, "use the encoder `timm` for others"),
        ({"architecture": {"model_type": "llama"}}, "use the encoder `timm` for others"),
        ({"architecture": {"model_type": "vit_mae", **SMALL}}, r"expected a token for each of 4 x 4 patches"),
        ({"architecture": {"model_type": "vit", **SMALL}, "select_layer": -3}, "select_layer: found -3, expected -2 to -1"),
        ({"architecture": {"model_type": "siglip_vision_model", **SMALL}, "select": "cls"}, "select: this model has no cl"),
        ({"pretrained": "google/siglip2-base-patch16-naflex", "fit": "pad"}, "fit: this model keeps the picture's aspect"),
    ],
)  # fmt: skip
def test_what_is_unknown_or_impossible(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VitConfig.model_validate(given).build(NO_WEIGHTS)


def test_no_architecture_at_all() -> None:
    with pytest.raises(ValidationError, match="give `pretrained`, or `architecture`"):
        VitConfig()


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no folder"):
        VitConfig(pretrained=str(tmp_path / "absent")).build(BuildContext())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", **SMALL}))
    with pytest.raises(CheckpointError, match="found no safetensors weights"):
        VitConfig(pretrained=str(tmp_path)).build(BuildContext())
    with pytest.raises(ConfigError, match=r"architecture.hidden_size: is 48, but .* has 32"):
        VitConfig(pretrained=str(tmp_path), architecture={"model_type": "vit", "hidden_size": 48}).build(BuildContext())


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    import transformers

    numbers = {"num_hidden_layers": 1, "intermediate_size": 32}
    transformers.ViTModel(transformers.ViTConfig(**SMALL | numbers)).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"does not fit the architecture: no .* more"):
        VitConfig(pretrained=str(tmp_path)).build(BuildContext())
