"""Point-BERT: the published checkpoints' names and shapes, a forward written apart, groups as the reference makes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.encoders.point_bert import PointBertArchitecture, PointBertConfig
from mmllm.encoders.point_bert_module import PointBertEncoder, published_names
from mmllm.errors import CheckpointError, MediaError

CONTEXT = BuildContext(dtype=torch.float32)
NO_WEIGHTS = BuildContext(weights=False)
SMALL = PointBertArchitecture(
    trans_dim=24, depth=3, num_heads=3, group_size=5, num_group=9, encoder_dims=20, npoints=70, embed_dim=14,
    conv_dims=(7, 11), pos_dim=8,
)  # fmt: skip
# PointLLM v1.2: pointllm/model/pointbert/PointTransformer_8192point_2layer.yaml, with use_color; v1.1: …_base_8192point.yaml
POINT_LLM = {
    "v1.2": PointBertArchitecture(depth=12, npoints=8192),
    "v1.1": PointBertArchitecture(
        trans_dim=1152, depth=12, num_heads=12, group_size=48, encoder_dims=512, npoints=8192, point_dims=3
    ),
}


def layout(numbers: PointBertArchitecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ``PointTransformer`` and ``PointTransformer_Colored`` as their own modules give them
    (models/pointbert/point_encoder.py and dvae.py of salesforce/ULIP; OpenRobotLab/PointLLM has the same names).
    """
    d, e, (a, b) = numbers.trans_dim, numbers.encoder_dims, numbers.conv_dims
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d), "cls_pos": (1, 1, d), "reduce_dim.weight": (d, e), "reduce_dim.bias": (d,),
        "pos_embed.0.weight": (numbers.pos_dim, 3), "pos_embed.0.bias": (numbers.pos_dim,),
        "pos_embed.2.weight": (d, numbers.pos_dim), "pos_embed.2.bias": (d,), "norm.weight": (d,), "norm.bias": (d,),
    }  # fmt: skip
    for name, inside, middle, outside in (("first_conv", numbers.point_dims, a, b), ("second_conv", 2 * b, 2 * b, e)):
        found |= {f"encoder.{name}.0.weight": (middle, inside, 1), f"encoder.{name}.0.bias": (middle,)}
        found |= {f"encoder.{name}.1.{kind}": (middle,) for kind in ("weight", "bias", "running_mean", "running_var")}
        found |= {f"encoder.{name}.1.num_batches_tracked": ()}
        found |= {f"encoder.{name}.3.weight": (outside, middle, 1), f"encoder.{name}.3.bias": (outside,)}
    for i in range(numbers.depth):
        block = f"blocks.blocks.{i}."
        found |= {f"{block}{norm}.{kind}": (d,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        found |= {f"{block}attn.qkv.weight": (3 * d, d), f"{block}attn.proj.weight": (d, d)}
        found |= {f"{block}mlp.fc1.weight": (4 * d, d), f"{block}mlp.fc2.weight": (d, 4 * d)}
        found |= {f"{block}attn.proj.bias": (d,), f"{block}mlp.fc1.bias": (4 * d,), f"{block}mlp.fc2.bias": (d,)}
    return found


@pytest.mark.parametrize(
    ("numbers", "output", "count"),
    [
        (PointBertArchitecture(), "tokens", 32_499_072),
        (PointBertArchitecture(), "embedding", 32_499_072 + 768 * 1280),
        (POINT_LLM["v1.2"], "tokens", 21_859_200),
        (POINT_LLM["v1.1"], "tokens", 192_546_048),
    ],
)
def test_the_published_checkpoints_fit(numbers: PointBertArchitecture, output: str, count: int) -> None:
    """Every tensor of the file is in the module with its shape, and none is missing. Counts are those that the reference's
    own module gives.
    """
    with torch.device("meta"):
        encoder = PointBertConfig.model_validate({"architecture": numbers, "output": output}).build(NO_WEIGHTS)
    state = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    names = published_names(list(state), "module.point_encoder.")
    published = {f"module.point_encoder.{name}": shape for name, shape in layout(numbers).items()}
    if output == "embedding":
        published["module.pc_projection"] = (2 * numbers.trans_dim, numbers.embed_dim)
    assert {names[own]: shape for own, shape in state.items()} == published
    assert sum(p.numel() for p in encoder.parameters()) == count


def checkpoint(path: Path, beginning: str, **more: Tensor) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=draw) * (0.3 if len(shape) < 2 else 1.5 * math.prod(shape[1:]) ** -0.5)
        for name, shape in layout(SMALL).items()
    }
    for name in tensors:
        if name.endswith("running_var"):
            tensors[name] = tensors[name].abs() + 0.2
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(5)
    save_file({f"{beginning}{name}": value for name, value in tensors.items()} | more, path)
    return tensors


def cloud(points: int = 70, seed: int = 0) -> NDArray[np.float32]:
    """Places off the middle and of any size, colours from 0 to 1."""
    draw = np.random.default_rng(seed)
    places = draw.normal(5, 3, (points, 3)) * [1, 2, 0.5]
    return np.concatenate([places, draw.random((points, 3))], axis=1).astype(np.float32)


def groups_apart(points: NDArray[np.float32], numbers: PointBertArchitecture) -> tuple[NDArray[Any], NDArray[Any]]:
    """Groups (G, M, 6) and centres (G, 3), by sorting all distances; the first point is the first centre."""
    places = points[:, :3].astype(float) - points[:, :3].astype(float).mean(axis=0)
    places /= max(float(np.linalg.norm(place)) for place in places)
    chosen = [0]
    while len(chosen) < numbers.num_group:
        away = [min(float(np.linalg.norm(place - places[c])) for c in chosen) for place in places]
        chosen.append(int(np.argmax(away)))
    groups = []
    for c in chosen:
        nearest = sorted(range(len(places)), key=lambda i: float(np.linalg.norm(places[i] - places[c])))
        group = nearest[: numbers.group_size]
        groups.append([[*(places[i] - places[c]), *points[i, 3:].astype(float)] for i in group])
    return np.array(groups), places[chosen]


def forward(points: NDArray[np.float32], t: dict[str, Tensor]) -> Tensor:
    """Tokens (1 + G, D) of one cloud, group by group and head by head."""
    numbers, d = SMALL, SMALL.trans_dim
    groups, centers = (torch.from_numpy(x).float() for x in groups_apart(points, numbers))

    def layer(name: str, x: Tensor) -> Tensor:
        return x @ t[f"{name}.weight"].flatten(1).T + t[f"{name}.bias"]

    def convolutions(name: str, x: Tensor) -> Tensor:
        x = layer(f"encoder.{name}.0", x)
        norm = f"encoder.{name}.1."
        x = (x - t[f"{norm}running_mean"]) / (t[f"{norm}running_var"] + 1e-5).sqrt() * t[f"{norm}weight"] + t[
            f"{norm}bias"
        ]
        return layer(f"encoder.{name}.3", x.clamp(min=0))

    tokens, places = [t["cls_token"][0, 0]], [t["cls_pos"][0, 0]]
    for group, center in zip(groups, centers, strict=True):
        each = convolutions("first_conv", group)  # (M, b)
        whole = each.max(dim=0).values
        found = convolutions("second_conv", torch.stack([torch.cat([whole, one]) for one in each]))
        tokens.append(layer("reduce_dim", found.max(dim=0).values))
        places.append(layer("pos_embed.2", F.gelu(layer("pos_embed.0", center))))
    x, place = torch.stack(tokens), torch.stack(places)
    for i in range(numbers.depth):
        block = f"blocks.blocks.{i}."
        x = x + place
        y = F.layer_norm(x, (d,), t[f"{block}norm1.weight"], t[f"{block}norm1.bias"])
        q, k, v = (y @ t[f"{block}attn.qkv.weight"].T).split(d, dim=1)
        heads, size = [], d // numbers.num_heads
        for h in range(numbers.num_heads):
            own = slice(h * size, (h + 1) * size)
            heads.append((q[:, own] @ k[:, own].T / math.sqrt(size)).softmax(dim=1) @ v[:, own])
        x = x + layer(f"{block}attn.proj", torch.cat(heads, dim=1))
        y = F.layer_norm(x, (d,), t[f"{block}norm2.weight"], t[f"{block}norm2.bias"])
        x = x + layer(f"{block}mlp.fc2", F.gelu(layer(f"{block}mlp.fc1", y)))
    return F.layer_norm(x, (d,), t["norm.weight"], t["norm.bias"])


BEGINNINGS = ("", "point_encoder.", "module.point_encoder.", "model.point_backbone.")


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("output", ["tokens", "pooled", "embedding"])
def test_outputs_equal_a_forward_written_apart(output: str, beginning: str, tmp_path: Path) -> None:
    """Of every cloud alone, from a batch. Measured 1.7e-6; allowed 2e-5.

    PointLLM's own modules at full size (ULIP-2's numbers and v1.2's), with random weights and their first centre set to the
    first point, gave tokens that differ by at most 5.3e-6 of values up to 4.0.
    """
    projection = torch.randn(2 * SMALL.trans_dim, SMALL.embed_dim, generator=torch.Generator().manual_seed(1))
    outside = beginning.removesuffix("point_encoder.")
    t = checkpoint(tmp_path / "model.safetensors", beginning, **{f"{outside}pc_projection": projection})
    given = {"pretrained": str(tmp_path), "architecture": SMALL, "output": output}
    config = PointBertConfig.model_validate(given)
    preprocess, encoder = config.preprocessor(CONTEXT), config.build(CONTEXT)
    clouds = [cloud(seed=seed) for seed in range(3)]
    items = [preprocess(one) for one in clouds]
    with torch.no_grad():
        features, mask = encoder(preprocess.collate(items))
    for row, real, item, one in zip(features, mask, items, clouds, strict=True):
        expected = forward(one, t)
        if output != "tokens":
            expected = torch.cat([expected[0], expected[1:].max(dim=0).values])[None]
        if output == "embedding":
            expected = expected @ projection
        assert int(real.sum()) == len(row) == preprocess.num_tokens(item)
        torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dims", [3, 6])
def test_groups_are_those_of_the_reference(dims: int) -> None:
    """Measured 1.2e-7 in float32; allowed 1e-6."""
    numbers = SMALL.model_copy(update={"point_dims": dims})
    item = PointBertConfig(architecture=numbers).preprocessor(NO_WEIGHTS)(cloud())
    groups, centers = groups_apart(cloud(), numbers)
    np.testing.assert_allclose(item["centers"], centers, atol=1e-6)
    np.testing.assert_allclose(item["groups"], groups[..., :dims], atol=1e-6)
    assert item["groups"].dtype == torch.float32


def test_place_and_size_of_an_object_do_not_matter_but_its_colours_do() -> None:
    preprocess = PointBertConfig(architecture=SMALL).preprocessor(NO_WEIGHTS)
    moved, painted = cloud(), cloud()
    moved[:, :3] = moved[:, :3] * 8 + 64
    painted[:, 3:] = 1 - painted[:, 3:]
    first, second, third = (preprocess(one) for one in (cloud(), moved, painted))
    torch.testing.assert_close(first["groups"], second["groups"], atol=2e-5, rtol=0)
    assert torch.equal(first["centers"], third["centers"])
    assert not torch.equal(first["groups"], third["groups"])


def test_tokens_of_the_published_models() -> None:
    """513 of PointLLM's, as its point_token_len."""
    for numbers, output, tokens in ((POINT_LLM["v1.2"], "tokens", 513), (POINT_LLM["v1.2"], "pooled", 1)):
        config = PointBertConfig.model_validate({"architecture": numbers, "output": output})
        preprocess = config.preprocessor(NO_WEIGHTS)
        assert preprocess.decode_options == {"points": 8192}
        assert preprocess.num_tokens(preprocess(cloud(8192))) == tokens


@pytest.mark.parametrize("output", ["tokens", "embedding"])
def test_training_reaches_every_parameter_and_moves_no_statistics(output: str) -> None:
    config = PointBertConfig.model_validate({"output": output}).tiny()
    preprocess, encoder = config.preprocessor(NO_WEIGHTS), config.build(NO_WEIGHTS).train()
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    features, _ = encoder(preprocess.collate([preprocess(cloud(64, seed)) for seed in range(2)]))
    (features * torch.randn_like(features)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint(path, "point_encoder.")
    tensors = load_file(path)

    def build(path: Path, output: str = "tokens", **numbers: Any) -> PointBertEncoder:
        given = {"pretrained": str(path), "architecture": SMALL.model_copy(update=numbers), "output": output}
        return PointBertConfig.model_validate(given).build(CONTEXT)

    with pytest.raises(CheckpointError, match="has 3 blocks, expected 4; give `architecture`"):
        build(path, depth=4)
    with pytest.raises(CheckpointError, match=r"encoder.first_conv.0.weight is \(7, 6, 1\), expected \(7, 3, 1\)"):
        build(path, point_dims=3)
    with pytest.raises(CheckpointError, match="no pc_projection"):
        build(path, "embedding")
    del tensors["point_encoder.norm.bias"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match=r"no norm\.bias"):
        build(tmp_path / "less.safetensors")
    save_file({"visual.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="has 0 Point-BERTs"):
        build(tmp_path / "other.safetensors")
    (tmp_path / "ULIP-2.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        build(tmp_path / "ULIP-2.pt")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_heads": 7}, "num_heads 7 does not divide trans_dim 384"),
        ({"npoints": 511}, "num_group 512 is more than npoints 511"),
        ({"npoints": 600, "group_size": 601}, "group_size 601 is more than npoints 600"),
        ({"point_dims": 4}, "3 or 6"),
    ],
)
def test_contradictory_numbers(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PointBertConfig.model_validate({"architecture": numbers})


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.ones((70, 6), np.float32), "all points lie in one place"),
        (cloud(8), r"\(8, 6\), expected \(P, 6\) with at least 9"),
        (cloud()[:, :3], r"\(70, 3\), expected \(P, 6\)"),
    ],
)
def test_clouds_that_are_refused(points: NDArray[np.float32], message: str) -> None:
    with pytest.raises(MediaError, match=message):
        PointBertConfig(architecture=SMALL).preprocessor(NO_WEIGHTS)(points)
