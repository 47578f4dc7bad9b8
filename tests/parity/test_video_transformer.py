"""The videomae and vjepa2 encoders equal transformers' processors and models at every layer.

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
from mmllm.encoders.video_transformer import VideoMAEConfig, VideoTransformerConfig, VJEPA2Config
from mmllm.errors import CheckpointError, ConfigError, MediaError

LAYERS, FRAMES, SIZE = 3, 6, 24
COLOURS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
CROPPED = {"size": {"shortest_edge": 30}, "crop_size": {"height": SIZE, "width": SIZE}, **COLOURS}
VIDEOMAE = {
    "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48, "image_size": SIZE,
    "patch_size": 8, "num_frames": FRAMES, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3,
}  # fmt: skip
VJEPA2 = {
    "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "mlp_ratio": 1.5, "crop_size": SIZE,
    "patch_size": 8, "frames_per_clip": FRAMES, "drop_path_rate": 0.3, "attention_dropout": 0.3, "pred_hidden_size": 32,
    "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
}  # fmt: skip
# Our config, the model that is saved, its numbers, the processor that is saved with it, its settings.
CASES: dict[str, tuple[type[VideoTransformerConfig], str, dict[str, Any], str, dict[str, Any]]] = {
    "videomae": (
        VideoMAEConfig, "VideoMAEModel", VIDEOMAE | {"use_mean_pooling": False}, "VideoMAEImageProcessor", CROPPED
    ),
    "pretraining": (
        VideoMAEConfig, "VideoMAEForPreTraining",
        VIDEOMAE | {"use_mean_pooling": False, "decoder_hidden_size": 16, "decoder_num_attention_heads": 2},
        "VideoMAEVideoProcessor", CROPPED,
    ),
    "classes": (
        VideoMAEConfig, "VideoMAEForVideoClassification", VIDEOMAE | {"tubelet_size": 3}, "VideoMAEVideoProcessor", CROPPED
    ),
    "vjepa2": (VJEPA2Config, "VJEPA2Model", VJEPA2, "VJEPA2VideoProcessor", {"crop_size": SIZE, **COLOURS}),
}  # fmt: skip


def clips(frames: int = FRAMES) -> list[list[Image.Image]]:
    rng = np.random.default_rng(3)
    shapes = ((40, 60), (100, 25), (SIZE, SIZE))
    return [[Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for _ in range(frames)] for s in shapes]


def write(name: str, folder: Path) -> tuple[type[VideoTransformerConfig], Any, Any]:
    """Our config class, and the reference's processor and its model without a head, whose saved ones lie in ``folder``."""
    import transformers

    ours, model_name, numbers, processor_name, settings = CASES[name]
    cls = getattr(transformers, model_name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**numbers)).eval()
    with torch.no_grad():  # no parameter at a trivial value
        for value in model.parameters():
            value += 0.2 * torch.randn_like(value)
    processor = getattr(transformers, processor_name)(**settings)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return ours, processor, model.base_model


def pixels_of(processor: Any, clip: list[Image.Image]) -> Tensor:
    found = processor(clip, return_tensors="pt")
    pixels: Tensor = next(value for name, value in found.items() if "pixel_values" in name)
    return pixels[0]


def read(model: Any, pixels: Tensor) -> Any:
    options = {"skip_predictor": True} if model.config.model_type == "vjepa2" else {}
    with torch.no_grad():
        return model(pixels, output_hidden_states=True, **options)


def features(config: VideoTransformerConfig, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    """Our features of ``clips()``, in training mode, and the pixels."""
    preprocess, encoder = config.preprocessor(BuildContext()), config.build(BuildContext()).train()
    items = [preprocess(clip) for clip in clips(frames)]
    batch = preprocess.collate(items)
    with torch.no_grad():
        found, mask = encoder(batch)
    assert mask.all()
    assert found.shape == (len(items), preprocess.num_tokens(items[0]), encoder.output_dim)
    return found, batch["pixels"]


@pytest.mark.parametrize("name", CASES)
def test_every_layer(name: str, tmp_path: Path) -> None:
    """Pixels of frames of any shape, features with the norm and without. Measured 0 (their own modules); allowed 1e-5."""
    ours, processor, model = write(name, tmp_path)
    expected = torch.stack([pixels_of(processor, clip) for clip in clips()])
    reference = read(model, expected)
    for layer in range(-LAYERS, 0):
        found, pixels = features(ours(pretrained=str(tmp_path), select_layer=layer, norm=False))
        assert torch.equal(pixels, expected)
        torch.testing.assert_close(found, reference.hidden_states[layer], atol=1e-5, rtol=0)
    found, _ = features(ours(pretrained=str(tmp_path)))
    torch.testing.assert_close(found, reference.last_hidden_state, atol=1e-5, rtol=0)


def test_an_earlier_layer_with_the_final_norm(tmp_path: Path) -> None:
    """Measured 0 (their own modules); allowed 1e-5."""
    ours, processor, model = write("vjepa2", tmp_path)
    pixels = torch.stack([pixels_of(processor, clip) for clip in clips()])
    with torch.no_grad():
        expected = model.encoder.layernorm(read(model, pixels).hidden_states[-2])
    found, _ = features(ours(pretrained=str(tmp_path), select_layer=-2, norm=True))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["videomae", "vjepa2"])
def test_other_frames_and_another_size(name: str, tmp_path: Path) -> None:
    """The reference model of these numbers with the same weights. Measured 0 (their own modules); allowed 1e-5."""
    ours, _, model = write(name, tmp_path)
    found, pixels = features(ours(pretrained=str(tmp_path), frames=4, image_size=32), frames=4)
    assert pixels.shape == (3, 4, 3, 32, 32)
    numbers = {"num_frames": 4, "image_size": 32} if name == "videomae" else {"frames_per_clip": 4, "crop_size": 32}
    other = type(model)(type(model.config)(**{**model.config.to_dict(), **numbers})).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(found, read(other, pixels).last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_later_blocks_and_heads_are_not_there(name: str, tmp_path: Path) -> None:
    ours, _, model = write(name, tmp_path)
    block = sum(p.numel() for p in model.encoder.layer[0].parameters())
    stem = {n: p.numel() for n, p in model.named_parameters() if ".layer." not in n and "predictor" not in n}
    norm = sum(count for n, count in stem.items() if "layernorm" in n)
    for layer, norms in ((-1, norm), (-2, 0), (-3, 0)):
        built = ours(pretrained=str(tmp_path), select_layer=layer).build(BuildContext())
        count = sum(p.numel() for p in built.parameters())
        assert count == sum(stem.values()) - norm + norms + (LAYERS + 1 + layer) * block


def test_features_of_a_time_lie_together(tmp_path: Path) -> None:
    """A change in the last frames of VideoMAE's first block changes its queries' answers everywhere, but the stem's own
    features only at the last time: the order is that of ``segments``.
    """
    ours, _, model = write("videomae", tmp_path)
    config = ours(pretrained=str(tmp_path))
    assert config.segments(BuildContext()) == FRAMES // 2
    first = torch.zeros(1, FRAMES, 3, SIZE, SIZE)
    second = first.clone()
    second[:, -2:] = 1
    with torch.no_grad():
        changed = (model.embeddings(first, None) != model.embeddings(second, None)).any(-1)[0]
    assert changed.unflatten(0, (FRAMES // 2, -1)).all(1).tolist() == [False, False, True]
    assert not changed[: -((SIZE // 8) ** 2)].any()


def test_refusals(tmp_path: Path) -> None:
    ours, _, _ = write("videomae", tmp_path)
    with pytest.raises(ConfigError, match="expected a multiple of the 2 frames"):
        ours(pretrained=str(tmp_path), frames=5).preprocessor(BuildContext())
    with pytest.raises(ConfigError, match="found -4, expected -3 to -1"):
        ours(pretrained=str(tmp_path), select_layer=-4).build(BuildContext())
    with pytest.raises(ConfigError, match="found a videomae, expected a vjepa2"):
        VJEPA2Config(pretrained=str(tmp_path)).build(BuildContext())
    with pytest.raises(ConfigError, match="is 48, but"):
        ours(pretrained=str(tmp_path), architecture={"hidden_size": 48}).build(BuildContext())
    with pytest.raises(ConfigError, match="unknown for 'a/b'"):
        VideoMAEConfig(pretrained="a/b").build(BuildContext(weights=False))
    with pytest.raises(MediaError, match="found 2 frames, expected 6"):
        ours(pretrained=str(tmp_path)).preprocessor(BuildContext())(clips(2)[0])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        ours(pretrained=str(tmp_path)).build(BuildContext())


@pytest.mark.parametrize(
    ("config", "millions", "tokens"),
    [
        # MCG-NJU/VideoMAE's MODEL_ZOO.md: 22, 87, 305 and 633 M with a head; 16 frames of 224 pixels.
        (VideoMAEConfig(pretrained="MCG-NJU/videomae-small-finetuned-kinetics"), 22, 1568),
        (VideoMAEConfig(pretrained="MCG-NJU/videomae-base"), 87, 1568),
        (VideoMAEConfig(pretrained="MCG-NJU/videomae-large"), 305, 1568),
        (VideoMAEConfig(pretrained="MCG-NJU/videomae-huge-finetuned-kinetics"), 633, 1568),
        # facebookresearch/vjepa2's README rounds to 300 M, 600 M and 1 B; 64 frames of 256 or 384 pixels.
        (VJEPA2Config(pretrained="facebook/vjepa2-vitl-fpc64-256"), 300, 8192),
        (VJEPA2Config(pretrained="facebook/vjepa2-vith-fpc64-256"), 632, 8192),
        (VJEPA2Config(pretrained="facebook/vjepa2-vitg-fpc64-384"), 1000, 18432),
    ],
)
def test_published_sizes(config: VideoTransformerConfig, millions: int, tokens: int) -> None:
    context = BuildContext(weights=False)
    with torch.device("meta"):
        count = sum(p.numel() for p in config.build(context).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.02)
    assert config.preprocessor(context).num_tokens({}) == tokens
