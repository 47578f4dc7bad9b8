"""BEATs: the published checkpoints' names and shapes, a forward written apart, the reference's filter bank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.encoders.beats import BeatsArchitecture, BeatsConfig
from mmllm.encoders.beats_module import BeatsEncoder, published_name
from mmllm.errors import CheckpointError, ConfigError, MediaError

CONTEXT = BuildContext(dtype=torch.float32)
NO_WEIGHTS = BuildContext(weights=False)
RATE = 16_000
SMALL = BeatsArchitecture(
    input_patch_size=4, embed_dim=12, encoder_layers=3, encoder_embed_dim=24, encoder_ffn_embed_dim=40,
    encoder_attention_heads=3, conv_pos=10, conv_pos_groups=4, num_buckets=16, max_distance=30, num_mel_bins=20,
)  # fmt: skip


def layout(numbers: BeatsArchitecture, classes: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes under ``model`` of a published file, as the reference's own modules give them (beats/BEATs.py and
    backbone.py of microsoft/unilm). ``classes`` of the fine-tuned ones; BEATs_iter3_plus_AS2M itself has none.
    """
    e, d, hidden = numbers.embed_dim, numbers.encoder_embed_dim, numbers.encoder_ffn_embed_dim
    heads, patch = numbers.encoder_attention_heads, numbers.input_patch_size
    found: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (e, 1, patch, patch),
        "layer_norm.weight": (e,),
        "layer_norm.bias": (e,),
        "encoder.pos_conv.0.bias": (d,),
        "encoder.pos_conv.0.weight_g": (1, 1, numbers.conv_pos),
        "encoder.pos_conv.0.weight_v": (d, d // numbers.conv_pos_groups, numbers.conv_pos),
        "encoder.layer_norm.weight": (d,),
        "encoder.layer_norm.bias": (d,),
    }
    if e != d:
        found |= {"post_extract_proj.weight": (d, e), "post_extract_proj.bias": (d,)}
    if classes is not None:
        found |= {"predictor.weight": (classes, d), "predictor.bias": (classes,)}
    for i in range(numbers.encoder_layers):
        block = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= {f"{block}self_attn.{name}.weight": (d, d), f"{block}self_attn.{name}.bias": (d,)}
        found |= {
            f"{block}self_attn.grep_a": (1, heads, 1, 1),
            f"{block}self_attn.grep_linear.weight": (8, d // heads),
            f"{block}self_attn.grep_linear.bias": (8,),
            f"{block}self_attn.relative_attention_bias.weight": (numbers.num_buckets, heads),
            f"{block}fc1.weight": (hidden, d),
            f"{block}fc1.bias": (hidden,),
            f"{block}fc2.weight": (d, hidden),
            f"{block}fc2.bias": (d,),
        }
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            found |= {f"{block}{name}.weight": (d,), f"{block}{name}.bias": (d,)}
    return found


@pytest.mark.parametrize("classes", [None, 527])
def test_the_published_checkpoints_fit(classes: int | None) -> None:
    """Every tensor of the module is in the file with its shape, and all of the file but copies and classifier is used."""
    with torch.device("meta"):
        encoder = BeatsConfig().build(NO_WEIGHTS)
    own = {published_name(name): tuple(value.shape) for name, value in encoder.state_dict().items()}
    published = layout(BeatsArchitecture(), classes)
    assert own == {name: published.get(name) for name in own}
    copies = {f"encoder.layers.{i}.self_attn.relative_attention_bias.weight" for i in range(1, 12)}
    classifier = {"predictor.weight", "predictor.bias"} if classes else set()
    assert set(published) - set(own) == copies | classifier
    assert (
        sum(p.numel() for p in encoder.parameters()) == 90_311_792
    )  # as the reference module itself counts; "90M" in arXiv 2212.09058
    assert encoder.output_dim == 768


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned one, as published: with its classifier, the bias's table in every block."""
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=draw) * (0.3 if len(shape) == 1 else 1.3 * shape[-1] ** -0.5)
        for name, shape in layout(SMALL, 7).items()
    }
    table = torch.randn(SMALL.num_buckets, SMALL.encoder_attention_heads, generator=draw)
    for name in tensors:
        if "relative_attention_bias" in name:
            tensors[name] = table.clone()
        if name.endswith("norm.weight"):
            tensors[name] += 1
    path: Path = tmp_path_factory.mktemp("beats") / "beats.safetensors"
    save_file(tensors, path)
    return path


def forward(mel: Tensor, t: dict[str, Tensor], layer: int) -> Tensor:
    """Features (S, D) after ``layer`` blocks of one spectrogram (T, F), with sums written out where that is short."""
    size, d, heads = SMALL.input_patch_size, SMALL.encoder_embed_dim, SMALL.encoder_attention_heads
    steps, rows = mel.shape[0] // size, mel.shape[1] // size
    patches = [
        mel[i * size : (i + 1) * size, j * size : (j + 1) * size].flatten() for i in range(steps) for j in range(rows)
    ]
    x = torch.stack(patches) @ t["patch_embedding.weight"].flatten(1).T
    x = F.layer_norm(x, x.shape[1:], t["layer_norm.weight"], t["layer_norm.bias"])
    x = x @ t["post_extract_proj.weight"].T + t["post_extract_proj.bias"]
    # The convolution: every tap's weights have the length that weight_g says.
    v, g = t["encoder.pos_conv.0.weight_v"], t["encoder.pos_conv.0.weight_g"]
    taps = v * (g / v.square().sum((0, 1), keepdim=True).sqrt())
    width, kernel = v.shape[1], v.shape[2]
    places = []
    for s in range(len(x)):
        total = t["encoder.pos_conv.0.bias"].clone()
        for k in range(kernel):
            at = s + k - kernel // 2
            if 0 <= at < len(x):
                total += torch.cat([
                    taps[group * d // SMALL.conv_pos_groups : (group + 1) * d // SMALL.conv_pos_groups, :, k]
                    @ x[at, group * width : (group + 1) * width]
                    for group in range(SMALL.conv_pos_groups)
                ])  # fmt: skip
        places.append(total)
    x = x + F.gelu(torch.stack(places))
    x = F.layer_norm(x, (d,), t["encoder.layer_norm.weight"], t["encoder.layer_norm.bias"])
    half, exact, length = SMALL.num_buckets // 2, SMALL.num_buckets // 4, len(x)
    bias = torch.zeros(heads, length, length)
    for i in range(length):
        for j in range(length):
            far = abs(j - i)
            if far >= exact:
                far = exact + int(math.log(far / exact) / math.log(SMALL.max_distance / exact) * (half - exact))
            bucket = min(far, half - 1) + (half if j > i else 0)
            bias[:, i, j] = t["encoder.layers.0.self_attn.relative_attention_bias.weight"][bucket]
    alpha = (2 * SMALL.encoder_layers) ** (1 / 4)
    for i in range(layer):
        b = {name.removeprefix(f"encoder.layers.{i}."): value for name, value in t.items()}
        parts = []
        for h in range(heads):
            own = slice(h * d // heads, (h + 1) * d // heads)
            q, k, w = (
                x @ b[f"self_attn.{n}_proj.weight"][own].T + b[f"self_attn.{n}_proj.bias"][own] for n in ("q", "k", "v")
            )
            eight = q @ b["self_attn.grep_linear.weight"].T + b["self_attn.grep_linear.bias"]
            first, second = torch.sigmoid(eight[:, :4].sum(1)), torch.sigmoid(eight[:, 4:].sum(1))
            gate = first * (second * b["self_attn.grep_a"][0, h, 0, 0] - 1) + 2
            scores = q @ k.T / math.sqrt(d // heads) + gate[:, None] * bias[h]
            parts.append(scores.softmax(1) @ w)
        y = torch.cat(parts, 1) @ b["self_attn.out_proj.weight"].T + b["self_attn.out_proj.bias"]
        x = F.layer_norm(alpha * x + y, (d,), b["self_attn_layer_norm.weight"], b["self_attn_layer_norm.bias"])
        y = F.gelu(x @ b["fc1.weight"].T + b["fc1.bias"]) @ b["fc2.weight"].T + b["fc2.bias"]
        x = F.layer_norm(alpha * x + y, (d,), b["final_layer_norm.weight"], b["final_layer_norm.bias"])
    return x


def noise(samples: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_outputs_equal_a_forward_written_apart(layer: int, checkpoint: Path) -> None:
    """Of every sound alone, from a batch. Measured 1.4e-6; allowed 1e-5.

    The reference's own modules at full size, run beside ours with random weights, differed by at most 7.9e-6 of values up to 6.6.
    """
    config = BeatsConfig(pretrained=str(checkpoint), architecture=SMALL, select_layer=layer)
    preprocess, tensors = config.preprocessor(CONTEXT), load_file(checkpoint)
    items = [preprocess(noise(samples)) for samples in (9000, 1, 3333)]
    with torch.no_grad():
        features, mask = config.build(CONTEXT)(preprocess.collate(items))
        for row, real, item in zip(features, mask, items, strict=True):
            assert int(real.sum()) == preprocess.num_tokens(item)
            expected = forward(item["mel"], tensors, SMALL.encoder_layers + 1 + layer)
            torch.testing.assert_close(row[real], expected, atol=1e-5, rtol=0)
    assert not features[~mask].any()


def energies(wave: np.ndarray[Any, Any], bins: int) -> np.ndarray[Any, Any]:
    """torchaudio's ``compliance.kaldi.fbank`` as the reference calls it, in float64, sums written out."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    mel = lambda f: 1127 * np.log(1 + f / 700)  # noqa: E731
    edges, at = np.linspace(mel(20), mel(8000), bins + 2), mel(np.arange(256) * RATE / 512)
    rows = []
    for start in range(0, len(wave) - 399, 160):
        frame = wave[start : start + 400].astype(np.float64) * 32768
        frame -= frame.mean()
        frame -= 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * hann**0.85, 512))[:256] ** 2
        triangles = [
            np.minimum((at - low) / (centre - low), (high - at) / (high - centre)).clip(0)
            for low, centre, high in zip(edges, edges[1:], edges[2:], strict=False)
        ]
        rows.append([np.log(max(float((weights * power).sum()), 1.1920929e-07)) for weights in triangles])
    return np.array(rows)


@pytest.mark.parametrize("samples", [2800, 5000, 20_001])
def test_sounds_are_prepared_as_by_the_reference(samples: int) -> None:
    """Measured 9.2e-6, by float32; allowed 1e-4."""
    item = BeatsConfig().preprocessor(NO_WEIGHTS)(noise(samples))
    expected = (energies(noise(samples), 128) - 15.41663) / (2 * 6.55582)
    steps = len(expected) // 16
    assert item["mel"].shape == (16 * steps, 128)
    np.testing.assert_allclose(item["mel"], expected[: 16 * steps], atol=1e-4)


@pytest.mark.parametrize(
    ("samples", "tokens"), [(1, 8), (2800, 8), (5359, 8), (5360, 16), (RATE, 48), (10 * RATE, 496)]
)
def test_features_of_a_sound(samples: int, tokens: int) -> None:
    """8 for each 160 ms; 496 of 10 s, as in the paper (998 spectra in patches of 16 x 16)."""
    preprocess = BeatsConfig().preprocessor(NO_WEIGHTS)
    assert preprocess.num_tokens(preprocess(noise(samples))) == tokens


def test_a_short_sound_is_filled_up_with_silence() -> None:
    preprocess = BeatsConfig().preprocessor(NO_WEIGHTS)
    whole = np.concatenate([noise(900), np.zeros(1900, np.float32)])
    assert torch.equal(preprocess(noise(900))["mel"], preprocess(whole)["mel"])


def test_training_reaches_every_parameter() -> None:
    config = BeatsConfig().tiny()
    preprocess, encoder = config.preprocessor(NO_WEIGHTS), config.build(NO_WEIGHTS).train()
    features, _ = encoder(preprocess.collate([preprocess(noise(samples)) for samples in (9000, 40_000)]))
    (features * torch.randn_like(features)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_what_does_not_fit_is_said(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint)

    def build(path: Path, **numbers: Any) -> BeatsEncoder:
        return BeatsConfig(pretrained=str(path), architecture=SMALL.model_copy(update=numbers)).build(CONTEXT)

    with pytest.raises(CheckpointError, match="has 3 blocks, expected 4; give `architecture`"):
        build(checkpoint, encoder_layers=4)
    with pytest.raises(CheckpointError, match=r"encoder.pos_conv.*0 is \(1, 1, 10\), expected \(1, 1, 12\)"):
        build(checkpoint, conv_pos=12)
    save_file({"model.encoder.layers.0.fc1.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is no BEATs checkpoint"):
        build(tmp_path / "other.safetensors")
    del tensors["encoder.layers.1.self_attn.grep_a"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match=r"no encoder\.layers\.1\.self_attn\.grep_a"):
        build(tmp_path / "less.safetensors")
    (tmp_path / "BEATs_iter3.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        build(tmp_path / "BEATs_iter3.pt")
    with pytest.raises(ConfigError, match="select_layer: found -13, expected -12 to -1"):
        BeatsConfig(select_layer=-13).build(NO_WEIGHTS)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"encoder_attention_heads": 7}, "encoder_attention_heads 7 does not divide encoder_embed_dim 768"),
        ({"conv_pos_groups": 7}, "conv_pos_groups 7 does not divide"),
        ({"num_mel_bins": 8}, "a patch of 16 does not fit 8 mel bins"),
        ({"max_distance": 80}, "max_distance 80 is not above a quarter of 320 buckets"),
        ({"num_buckets": 30}, "multiple of 4"),
    ],
)
def test_contradictory_numbers(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BeatsConfig.model_validate({"architecture": numbers})


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (np.zeros(0, np.float32), "at least one sample"),
        (np.zeros((2, 100), np.float32), "expected mono"),
        (np.zeros(2 * RATE + 1, np.float32), "at most 2; cut it .* of the beats encoder"),
    ],
)
def test_sounds_that_are_refused(sound: np.ndarray[Any, np.dtype[np.float32]], message: str) -> None:
    with pytest.raises(MediaError, match=message):
        BeatsConfig(max_seconds=2).preprocessor(NO_WEIGHTS)(sound)
