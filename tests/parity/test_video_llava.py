"""A clip through `frames`, `clip` and `mlp` equals transformers' Video-LLaVA, its towers saved as the zoo's file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmllm.config.base import BuildContext
from mmllm.encoders.frames import FramesConfig
from mmllm.projectors.mlp import MLPConfig

FRAMES = 4


def video_llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    config = VideoLlavaConfig(vision_config=vision, text_config=text, image_token_index=60, video_token_index=61)
    model = VideoLlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # no parameter at a trivial value
        for value in model.parameters():
            value += 0.2 * torch.randn_like(value)
    return model.model


def test_clips(tmp_path: Path) -> None:
    """Features of the layer before the last with class tokens, projected; on our pixels, which differ by one grey level here
    and there (Pillow's resizing, there torchvision's). Measured 4e-6 of 1.9; allowed 1e-4.
    """
    from transformers import CLIPImageProcessor

    torch.manual_seed(0)
    model = video_llava()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model.video_tower.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    rng = np.random.default_rng(3)
    clips = [
        [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(FRAMES)]
        for size in ((40, 60), (100, 25))
    ]
    tower = {"kind": "clip", "pretrained": str(tmp_path), "select_layer": -2, "keep_class_token": True}
    config = FramesConfig.model_validate({"frames": FRAMES, "encoder": tower})
    preprocess, encoder = config.preprocessor(BuildContext()), config.build(BuildContext())
    projector = MLPConfig(depth=2).build(BuildContext(), input_dim=32, output_dim=24)
    linear = model.multi_modal_projector
    projector.load_state_dict(
        {
            f"layers.{i}.{n}": p
            for i, name in ((0, "linear_1"), (2, "linear_2"))
            for n, p in getattr(linear, name).named_parameters()
        }
    )
    batch = preprocess.collate([preprocess(clip) for clip in clips])
    pixels = batch["0.pixels"].view(2, FRAMES, 3, 32, 32)
    theirs = torch.stack([processor(clip, return_tensors="pt")["pixel_values"] for clip in clips])
    assert float((pixels - theirs).abs().max()) < 1.01 / 255 / min(processor.image_std)
    with torch.no_grad():
        expected = model.get_video_features(pixels).pooler_output
        found, mask = projector(*encoder(batch))
    assert mask.all()
    assert found.shape == (2, FRAMES * 17, 24)
    torch.testing.assert_close(found, torch.as_tensor(expected).view_as(found), atol=1e-4, rtol=0)
