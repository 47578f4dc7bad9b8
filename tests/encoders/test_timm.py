"""The timm encoder: names, sizes of published backbones, what is left out, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mmllm.config.base import BuildContext
from mmllm.encoders.timm_backbone import TimmConfig
from mmllm.errors import CheckpointError, ConfigError

NO_WEIGHTS = BuildContext(weights=False)


def test_nfnet_f6_has_the_published_size() -> None:
    """438.4M in arXiv 2102.06171, of which 3072 x 1000 + 1000 are the classifier, left out here."""
    config = TimmConfig(pretrained="timm/dm_nfnet_f6.dm_in1k")
    with torch.device("meta"):
        encoder = config.build(NO_WEIGHTS)
    count = sum(p.numel() for p in encoder.parameters())
    assert count + 3072 * 1000 + 1000 == pytest.approx(438.4e6, rel=1e-3)
    preprocess = config.preprocessor(NO_WEIGHTS)
    assert encoder.output_dim == 3072
    assert preprocess.grid({}) == (14, 14)  # 448 pixels, a thirty-second each
    assert preprocess.num_tokens({}) == 196


def test_the_shape_of_prismatics_towers() -> None:
    """27 x 27 patches of 14 pixels from both, DINOv2's positions interpolated from 37 x 37 (arXiv 2402.07865)."""
    for name, width in (("vit_large_patch14_reg4_dinov2.lvd142m", 1024), ("vit_so400m_patch14_siglip_384.webli", 1152)):
        config = TimmConfig(pretrained=f"timm/{name}", select_layer=-2, image_size=384)
        with torch.device("meta"):
            encoder = config.build(NO_WEIGHTS)
        assert encoder.output_dim == width
        assert config.preprocessor(NO_WEIGHTS).grid({}) == (27, 27)


@pytest.mark.parametrize("arch", ["test_vit", "test_nfnet", "test_convnext", "test_mambaout"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_every_parameter_has_a_gradient(arch: str, layer: int) -> None:
    """Heads, poolings, later levels and norms behind what is read are not part of the module."""
    config = TimmConfig(arch=arch, select_layer=layer)
    encoder = config.build(NO_WEIGHTS).train()
    features, _ = encoder({"pixels": torch.randn(1, 3, 160, 160)})
    (features * torch.randn_like(features)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_arguments_reach_timm() -> None:
    config = TimmConfig(arch="test_vit", arguments={"depth": 2, "img_size": 64})
    encoder = config.build(NO_WEIGHTS)
    assert config.preprocessor(NO_WEIGHTS).grid({}) == (4, 4)
    assert len(encoder.model.blocks) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arch": "dm_nfnet_f66"}, "arch: timm has no model 'dm_nfnet_f66'; did you mean 'dm_nfnet_f6'"),
        ({"arch": "test_vit.nope"}, "arch: timm refuses it: Invalid pretrained tag"),
        ({"pretrained": "someone/model"}, "arch: unknown for 'someone/model' without reading it"),
        ({"arch": "test_vit", "select_layer": -7}, "select_layer: found -7, expected -6 to -1"),
        ({"arch": "test_convnext", "select": "cls"}, "select: this model has no class token"),
        ({"arch": "test_vit", "arguments": {"depht": 2}}, "arguments: timm refuses them: .*depht"),
        ({"arch": "pit_ti_224"}, "select_layer: the output of pit_ti_224 is 1 tokens, not a grid of patches"),
    ],
)
def test_what_is_unknown_or_impossible(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TimmConfig.model_validate(given).build(NO_WEIGHTS)


def test_no_name_at_all() -> None:
    with pytest.raises(ValidationError, match="give `pretrained`, or `arch`"):
        TimmConfig()


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    with pytest.raises(CheckpointError, match="is a 'test_vit', the YAML says 'test_resnet'"):
        TimmConfig(arch="test_resnet", pretrained=str(tmp_path)).build(BuildContext())
    with pytest.raises(CheckpointError, match="found no safetensors weights"):
        TimmConfig(pretrained=str(tmp_path)).build(BuildContext())
    with pytest.raises(CheckpointError, match="found no folder"):
        TimmConfig(pretrained=str(tmp_path / "absent")).build(BuildContext())
