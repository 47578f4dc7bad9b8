"""The frames encoder: what is seen of every frame, how it is pooled over places and time, which frames are taken, refusals."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from mmllm.config.base import BuildContext
from mmllm.config.run import ModelConfig
from mmllm.encoders import frames_module
from mmllm.encoders.frames import FramesConfig
from mmllm.encoders.frames_module import average_squares
from mmllm.errors import ConfigError, MediaError
from mmllm.model import MultimodalLM
from mmllm.processing.video import place
from mmllm.training.references import references, stored_parts

NO_WEIGHTS = BuildContext(weights=False)
NUMBERS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VIT = {"kind": "vit", "architecture": {"model_type": "vit", **NUMBERS, "image_size": 32, "patch_size": 8}}
NATIVE = {
    "kind": "clip",
    "fit": "native",
    "max_patches": 20,
    "vision_cfg": {"width": 16, "layers": 2, "head_width": 8, "patch_size": 8, "image_size": 32},
}


def frames(encoder: dict[str, Any], **more: Any) -> FramesConfig:
    return FramesConfig.model_validate({"encoder": encoder, "frames": 3, **more})


def clips(count: int = 3) -> list[list[Image.Image]]:
    rng = np.random.default_rng(3)
    shapes = ((40, 60), (100, 25), (9, 9))
    return [[Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for _ in range(count)] for s in shapes]


def run(config: FramesConfig) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The real features of every clip, and those of each of its frames, seen alone by the encoder of pictures."""
    preprocess, encoder = config.preprocessor(NO_WEIGHTS), config.build(NO_WEIGHTS)
    items = [preprocess(clip) for clip in clips(config.frames)]
    alone = []
    with torch.no_grad():
        features, mask = encoder(preprocess.collate(items))
        for clip in clips(config.frames):
            seen = (encoder.encoder(preprocess.picture.collate([preprocess.picture(frame)])) for frame in clip)
            alone.append([part[0][own[0]] for part, own in seen])
    counts = [preprocess.num_tokens(item) for item in items]
    assert mask.sum(1).tolist() == counts
    assert features.shape[2] == encoder.output_dim == 16
    return [found[:count] for found, count in zip(features, counts, strict=True)], alone


@pytest.mark.parametrize("encoder", [VIT, NATIVE], ids=["square", "native"])
def test_without_pooling_one_frame_is_behind_the_other(encoder: dict[str, Any]) -> None:
    """Clips of other shapes in the batch change nothing. Measured 6e-7 (another batch); allowed 1e-5."""
    for found, seen in zip(*run(frames(encoder)), strict=True):
        torch.testing.assert_close(found, torch.cat(seen), atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoder", [VIT, NATIVE], ids=["square", "native"])
def test_mean_over_time(encoder: dict[str, Any]) -> None:
    """Measured 5e-7 (another batch); allowed 1e-5."""
    for found, seen in zip(*run(frames(encoder, pooling="mean")), strict=True):
        torch.testing.assert_close(found, torch.stack(seen).mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoder", [VIT, NATIVE], ids=["square", "native"])
def test_a_mean_of_each_frame_and_then_one_of_each_place(encoder: dict[str, Any]) -> None:
    """Section 3.1 of arXiv 2306.05424, with numpy. Measured 1.1e-6 (another batch); allowed 1e-5."""
    for found, seen in zip(*run(frames(encoder, pooling="spatio_temporal", frames=4)), strict=True):
        table = np.stack([part.numpy() for part in seen])
        expected = np.concatenate([table.mean(axis=1), table.mean(axis=0)])
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5, rtol=0)


def test_many_frames_go_through_the_encoder_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured 5e-7 (another batch); allowed 1e-5."""
    torch.manual_seed(0)
    whole, _ = run(frames(NATIVE))
    monkeypatch.setattr(frames_module, "FRAMES_PER_CALL", 4)
    torch.manual_seed(0)
    parts, _ = run(frames(NATIVE))
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_squares_are_averaged_before_all_else() -> None:
    """Rows and columns that fill no square are left out. Measured 6e-7 (another batch); allowed 1e-5."""
    config = frames(NATIVE, spatial_stride=2)
    preprocess = config.preprocessor(NO_WEIGHTS)
    shapes = [preprocess.picture.grid(preprocess.picture(clip[0])) for clip in clips()]  # type: ignore[attr-defined]
    assert shapes == [(4, 5), (9, 2), (1, 1)]
    with pytest.raises(ConfigError, match="2, but the features lie on 1 x 1"):
        run(config)
    config = frames(NATIVE | {"min_patches": 4}, spatial_stride=2)
    found, seen = run(config)
    for one, parts, (rows, cols) in zip(found, seen, [(4, 5), (9, 2), (2, 2)], strict=True):
        tables = [part.unflatten(0, (rows, cols))[: rows // 2 * 2, : cols // 2 * 2] for part in parts]
        squares = [t.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).mean((1, 3)).flatten(0, 1) for t in tables]
        torch.testing.assert_close(one, torch.cat(squares), atol=1e-5, rtol=0)


def test_the_stride_is_that_of_llava_next_video() -> None:
    """transformers' pooler of LLaVA-NeXT-Video, mode `average`. Measured 0; allowed 1e-6."""
    from transformers import LlavaNextVideoConfig
    from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

    config = LlavaNextVideoConfig(spatial_pool_mode="average", spatial_pool_stride=2)
    config.vision_config.image_size, config.vision_config.patch_size = 24, 4
    features = torch.randn(5, 36, 7)
    expected = LlavaNextVideoPooler(config)(features)
    found = average_squares(features, torch.tensor([[6, 6]] * 5), 2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_stride_over_fused_features_and_what_lies_on_a_grid() -> None:
    fused = frames({"kind": "fused", "encoders": {"a": VIT, "b": VIT}}, spatial_stride=2)
    whole = fused.preprocessor(NO_WEIGHTS)
    with torch.no_grad():
        features, _ = fused.build(NO_WEIGHTS)(whole.collate([whole(clip) for clip in clips()]))
    assert features.shape == (3, 3 * 4, 32)
    with pytest.raises(ConfigError, match="a class token is on none"):
        run(frames(VIT | {"select": "cls_patch"}, spatial_stride=2))
    preprocess = frames(VIT, pooling="mean", spatial_stride=2).preprocessor(NO_WEIGHTS)
    assert preprocess.grid(preprocess(clips()[0])) == (2, 2)
    assert frames(VIT).preprocessor(NO_WEIGHTS).grid(preprocess(clips()[0])) == (3, 4, 4)
    assert frames(VIT, pooling="spatio_temporal").preprocessor(NO_WEIGHTS).grid(preprocess(clips()[0])) is None


def test_frames_from_the_middles_of_equal_pieces() -> None:
    def chosen(count: int, wanted: int, spread: Any) -> list[int]:
        return place([Fraction(i) for i in range(count)], Fraction(count), wanted, 1, None, spread)

    assert chosen(10, 5, "middles") == [1, 3, 5, 7, 9]
    assert chosen(10, 5, "ends") == [0, 2, 5, 7, 9]
    assert chosen(3, 6, "middles") == [0, 0, 1, 1, 2, 2]
    assert chosen(7, 1, "middles") == chosen(7, 1, "ends") == [3]
    # `get_seq_frames` of mbzuai-oryx/Video-ChatGPT (T - 1 where we have T): at most one frame away.
    for count in (100, 101, 257, 3000):
        size = (count - 1) / 100
        theirs = [(int(np.round(size * i)) + int(np.round(size * (i + 1)))) // 2 for i in range(100)]
        assert max(abs(a - b) for a, b in zip(chosen(count, 100, "middles"), theirs, strict=True)) <= 1
    assert frames(VIT).preprocessor(NO_WEIGHTS).decode_options == {"frames": 3}
    middles = frames(VIT, spread="middles").preprocessor(NO_WEIGHTS).decode_options
    assert middles == {"frames": 3, "spread": "middles"}


def test_refusals() -> None:
    with pytest.raises(ValidationError, match="stands beside `encoder`"):
        frames(VIT | {"adapter": {"kind": "lora"}})
    with pytest.raises(ConfigError, match="takes audio, expected an encoder of pictures"):
        frames({"kind": "beats"}).preprocessor(NO_WEIGHTS)
    with pytest.raises(MediaError, match="found 2 frames, expected 3"):
        frames(VIT).preprocessor(NO_WEIGHTS)(clips(2)[0])
    with pytest.raises(ConfigError) as refusal:
        frames({"kind": "vit", "pretrained": "nobody/nothing"}).build(NO_WEIGHTS)
    assert refusal.value.problems[0][0] == "encoder.architecture"


def test_a_frozen_encoder_of_frames_is_kept_by_reference(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(**NUMBERS, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    config = ModelConfig.model_validate(
        {
            "inputs": {
                "video": {
                    "encoder": {"kind": "frames", "encoder": {"kind": "vit", "pretrained": "./vit"}},
                    "projector": {"kind": "linear"},
                }
            },
            "backbone": {"kind": "causal_lm"},
        }
    )
    config = config.model_copy(update={"backbone": config.backbone.tiny()})
    context = BuildContext(root=tmp_path)
    model = MultimodalLM.from_config(config, context)
    assert "inputs.video.encoder" not in stored_parts(model, config, context, ["inputs.video.projector"])
    assert list(references(model, config, context, ["inputs.video.projector"])) == ["inputs.video.encoder.encoder"]
