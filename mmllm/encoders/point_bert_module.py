"""Point-BERT, written so that the published checkpoints' tensors fit (salesforce/ULIP, `models/pointbert/`).

Farthest points and their neighbours are found in the preprocessor: they depend on no weight, so data workers do it in
float32, whatever the model computes in. All tensors have the published names below ``point_encoder.`` (ULIP) or
``model.point_backbone.`` (PointLLM), but for ULIP's ``pc_projection``, which stands beside its ``point_encoder``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.encoders.base import Encoder
from mmllm.encoders.point_bert import PointBertArchitecture, PointBertConfig
from mmllm.errors import CheckpointError, MediaError
from mmllm.pretrained import load_into, read_tensors, tensor_names, weight_files

PROJECTION = "pc_projection"
MARK = "cls_pos"  # the tensor by which the beginning of all names is found


class PointBertPreprocessor:
    """Points to groups of neighbours; deterministic, picklable, no weights.

    An item is ``groups`` (G, M, C) float32, places relative to the group's centre and, with 6 ``point_dims``, colours; and
    ``centers`` (G, 3). Collated: the same with N in front.
    """

    media = "point_cloud"

    def __init__(self, numbers: PointBertArchitecture, output: str) -> None:
        self.decode_options: dict[str, Any] = {"points": numbers.npoints}
        self.numbers = numbers
        self.tokens = 1 + numbers.num_group if output == "tokens" else 1

    def __call__(self, media: NDArray[np.float32]) -> dict[str, Tensor]:
        """``media`` (P, 6), P at least ``num_group`` and ``group_size``. Raises ``MediaError`` for fewer, and for points
        that all lie in one place.
        """
        numbers = self.numbers
        least = max(numbers.num_group, numbers.group_size)
        if media.ndim != 2 or media.shape[1] != 6 or len(media) < least:
            raise MediaError(f"found points of shape {media.shape}, expected (P, 6) with at least {least} points")
        scaled = on_unit_sphere(media[:, :3])
        places, chosen = torch.from_numpy(scaled), farthest_points(scaled, numbers.num_group)
        centers = places[chosen]
        away = torch.cdist(centers, places, compute_mode="donot_use_mm_for_euclid_dist")
        near = away.topk(numbers.group_size, largest=False).indices  # (G, M)
        groups = places[near] - centers[:, None]
        if numbers.point_dims == 6:
            colours = torch.from_numpy(np.ascontiguousarray(media[:, 3:]))
            groups = torch.cat([groups, colours[near]], dim=-1)
        return {"groups": groups, "centers": centers}

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        return self.tokens

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([item[name] for item in items]) for name in ("groups", "centers")}


def on_unit_sphere(places: NDArray[np.float32]) -> NDArray[np.float32]:
    """``places (P, 3)`` around their mean, the furthest at distance 1 (``pc_norm`` of ULIP and PointLLM).

    Raises ``MediaError`` when they all lie in one place.
    """
    centred = places.astype(np.float64)
    centred -= centred.mean(axis=0)
    furthest = float(np.sqrt((centred**2).sum(axis=1)).max())
    if furthest < 1e-30:
        raise MediaError("all points lie in one place; an object has an extent")
    return (centred / furthest).astype(np.float32)


def farthest_points(places: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices ``(count,)`` of points of ``places (P, 3)``: the first, then always the one farthest from all before it.

    PointLLM's code begins at random, ULIP's CUDA operator at the first point, passing over those within 0.03 of the
    middle. Here nothing is random and nothing passed over.
    """
    axes = np.ascontiguousarray(places.T)  # each step goes through all points: NumPy takes a third of torch's time
    chosen = np.zeros(count, np.int64)
    nearest = np.full(len(places), np.inf, np.float32)  # squared distance to the nearest point chosen so far
    for index in range(1, count):
        away = axes - axes[:, chosen[index - 1], None]
        away *= away
        np.minimum(nearest, away.sum(axis=0), out=nearest)
        chosen[index] = nearest.argmax()
    return chosen


class PointNet(nn.Module):
    """A group of points to one vector, whatever their order: ``(…, M, C) -> (…, E)``."""

    def __init__(self, numbers: PointBertArchitecture) -> None:
        super().__init__()
        first, second = numbers.conv_dims
        self.first_conv = nn.Sequential(
            nn.Conv1d(numbers.point_dims, first, 1), nn.BatchNorm1d(first), nn.ReLU(), nn.Conv1d(first, second, 1)
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(2 * second, 2 * second, 1),
            nn.BatchNorm1d(2 * second),
            nn.ReLU(),
            nn.Conv1d(2 * second, numbers.encoder_dims, 1),
        )

    def forward(self, groups: Tensor) -> Tensor:
        each: Tensor = self.first_conv(groups.flatten(0, -3).transpose(1, 2))  # (N * G, D, M)
        together = each.amax(dim=2, keepdim=True).expand_as(each)
        found: Tensor = self.second_conv(torch.cat([together, each], dim=1)).amax(dim=2)
        return found.reshape(*groups.shape[:-2], -1)


class Attention(nn.Module):
    """Self-attention over all tokens; queries, keys and values without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, H, L, D / H) each
        found: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


class MLP(nn.Module):
    """Two linear layers, the inner one four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return found


class Block(nn.Module):
    """Attention and MLP, a norm in front of each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        found: Tensor = x + self.mlp(self.norm2(x))
        return found


class Transformer(nn.Module):
    """The blocks; the tokens' places are added in front of each."""

    def __init__(self, numbers: PointBertArchitecture) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(numbers.trans_dim, numbers.num_heads) for _ in range(numbers.depth))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x + places)
        return x


class PointBertEncoder(Encoder):
    """Groups of points to features. The drop path of the reference's pretraining does not exist here."""

    def __init__(self, numbers: PointBertArchitecture, output: str) -> None:
        super().__init__()
        width, self.output = numbers.trans_dim, output
        self.encoder = PointNet(numbers)
        self.reduce_dim = nn.Linear(numbers.encoder_dims, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_pos = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Sequential(nn.Linear(3, numbers.pos_dim), nn.GELU(), nn.Linear(numbers.pos_dim, width))
        self.blocks = Transformer(numbers)
        self.norm = nn.LayerNorm(width)
        self.output_dim = {"tokens": width, "pooled": 2 * width, "embedding": numbers.embed_dim}[output]
        if output == "embedding":
            start = torch.randn(2 * width, numbers.embed_dim) * numbers.embed_dim**-0.5
            self.pc_projection = nn.Parameter(start)

    def train(self, mode: bool = True) -> PointBertEncoder:
        """As ``nn.Module.train``, but the running statistics of batch norms never move."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``batch`` from ``PointBertPreprocessor.collate``; features (N, S, D), all of them real.

        S is 1 + G, the class token first, for ``tokens``; 1 for the others.
        """
        dtype = self.reduce_dim.weight.dtype
        tokens = self.reduce_dim(self.encoder(batch["groups"].to(dtype)))
        each = (len(tokens), 1, -1)
        x = torch.cat([self.cls_token.expand(each), tokens], dim=1)
        places = torch.cat([self.cls_pos.expand(each), self.pos_embed(batch["centers"].to(dtype))], dim=1)
        features: Tensor = self.norm(self.blocks(x, places))
        if self.output != "tokens":
            features = torch.cat([features[:, :1], features[:, 1:].amax(dim=1, keepdim=True)], dim=-1)
        if self.output == "embedding":
            features = features @ self.pc_projection
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)


def published_names(own: Sequence[str], beginning: str) -> dict[str, str]:
    """The published names of this module's tensors ``own``, in a checkpoint whose names begin with ``beginning``.

    What of a checkpoint has no counterpart: the towers of pictures and text that ULIP trained beside (``open_clip_model.*``,
    ``visual.*``, …), ``logit_scale``, PointLLM's language model and ``point_proj.*``, and, for ``tokens`` and ``pooled``,
    ``pc_projection``.
    """
    outside = beginning.removesuffix("point_encoder.")
    return {name: f"{outside if name == PROJECTION else beginning}{name}" for name in own}


def make_encoder(config: PointBertConfig, context: BuildContext) -> PointBertEncoder:
    """See ``PointBertConfig.build``."""
    encoder = PointBertEncoder(config.architecture, config.output)
    if config.pretrained is not None and context.weights:
        reference = context.resolve(config.pretrained)
        files = weight_files(reference, config.revision, ["model.safetensors"])
        beginning = _beginning(tensor_names(files), config.architecture.depth, reference)
        names = published_names(list(encoder.state_dict()), beginning)
        tensors = read_tensors(files, sorted(names.values()))
        load_into(encoder, {own: tensors[name] for own, name in names.items() if name in tensors}, reference)
    return encoder.to(context.dtype).train(False)


def _beginning(names: Sequence[str], expected: int, source: str) -> str:
    """What stands before all names of a checkpoint's Point-BERT. Raises ``CheckpointError`` for another depth."""
    found = [name.removesuffix(MARK) for name in names if name.split(".")[-1] == MARK]
    if len(found) != 1:
        raise CheckpointError(
            f"{source} has {len(found)} Point-BERTs; expected tensors named as in ULIP's or PointLLM's checkpoints, such as "
            f"point_encoder.{MARK}"
        )
    start = f"{found[0]}blocks.blocks."
    depth = len({name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)})
    if depth != expected:
        raise CheckpointError(f"{source} has {depth} blocks, expected {expected}; give `architecture`")
    return found[0]
