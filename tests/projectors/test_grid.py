"""Projectors that read the features' grid: the reference libraries' numbers, any aspect ratio, and the way through a model."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.config.families import outputs_of
from mmllm.config.run import ModelConfig
from mmllm.encoders.clip import ClipConfig
from mmllm.encoders.fused import FusedConfig
from mmllm.encoders.hubert import HubertConfig
from mmllm.errors import ConfigError
from mmllm.model import MultimodalLM
from mmllm.processing.messages import Sample, parse_messages
from mmllm.processing.processor import Processor
from mmllm.projectors.grid import LDPConfig, PixelShuffleConfig, PoolConfig

CONTEXT = BuildContext(weights=False)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def test_pixel_shuffle_is_idefics3s_connector() -> None:
    """Measured 0; allowed 1e-6."""
    from transformers import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    numbers: dict[str, Any] = {
        "vision_config": {"hidden_size": 12},
        "text_config": {"model_type": "llama", "hidden_size": 20},
    }
    numbers["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    reference = Idefics3Connector(Idefics3Config(**numbers, scale_factor=2))
    projector = PixelShuffleConfig(depth=1, bias=False).build(CONTEXT, input_dim=12, output_dim=20)
    projector.load_state_dict({"mlp.layers.0.weight": reference.modality_projection.proj.weight})
    features = torch.randn(2, 36, 12)
    with torch.no_grad():
        found, mask = projector(features, ones(2, 36))
        torch.testing.assert_close(found, reference(features), atol=1e-6, rtol=0)
    assert mask.shape == (2, 9)
    assert mask.all()


def test_pixel_shuffle_is_internvls_projector() -> None:
    """Its grid of 6 x 4 through the library's own steps. Measured 0; allowed 1e-6."""
    from transformers import InternVLConfig
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    numbers = {"vision_config": {"hidden_size": 12}, "text_config": {"model_type": "qwen2", "hidden_size": 20}}
    reference = InternVLMultiModalProjector(InternVLConfig(**numbers, downsample_ratio=0.5))
    projector = PixelShuffleConfig(norm=True).build(CONTEXT, input_dim=12, output_dim=20)
    names = {"mlp.norm": "layer_norm", "mlp.layers.0": "linear_1", "mlp.layers.2": "linear_2"}
    for own, theirs in names.items():
        module = projector.get_submodule(own)
        module.load_state_dict(reference.get_submodule(theirs).state_dict())
    table = torch.randn(2, 6, 4, 12)
    with torch.no_grad():
        expected = reference(InternVLModel.pixel_shuffle(reference, table, 0.5).flatten(1, 2))
        found, _ = projector(table.flatten(1, 2), ones(2, 24), torch.tensor([[1, 6, 4]] * 2))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_neighbours_on_other_grids() -> None:
    """Three pictures of different grids in one call, one of them two tiles, written out block by block; zeros fill blocks up."""
    config = PixelShuffleConfig(factor=2, depth=1, bias=False)
    projector = config.build(CONTEXT, input_dim=3, output_dim=12)
    projector.load_state_dict({"mlp.layers.0.weight": torch.eye(12)})
    layouts = [(1, 2, 5), (2, 3, 2), (1, 1, 1)]
    lengths = [10, 12, 1]
    features, mask = torch.randn(3, 12, 3), torch.arange(12)[None] < torch.tensor(lengths)[:, None]
    found, real = projector(features, mask, torch.tensor(layouts))
    for item, (tiles, rows, cols) in enumerate(layouts):
        expected = []
        for tile in range(tiles):
            for top in range(0, rows, 2):
                for left in range(0, cols, 2):
                    cells = [(top + i, left + j) for i in range(2) for j in range(2)]
                    place = [tile * rows * cols + r * cols + c if r < rows and c < cols else None for r, c in cells]
                    expected.append(torch.cat([torch.zeros(3) if p is None else features[item, p] for p in place]))
        assert config.num_outputs_on(layouts[item]) == len(expected) == int(real[item].sum())
        torch.testing.assert_close(found[item, : len(expected)], torch.stack(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", [(24, 24), (5, 7), (1, 9), (3, 1)])
def test_pooling_is_the_mean_of_what_is_there(grid: tuple[int, int]) -> None:
    """Measured 1.2e-7; allowed 2e-6."""
    config = PoolConfig(factor=2, depth=1, bias=False)
    projector = config.build(CONTEXT, input_dim=4, output_dim=4)
    projector.load_state_dict({"mlp.layers.0.weight": torch.eye(4)})
    rows, cols = grid
    table = torch.randn(rows, cols, 4)
    found, _ = projector(table.view(1, -1, 4), ones(1, rows * cols), torch.tensor([[1, rows, cols]]))
    blocks = [table[r : r + 2, c : c + 2].mean(dim=(0, 1)) for r in range(0, rows, 2) for c in range(0, cols, 2)]
    assert config.num_outputs_on((1, rows, cols)) == len(blocks)
    torch.testing.assert_close(found[0], torch.stack(blocks), atol=2e-6, rtol=0)


def test_sounds_are_pooled_in_time_as_qwen2_audios() -> None:
    """``AvgPool1d(2, stride=2)`` of even and, beyond it, odd numbers of steps."""
    hubert = HubertConfig(pretrained="facebook/hubert-base-ls960").tiny()
    preprocess = hubert.preprocessor(CONTEXT)
    item = preprocess(torch.randn(16_000).numpy())
    config = PoolConfig(factor=2, depth=1, bias=False)
    assert outputs_of(config, preprocess, item) == (25, (1, 1, 49))
    projector = config.build(CONTEXT, input_dim=4, output_dim=4)
    projector.load_state_dict({"mlp.layers.0.weight": torch.eye(4)})
    features = torch.randn(1, 49, 4)
    found, _ = projector(features, ones(1, 49), torch.tensor([[1, 1, 49]]))
    expected = F.avg_pool1d(features.transpose(1, 2), 2, stride=2).transpose(1, 2)
    torch.testing.assert_close(found[:, :24], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, 24], features[:, 48], atol=1e-6, rtol=0)


def test_adaptive_pooling_and_mobilevlms_projector() -> None:
    """One size for every grid; MobileVLM V2's three steps with torch's own functions. Measured 6e-8; allowed 1e-6."""
    layouts = torch.tensor([[1, 4, 9], [1, 7, 3]])
    features, mask = torch.randn(2, 36, 6), torch.arange(36)[None] < torch.tensor([36, 21])[:, None]
    pool = PoolConfig(size=(2, 3), depth=2, hidden_dim=8).build(CONTEXT, input_dim=6, output_dim=5)
    ldp = LDPConfig(size=(2, 3)).build(CONTEXT, input_dim=6, output_dim=5)
    with torch.no_grad():
        pooled, placed = pool(features, mask, layouts)[0], ldp(features, mask, layouts)[0]
        for item, (_, rows, cols) in enumerate(layouts.tolist()):
            table = features[item, : rows * cols].T.view(1, 6, rows, cols)
            expected = pool.mlp.layers(F.adaptive_avg_pool2d(table, (2, 3)).flatten(2).transpose(1, 2))
            torch.testing.assert_close(pooled[item : item + 1], expected, atol=1e-6, rtol=0)
            embedded = ldp.mlp.layers(features[item, : rows * cols]).T.view(1, 5, rows, cols)
            small = F.adaptive_avg_pool2d(embedded, (2, 3))
            shifted = F.conv2d(small, ldp.places.weight, ldp.places.bias, padding=1, groups=5)
            torch.testing.assert_close(placed[item], (small + shifted)[0].flatten(1).T, atol=1e-6, rtol=0)


def test_squares_need_no_layout_and_others_do() -> None:
    config = PixelShuffleConfig()
    assert [config.num_outputs(length) for length in (1, 9, 676, 729)] == [1, 4, 169, 196]
    with pytest.raises(ValueError, match="found 12 features, expected a square number"):
        config.num_outputs(12)


def test_pictures_of_any_aspect_ratio_through_a_model() -> None:
    """The processor's placeholders, the layouts in the batch, and what the projector gives agree, item by item."""
    tree = {
        "inputs": {"image": {"encoder": {"kind": "clip", "arch": "ViT-B-16", "fit": "native"},
                             "projector": {"kind": "pixel_shuffle"}}},
        "backbone": {"kind": "causal_lm", "architecture": {"model_type": "llama"}},
    }  # fmt: skip
    config = ModelConfig.model_validate(tree).tiny()
    processor, model = Processor.from_config(config, CONTEXT), MultimodalLM.from_config(config, CONTEXT).eval()

    def content(width: int, height: int) -> list[dict[str, Any]]:
        data = io.BytesIO()
        Image.new("RGB", (width, height), "red").save(data, "PNG")
        return [{"type": "image", "data": data.getvalue()}, {"type": "text", "text": "q"}]

    samples = [
        Sample(
            "s", parse_messages([{"role": "user", "content": content(*size)}, {"role": "assistant", "content": "a"}])
        )
        for size in ((40, 40), (200, 12), (30, 90))
    ]
    encoded = [processor.encode_sample(sample, 4096) for sample in samples]
    preprocess = processor.modalities["image"].preprocessor
    spans = [one.spans[0] for one in encoded]
    for span in spans:
        rows, cols = preprocess.grid(span.item)  # type: ignore[attr-defined]
        assert span.layout == (1, rows, cols)
        assert span.count == -(-rows // 2) * -(-cols // 2)
    assert len({span.layout for span in spans}) == 3
    batch = processor.collate(encoded)
    with torch.no_grad():
        together = model.encode(batch.media)["image"]
        assert together.shape[1] == batch.media["image"].width
        for index, one in enumerate(encoded):
            alone = model.encode(processor.collate([one]).media)["image"]
            torch.testing.assert_close(together[index, : spans[index].count], alone[0], atol=1e-5, rtol=0)
        assert model(batch)["text"].isfinite()


def test_fused_pictures_have_the_first_ones_grid() -> None:
    def vit(patch: int) -> dict[str, Any]:
        numbers = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        numbers |= {"intermediate_size": 16, "image_size": 32, "patch_size": patch}
        return {"kind": "vit", "architecture": numbers}

    encoders = {"a": vit(8), "b": vit(16)}
    preprocess = FusedConfig.model_validate({"encoders": encoders}).preprocessor(CONTEXT)
    item = preprocess(Image.new("RGB", (20, 20)))
    assert outputs_of(PixelShuffleConfig(), preprocess, item) == (4, (1, 4, 4))
    behind = FusedConfig.model_validate({"encoders": encoders, "along": "sequence"}).preprocessor(CONTEXT)
    with pytest.raises(ConfigError, match="the encoder's features lie on no grid"):
        outputs_of(PixelShuffleConfig(), behind, behind(Image.new("RGB", (20, 20))))


def test_what_has_no_grid_is_refused() -> None:
    classes = ClipConfig(arch="ViT-B-16", keep_class_token=True).tiny().preprocessor(CONTEXT)
    item = classes(Image.new("RGB", (20, 20)))
    with pytest.raises(ConfigError, match="the encoder's features lie on no grid"):
        outputs_of(PoolConfig(factor=2), classes, item)
    sounds = HubertConfig(pretrained="facebook/hubert-base-ls960").tiny().preprocessor(CONTEXT)
    heard = sounds(torch.randn(16_000).numpy())
    for config in (PixelShuffleConfig(), PoolConfig(size=(2, 2)), LDPConfig()):
        with pytest.raises(ConfigError, match="49 steps in time, not rows and columns; `stack`"):
            outputs_of(config, sounds, heard)
    for options, found in (({}, "neither"), ({"factor": 2, "size": (2, 2)}, "both")):
        with pytest.raises(ValidationError, match=f"found {found} of `factor` and `size`"):
            PoolConfig.model_validate(options)
