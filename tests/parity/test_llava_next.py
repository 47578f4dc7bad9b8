"""Tiles, their order, what is left out as black and the ends of rows equal transformers' LLaVA-NeXT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from mmllm.config.base import BuildContext
from mmllm.encoders.clip import ClipConfig
from mmllm.encoders.tiled import TiledConfig
from mmllm.projectors.mlp import MLPConfig

SIDE = 28  # pixels of a tile: 4 x 4 patches
VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=7
)
TEXT = LlamaConfig(
    hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40, pad_token_id=0
)
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
SIZES = [(40, 60), (100, 25), (28, 28), (31, 90), (200, 170), (57, 56), (30, 300), (300, 33)]  # height, width


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(4)
    # Smooth, so that resampling decides little: noise would be all about it.
    small = [rng.integers(0, 256, (5, 5, 3), dtype=np.uint8) for _ in SIZES]
    return [
        Image.fromarray(a).resize(size[::-1], Image.Resampling.BICUBIC) for a, size in zip(small, SIZES, strict=True)
    ]


@pytest.fixture
def theirs() -> LlavaNextForConditionalGeneration:
    torch.manual_seed(2)
    config = LlavaNextConfig(
        vision_config=VISION,
        text_config=TEXT,
        image_token_index=39,
        vision_feature_layer=-2,
        image_grid_pinpoints=[[rows * SIDE, cols * SIDE] for rows, cols in GRIDS],
    )
    return LlavaNextForConditionalGeneration(config).eval()


def ours(theirs: LlavaNextForConditionalGeneration, folder: Path) -> tuple[TiledConfig, BuildContext]:
    tower = CLIPVisionModel(VISION)
    tower.load_state_dict(theirs.model.vision_tower.state_dict())
    tower.save_pretrained(folder / "clip")
    clip = ClipConfig(pretrained="./clip", select_layer=-2, fit="crop")
    return TiledConfig(encoder=clip, grids=GRIDS), BuildContext(dtype=torch.float32, root=folder)


def test_embeddings_equal_transformers_llava_next(theirs: LlavaNextForConditionalGeneration, tmp_path: Path) -> None:
    config, context = ours(theirs, tmp_path)
    preprocess, encoder = config.preprocessor(context), config.build(context)
    projector = MLPConfig(row_ends=True).build(context, input_dim=32, output_dim=24)
    projector.layers[0].load_state_dict(theirs.model.multi_modal_projector.linear_1.state_dict())
    projector.layers[2].load_state_dict(theirs.model.multi_modal_projector.linear_2.state_dict())
    projector.row_end.data.copy_(theirs.model.image_newline)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[rows * SIDE, cols * SIDE] for rows, cols in GRIDS],
    )
    media = pictures()
    wanted = processor(media, return_tensors="pt")
    items = [preprocess(picture) for picture in media]
    worst = 0.0
    for item, pixels in zip(items, wanted["pixel_values"], strict=True):
        worst = max(worst, (item["encoder.pixels"] - pixels[: len(item["encoder.pixels"])]).abs().max().item())
        assert not pixels[len(item["encoder.pixels"]) :].any()
    assert worst == 0
    with torch.no_grad():
        features = theirs.get_image_features(wanted["pixel_values"], wanted["image_sizes"]).pooler_output
        found, mask = projector(*encoder(preprocess.collate(items)))
    for item, own, real, expected in zip(items, found, mask, features, strict=True):
        assert preprocess.num_tokens(item) == int(real.sum()) == len(expected)
        torch.testing.assert_close(own[real], expected, atol=1e-6, rtol=0)  # measured 4.2e-9


def test_a_picture_thinner_than_a_feature_keeps_some() -> None:
    config = TiledConfig(
        encoder=ClipConfig(vision_cfg={"image_size": 28, "patch_size": 7, "width": 16, "layers": 2, "head_width": 8})
    )
    preprocess = config.preprocessor(BuildContext(weights=False))
    for size in ((3000, 2), (2, 3000)):
        item = preprocess(Image.new("RGB", size))
        assert preprocess.num_tokens(item) > 16  # transformers would leave the overview alone
