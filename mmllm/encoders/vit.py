"""Vision transformers at the picture's own aspect ratio, several pictures of different shapes per call.

An ``open_clip`` ``VisionTransformer`` expects one fixed square. The functions below run the same weights on any
grid of patches: the picture is resized so that its patches fit a budget with its aspect kept, position embeddings
are interpolated to that grid (the practice of ViT, arXiv 2010.11929 section 3.2), and pictures with different grids
share one padded batch whose padding is hidden from attention (the packing idea of NaViT, arXiv 2307.06304).
For the square grid the model was made for, the result equals open_clip's own intermediate features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class VitFeatures:
    """What a vision tower saw: ``tokens`` (N, S, D), ``mask`` (N, S) bool, True on patches, ``class_token`` (N, D)."""

    tokens: Tensor
    mask: Tensor
    class_token: Tensor


def fit_grid(width: int, height: int, patch: int, max_patches: int, min_patches: int = 1) -> tuple[int, int]:
    """Return ``(rows, cols)``, the grid of patches for a picture of ``width`` x ``height`` pixels.

    The aspect ratio is kept as far as whole patches allow, ``rows * cols <= max_patches``, each at least 1.
    A picture is scaled up only as far as ``min_patches`` asks for (rounding to whole patches may leave it a few short):
    more patches add cost, not detail, but a tower may know no pictures as small as that.
    Raises ``ValueError`` when an argument is not positive, or when ``min_patches`` exceeds ``max_patches``.
    """
    if min(width, height, patch, max_patches, min_patches) < 1 or min_patches > max_patches:
        raise ValueError(
            f"found width={width}, height={height}, patch={patch}, max_patches={max_patches}, min_patches={min_patches}; "
            "all must be at least 1, and max_patches no less than min_patches"
        )
    own = width * height / (patch * patch)  # patches at the picture's own size
    scale = math.sqrt(min(max(own, min_patches), max_patches) / own)
    rows = max(1, round(height * scale / patch))
    cols = max(1, round(width * scale / patch))
    if rows * cols > max_patches:  # rounding, or a strip thinner than one patch: shorten the longer side
        if cols >= rows:
            rows = min(rows, max_patches)
            cols = max(1, max_patches // rows)
        else:
            cols = min(cols, max_patches)
            rows = max(1, max_patches // cols)
    return rows, cols


def resize_to_grid(image: Image.Image, rows: int, cols: int, patch: int) -> Image.Image:
    """Resize to ``cols * patch`` x ``rows * patch`` pixels (bicubic, antialiased); itself if it fits already."""
    size = (cols * patch, rows * patch)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """(3, rows*patch, cols*patch) -> (rows*cols, 3*patch*patch), row by row, values ordered as in ``conv1.weight``."""
    channels, height, width = pixels.shape
    if height % patch or width % patch:
        raise ValueError(f"found a {height} x {width} picture, expected multiples of patch {patch}: resize it first")
    blocks = pixels.reshape(channels, height // patch, patch, width // patch, patch)
    return blocks.permute(1, 3, 0, 2, 4).reshape(-1, channels * patch * patch)


def interpolate_positions(positions: Tensor, rows: int, cols: int) -> Tensor:
    """Resample a square table of position embeddings to another grid.

    ``positions`` is (G*G, D), or (1 + G*G, D) with the class token first, which is kept as it is. Returns
    (rows*cols, D) or (1 + rows*cols, D). Bilinear with antialiasing; the original table when the grid is unchanged.
    Raises ``ValueError`` when the table is neither square nor square plus one.
    """
    count, dim = positions.shape
    prefix = 0 if math.isqrt(count) ** 2 == count else 1
    side = math.isqrt(count - prefix)
    if side * side != count - prefix:
        raise ValueError(f"found {count} position embeddings, expected G*G or 1 + G*G of them")
    if (rows, cols) == (side, side):
        return positions
    table = positions[prefix:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
    resized = F.interpolate(table.float(), (rows, cols), mode="bilinear", align_corners=False, antialias=True)
    return torch.cat([positions[:prefix], resized[0].flatten(1).T.to(positions.dtype)])


def vit_features(visual: Any, patches: Tensor, grids: Tensor, num_layers: int) -> VitFeatures:
    """Run the first ``num_layers`` blocks of an ``open_clip`` ``VisionTransformer`` over pictures of different grids.

    ``patches`` is (N, S, 3*p*p) float, the normalised output of :func:`patchify` padded to the longest picture (the
    content of the padding is ignored); ``grids`` is (N, 2) integer, rows and cols of each picture. Later blocks are
    never computed, ``ln_post`` and the projection are not applied. Tokens on padding are zero.
    Raises ``ValueError`` when a grid does not fit the padding or ``num_layers`` does not exist.
    """
    blocks = visual.transformer.resblocks
    if not 1 <= num_layers <= len(blocks):
        raise ValueError(f"found num_layers={num_layers}, expected 1 to {len(blocks)}, the blocks of this model")
    count, length = patches.shape[:2]
    sizes = grids.prod(dim=1)
    if int(sizes.max()) > length:
        raise ValueError(f"found a grid of {int(sizes.max())} patches, but the batch holds only {length} per picture")
    mask = torch.arange(length, device=patches.device)[None] < sizes[:, None].to(patches.device)  # (N, S)

    embedded = F.linear(patches, visual.conv1.weight.flatten(1))  # the stride-p convolution as one product: (N, S, D)
    embedded = embedded.masked_fill(~mask[..., None], 0)
    class_token = visual.class_embedding.to(embedded.dtype).expand(count, 1, -1)
    x = torch.cat([class_token, embedded], dim=1)  # (N, 1 + S, D)
    x = x + _position_table(visual.positional_embedding, grids, length).to(x.dtype)
    x = visual.ln_pre(x)

    bias = None if bool(mask.all()) else _attention_bias(mask, blocks[0].attn.num_heads, x.dtype)
    for block in blocks[:num_layers]:
        x = block(x, attn_mask=bias)
    return VitFeatures(x[:, 1:].masked_fill(~mask[..., None], 0), mask, x[:, 0])


def _position_table(positions: Tensor, grids: Tensor, length: int) -> Tensor:
    """(1 + G*G, D) and grids (N, 2) -> (N, 1 + length, D); one interpolation per distinct grid, not per picture."""
    distinct, which = torch.unique(grids.cpu(), dim=0, return_inverse=True)
    tables = [interpolate_positions(positions, rows, cols) for rows, cols in distinct.tolist()]
    padded = torch.stack([F.pad(table, (0, 0, 0, 1 + length - len(table))) for table in tables])
    return padded[which.to(positions.device)]


def _attention_bias(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(N, S) patches -> (N*heads, 1 + S, 1 + S) additive bias that hides padding keys; the class token is visible."""
    visible = F.pad(mask, (1, 0), value=True)
    count, length = visible.shape
    bias = torch.zeros(count, length, dtype=dtype, device=mask.device).masked_fill(~visible, -math.inf)
    return bias[:, None, None].expand(count, heads, length, length).reshape(count * heads, length, length)
