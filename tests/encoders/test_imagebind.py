"""ImageBind's trunks: the published checkpoint's names and shapes, a forward written apart, the reference's preprocessing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.encoders.imagebind import HUGE, ImageBindArchitecture, ImageBindConfig, Trunk
from mmllm.encoders.imagebind_module import ImageBindEncoder, published_name
from mmllm.errors import CheckpointError, MediaError

CONTEXT = BuildContext(dtype=torch.float32)
MODALITIES = {"vision": "image", "audio": "audio", "text": "text", "depth": "depth", "thermal": "thermal", "imu": "imu"}


def layout(trunk: str, numbers: ImageBindArchitecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one trunk's tensors in the published file, as the reference's own modules give them."""
    d, out, (first, second), p = numbers.width, numbers.output_dim, numbers.size, numbers.patch
    stem = {
        "vision": "rgbt_stem",
        "audio": "rgbt_stem",
        "thermal": "rgbt_stem",
        "depth": "depth_stem",
        "imu": "imu_stem",
    }
    pre, head = f"modality_preprocessors.{trunk}.", f"modality_heads.{trunk}."
    found: dict[str, tuple[int, ...]] = {}
    if trunk == "text":
        found |= {f"{pre}token_embedding.weight": (first, d), f"{pre}pos_embed": (1, second, d)}
        found |= {f"{head}proj.0.weight": (d,), f"{head}proj.0.bias": (d,), f"{head}proj.1.weight": (out, d)}
    else:
        patches = second // p if trunk == "imu" else numbers.steps(0) * numbers.steps(1)
        place = "pos_embed" if trunk == "imu" else "pos_embedding_helper.pos_embed"
        found |= {f"{pre}cls_token": (1, 1, d), f"{pre}{place}": (1, 1 + patches, d)}
        kernel = {"vision": (d, 3, 2, p, p), "imu": (d, first * p)}.get(trunk, (d, 1, p, p))
        found[f"{pre}{stem[trunk]}.proj.{'1.' if trunk == 'vision' else ''}weight"] = kernel
        if trunk != "vision":
            found |= {f"{pre}{stem[trunk]}.norm_layer.{kind}": (d,) for kind in ("weight", "bias")}
        last = "3" if trunk == "imu" else "2"
        found |= {f"{head}0.weight": (d,), f"{head}0.bias": (d,), f"{head}{last}.weight": (out, d)}
    body = f"modality_trunks.{trunk}."
    if trunk == "vision":
        found |= {f"{body}pre_transformer_layer.0.{kind}": (d,) for kind in ("weight", "bias")}
    for i in range(numbers.layers):
        block = f"{body}blocks.{i}."
        shapes = {"attn.in_proj": (3 * d, d), "attn.out_proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        for name, shape in shapes.items():
            weight = f"{block}{name}_weight" if name.endswith("in_proj") else f"{block}{name}.weight"
            found |= {weight: shape, weight.replace("weight", "bias"): shape[:1]}
        found |= {f"{block}norm_{k}.{kind}": (d,) for k in (1, 2) for kind in ("weight", "bias")}
        if trunk not in ("vision", "text"):
            found |= {f"{block}attn.bias_k": (1, 1, d), f"{block}attn.bias_v": (1, 1, d)}
    return found


# Parameters of `imagebind_huge`'s trunks with their stems and heads, counted from the reference's own module.
COUNTS = {
    "vision": 632_829_440,
    "audio": 86_235_648,
    "text": 354_032_640,
    "depth": 21_871_872,
    "thermal": 86_211_072,
    "imu": 19_600_384,
}


@pytest.mark.parametrize("trunk", HUGE)
def test_the_published_checkpoint_fits(trunk: Trunk) -> None:
    with torch.device("meta"):
        encoder = ImageBindEncoder(trunk, HUGE[trunk], pooled=True)
    own = {published_name(trunk, name): tuple(value.shape) for name, value in encoder.state_dict().items()}
    assert own == layout(trunk, HUGE[trunk])
    assert sum(p.numel() for p in encoder.parameters()) == COUNTS[trunk]


def tiny_numbers(trunk: Trunk) -> ImageBindArchitecture:
    size = {"text": (300, 12), "imu": (6, 40), "audio": (36, 56)}.get(trunk, (2 * HUGE[trunk].patch,) * 2)
    return HUGE[trunk].model_copy(update={"width": 32, "layers": 2, "heads": 4, "output_dim": 24, "size": size})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All six trunks in one file, as published, with what mmllm leaves out beside them."""
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        for trunk in HUGE
        for name, shape in layout(trunk, tiny_numbers(trunk)).items()
    }
    tensors["modality_preprocessors.text.mask"] = torch.zeros(12, 12)
    tensors["modality_postprocessors.audio.1.log_logit_scale"] = torch.tensor(math.log(20.0))
    path: Path = tmp_path_factory.mktemp("imagebind") / "imagebind.safetensors"
    save_file(tensors, path)
    return path


def config(trunk: Trunk, checkpoint: Path, **options: Any) -> ImageBindConfig:
    given = {"modality": MODALITIES[trunk], "pretrained": str(checkpoint), "architecture": tiny_numbers(trunk)}
    return ImageBindConfig.model_validate(given | options)


def forward(trunk: str, numbers: ImageBindArchitecture, views: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(tokens of the last block, embedding of unit length) of (M, …) views, from tensors under published names."""
    pre, body, d = f"modality_preprocessors.{trunk}.", f"modality_trunks.{trunk}.", numbers.width
    p, s = numbers.patch, numbers.stride
    at = torch.zeros(len(views), dtype=torch.long)
    if trunk == "text":
        x, at = t[f"{pre}token_embedding.weight"][views] + t[f"{pre}pos_embed"], views.argmax(1)
    else:
        if trunk == "imu":
            cut = [views[:, :, i : i + p].flatten(1) for i in range(0, numbers.size[1], p)]
        else:
            rows, cols = (range(0, n - p + 1, s) for n in numbers.size)
            cut = [views[..., r : r + p, c : c + p].flatten(1) for r in rows for c in cols]
        (kernel,) = (v for k, v in t.items() if k.startswith(pre) and ".proj." in k)
        x = torch.stack(cut, 1) @ kernel.flatten(1).T
        norm = {k.rsplit(".", 1)[1]: v for k, v in t.items() if k.startswith(pre) and "norm_layer" in k}
        if norm:
            x = F.layer_norm(x, (d,), norm["weight"], norm["bias"], 1e-5)
        place = "pos_embed" if trunk == "imu" else "pos_embedding_helper.pos_embed"
        x = torch.cat([t[f"{pre}cls_token"].expand(len(x), 1, d), x], 1) + t[f"{pre}{place}"]
    if trunk == "vision":
        first = f"{body}pre_transformer_layer.0."
        x = F.layer_norm(x, (d,), t[f"{first}weight"], t[f"{first}bias"], 1e-6)
    heads, size = numbers.heads, d // numbers.heads
    for i in range(numbers.layers):
        b = f"{body}blocks.{i}."
        y = F.layer_norm(x, (d,), t[f"{b}norm_1.weight"], t[f"{b}norm_1.bias"], 1e-6)
        q, k, v = (y @ t[f"{b}attn.in_proj_weight"].T + t[f"{b}attn.in_proj_bias"]).chunk(3, -1)
        if f"{b}attn.bias_k" in t:
            k, v = (torch.cat([z, t[f"{b}attn.bias_{n}"].expand(len(z), 1, d)], 1) for n, z in (("k", k), ("v", v)))
        q, k, v = (z.unflatten(-1, (heads, size)).transpose(1, 2) for z in (q, k, v))
        scores = q @ k.transpose(2, 3) / size**0.5
        if trunk == "text":
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ t[f"{b}attn.out_proj.weight"].T + t[f"{b}attn.out_proj.bias"]
        y = F.layer_norm(x, (d,), t[f"{b}norm_2.weight"], t[f"{b}norm_2.bias"], 1e-6)
        y = F.gelu(y @ t[f"{b}mlp.fc1.weight"].T + t[f"{b}mlp.fc1.bias"])
        x = x + y @ t[f"{b}mlp.fc2.weight"].T + t[f"{b}mlp.fc2.bias"]
    head = {k: v for k, v in t.items() if k.startswith(f"modality_heads.{trunk}.")}
    (project,) = (v for v in head.values() if v.ndim == 2)
    norm = {k.rsplit(".", 1)[1]: v for k, v in head.items() if v.ndim == 1}
    y = F.layer_norm(x[torch.arange(len(x)), at], (d,), norm["weight"], norm["bias"], 1e-6) @ project.T
    return x, y / y.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("trunk", HUGE)
def test_outputs_equal_a_forward_written_apart(trunk: Trunk, checkpoint: Path) -> None:
    """The reference's own modules, run beside ours with random weights, differed by at most 1.5e-7."""
    from safetensors.torch import load_file

    numbers, draw = tiny_numbers(trunk), torch.Generator().manual_seed(1)
    shapes = {"vision": (3, 2, *numbers.size), "imu": numbers.size, "text": (12,)}
    shape = (2, 3, *shapes.get(trunk, (1, *numbers.size)))  # two media of three views
    views = torch.randint(0, 300, shape, generator=draw) if trunk == "text" else torch.randn(shape, generator=draw)
    batch = {"views": views, "length": torch.full((2,), 10_000)}
    with torch.no_grad():
        pooled, mask = config(trunk, checkpoint).build(CONTEXT)(batch)
        tokens, _ = config(trunk, checkpoint, output="tokens").build(CONTEXT)(batch)
    seen, embedding = forward(trunk, numbers, views.flatten(0, 1), load_file(checkpoint))
    assert mask.all()
    torch.testing.assert_close(pooled, embedding.unflatten(0, (2, 3)).mean(1, keepdim=True), atol=5e-6, rtol=0)
    torch.testing.assert_close(tokens, seen.unflatten(0, (2, 3)).flatten(1, 2), atol=5e-5, rtol=1e-5)


def test_what_does_not_fit_is_said(checkpoint: Path, tmp_path: Path) -> None:
    deeper = tiny_numbers("vision").model_copy(update={"layers": 3})
    with pytest.raises(CheckpointError, match="has 2 blocks in its vision trunk, expected 3; give `architecture`"):
        config("vision", checkpoint, architecture=deeper).build(CONTEXT)
    save_file({"modality_trunks.audio.blocks.0.attn.in_proj_weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="has no vision trunk"):
        config("vision", tmp_path / "a.safetensors").build(CONTEXT)
    (tmp_path / "imagebind_huge.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        config("vision", tmp_path / "imagebind_huge.pth").build(CONTEXT)
    with pytest.raises(ValueError, match="`clips` is for video and audio"):
        ImageBindConfig(modality="image", clips=2)


# Preprocessing --------------------------------------------------------------------------------------------------------
def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(300, 240), (200, 500), (224, 224), (31, 17)])
def test_pictures_are_prepared_as_by_the_reference(size: tuple[int, int]) -> None:
    from torchvision import transforms

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(224, bicubic), transforms.CenterCrop(224), transforms.ToTensor()]
    expected = transforms.Compose([*steps, transforms.Normalize(mean, std)])(noise(*size))
    views = ImageBindConfig(modality="image").preprocessor(CONTEXT)(noise(*size))["views"]
    assert views.shape == (1, 3, 2, 224, 224)
    assert torch.equal(views[0, :, 0], expected)
    assert torch.equal(views[0, :, 1], expected)


def test_a_thin_picture_costs_no_memory() -> None:
    views = ImageBindConfig(modality="image").preprocessor(CONTEXT)(Image.new("RGB", (60_000, 1)))["views"]
    assert views.shape == (1, 3, 2, 224, 224)


@pytest.mark.parametrize("wide", [True, False])
def test_films_are_cropped_thrice(wide: bool) -> None:
    size = (448, 224) if wide else (224, 448)
    frames = [noise(*size, seed) for seed in range(4)]
    preprocess = ImageBindConfig(modality="video", clips=2).preprocessor(CONTEXT)
    assert preprocess.decode_options == {"frames": 2, "clips": 2, "seconds": 2.0}
    item = preprocess(frames)
    assert item["views"].shape == (6, 3, 2, 224, 224)
    assert preprocess.num_tokens(item) == 1
    pixels = torch.from_numpy(np.array(frames[3])).permute(2, 0, 1) / 255
    mean, std = torch.tensor((0.48145466, 0.4578275, 0.40821073)), torch.tensor((0.26862954, 0.26130258, 0.27577711))
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    for crop, start in enumerate((0, 112, 224)):  # of the second stretch's second frame
        part = pixels[:, :, start : start + 224] if wide else pixels[:, start : start + 224]
        torch.testing.assert_close(item["views"][3 + crop, :, 1], part, atol=1e-5, rtol=0)
    with pytest.raises(MediaError, match="found 3 frames"):
        preprocess(frames[:3])


def kaldi_energies(wave: np.ndarray[Any, Any], bins: int = 128) -> np.ndarray[Any, Any]:
    """Kaldi's filter bank in float64, sums written out."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    mel = lambda f: 1127 * np.log(1 + f / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), bins + 2)
    at = mel(np.arange(256) * 16_000 / 512)
    rows = []
    for start in range(0, len(wave) - 399, 160):
        frame = wave[start : start + 400].astype(np.float64)
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, 512))[:256] ** 2
        row = []
        for low, centre, high in zip(edges, edges[1:], edges[2:], strict=False):
            weight = np.minimum((at - low) / (centre - low), (high - at) / (high - centre)).clip(0)
            row.append(np.log(max(float((weight * power).sum()), 1.1920929e-07)))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("samples", [32_000, 90_001, 20_000, 401])
def test_sounds_are_prepared_as_by_the_reference(samples: int) -> None:
    """Three stretches of two seconds. Measured at most 6e-4 before normalising, where filters hold nearly nothing."""
    wave = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
    preprocess = ImageBindConfig(modality="audio").preprocessor(CONTEXT)
    assert preprocess.decode_options == {"sample_rate": 16_000}
    views = preprocess(wave)["views"]
    assert views.shape == (3, 1, 128, 204)
    for view, share in zip(views, (0, 1, 2), strict=True):
        start = share * max(samples - 32_000, 0) // 2
        piece = wave[start : start + 32_000]
        expected = np.zeros((204, 128))
        energies = kaldi_energies(piece - piece.mean())
        expected[: len(energies)] = energies
        np.testing.assert_allclose(view[0].T * 9.138 - 4.268, expected, atol=5e-3)


def test_other_inputs_are_checked() -> None:
    with pytest.raises(MediaError, match="expected mono"):
        ImageBindConfig(modality="audio").preprocessor(CONTEXT)(np.zeros((2, 5), np.float32))
    with pytest.raises(MediaError, match=r"found values of shape \(3, 5\), expected \(6, samples\)"):
        ImageBindConfig(modality="imu").preprocessor(CONTEXT)(np.zeros((3, 5)))


def test_text_is_clips() -> None:
    """`<start> a dog . <end>` in CLIP's vocabulary."""
    preprocess = ImageBindConfig(modality="text", output="tokens").preprocessor(CONTEXT)
    item = preprocess("A dog.")
    assert item["views"][0, :6].tolist() == [49406, 320, 1929, 269, 49407, 0]
    assert preprocess.num_tokens(item) == 5
