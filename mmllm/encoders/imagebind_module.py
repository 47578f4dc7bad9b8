"""ImageBind's trunks, written so that the published checkpoint's tensors fit (facebookresearch/ImageBind, `imagebind/models`).

Every trunk is a pre-norm transformer over patches with a class token; text is CLIP's causal transformer, read at the end
token. All but vision and text have one trained extra key and value per layer (``bias_k``, ``bias_v``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.encoders.base import Encoder
from mmllm.encoders.imagebind import ImageBindArchitecture, ImageBindConfig, Trunk
from mmllm.errors import CheckpointError
from mmllm.pretrained import load_into, read_tensors, tensor_names, weight_files

EPS = 1e-6  # of the trunks' and heads' norms; those of the patches have torch's 1e-5
VIEWS_PER_CALL = 32  # bounds the memory of long batches: a film is 15 views


class Patches(nn.Module):
    """Patches of what a trunk reads, a class token before them, trained positions on all: ``(M, …) -> (M, L, D)``."""

    def __init__(self, numbers: ImageBindArchitecture, project: nn.Module, count: int, norm: bool) -> None:
        super().__init__()
        self.project = project
        self.norm = nn.LayerNorm(numbers.width) if norm else nn.Identity()
        self.class_token = nn.Parameter(torch.randn(1, 1, numbers.width) * numbers.width**-0.5)
        self.positions = nn.Parameter(torch.randn(1, 1 + count, numbers.width) * numbers.width**-0.5)

    def cut(self, views: Tensor) -> Tensor:
        """``(M, L - 1, D)`` projected patches, row by row."""
        found: Tensor = self.project(views)
        return found.flatten(2).transpose(1, 2)

    def forward(self, views: Tensor) -> Tensor:
        patches = self.norm(self.cut(views))
        return torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1) + self.positions

    def last(self, views: Tensor) -> Tensor:
        """The token that stands for the whole, ``(M,)``: the class token."""
        return torch.zeros(len(views), dtype=torch.int64, device=views.device)


class FramePatches(Patches):
    """Two frames ``(M, 3, 2, H, W)``: every token is a square of both; a picture is two equal frames."""

    def __init__(self, numbers: ImageBindArchitecture) -> None:
        kernel, stride = (2, numbers.patch, numbers.patch), (2, numbers.stride, numbers.stride)
        project = nn.Conv3d(3, numbers.width, kernel, stride, bias=False)
        super().__init__(numbers, project, numbers.steps(0) * numbers.steps(1), norm=False)


class MapPatches(Patches):
    """One channel ``(M, 1, H, W)``: spectrograms, depth, heat."""

    def __init__(self, numbers: ImageBindArchitecture) -> None:
        project = nn.Conv2d(1, numbers.width, numbers.patch, numbers.stride, bias=False)
        super().__init__(numbers, project, numbers.steps(0) * numbers.steps(1), norm=True)


class MotionPatches(Patches):
    """Channels over time ``(M, C, T)``: a token is ``patch`` samples of all channels."""

    def __init__(self, numbers: ImageBindArchitecture) -> None:
        project = nn.Linear(numbers.size[0] * numbers.patch, numbers.width, bias=False)
        super().__init__(numbers, project, numbers.steps(1), norm=True)
        self.length, self.step = numbers.patch, numbers.stride

    def cut(self, views: Tensor) -> Tensor:
        pieces = views.unfold(-1, self.length, self.step)  # (M, C, L, patch)
        found: Tensor = self.project(pieces.transpose(1, 2).flatten(2))
        return found


class Words(nn.Module):
    """Token ids ``(M, L)`` with trained positions. The end token has the highest id and stands for the whole."""

    def __init__(self, numbers: ImageBindArchitecture) -> None:
        super().__init__()
        self.table = nn.Embedding(numbers.size[0], numbers.width)
        self.positions = nn.Parameter(torch.randn(1, numbers.size[1], numbers.width) * 0.01)

    def forward(self, views: Tensor) -> Tensor:
        found: Tensor = self.table(views) + self.positions
        return found

    def last(self, views: Tensor) -> Tensor:
        return views.argmax(dim=-1)


class Block(nn.Module):
    """Attention and MLP, each behind a norm: ``(M, L, D) -> (M, L, D)``."""

    def __init__(self, numbers: ImageBindArchitecture, extra_key: bool) -> None:
        super().__init__()
        width = numbers.width
        self.norm_1, self.norm_2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.attention = nn.MultiheadAttention(width, numbers.heads, add_bias_kv=extra_key, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm_1(x)
        x = x + self.attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        found: Tensor = x + self.mlp(self.norm_2(x))
        return found


@dataclass(frozen=True)
class Kind:
    """What tells one trunk from another. ``stem`` and ``head`` say where the checkpoint keeps these parts."""

    tokens: Callable[[ImageBindArchitecture], Patches | Words]
    stem: str
    head: tuple[str, str] = ("0", "2")
    pre_norm: bool = False
    extra_key: bool = True
    causal: bool = False


KINDS: dict[Trunk, Kind] = {
    "vision": Kind(FramePatches, "rgbt_stem", pre_norm=True, extra_key=False),
    "audio": Kind(MapPatches, "rgbt_stem"),
    "text": Kind(Words, "", head=("proj.0", "proj.1"), extra_key=False, causal=True),
    "depth": Kind(MapPatches, "depth_stem"),
    "thermal": Kind(MapPatches, "rgbt_stem"),
    "imu": Kind(MotionPatches, "imu_stem", head=("0", "3")),
}


class ImageBindEncoder(Encoder):
    """One trunk, and with ``pooled`` its head into the common embedding."""

    def __init__(self, trunk: Trunk, numbers: ImageBindArchitecture, pooled: bool, clips: int = 1) -> None:
        """``pooled`` gives embeddings, ``clips`` of each medium, and no tokens."""
        super().__init__()
        kind = KINDS[trunk]
        self.trunk, self.pooled, self.clips, self.causal = trunk, pooled, clips, kind.causal
        self.tokens = kind.tokens(numbers)
        self.pre_norm = nn.LayerNorm(numbers.width, EPS) if kind.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(numbers, kind.extra_key) for _ in range(numbers.layers))
        self.output_dim = numbers.output_dim if pooled else numbers.width
        if pooled:
            self.norm = nn.LayerNorm(numbers.width, EPS)
            self.head = nn.Linear(numbers.width, numbers.output_dim, bias=False)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``views (N, M, …)`` and ``length (N,)`` from the preprocessor.

        Pooled: the mean over the M views, or those of each stretch, of their embeddings of unit length,
        ``(N, clips, output_dim)``. The checkpoint's factors behind it (``log_logit_scale``) are temperatures of its
        contrastive loss and are left out, as in NExT-GPT.
        Tokens: ``(N, M * L, width)``, view after view.
        """
        views = batch["views"]
        count, each = views.shape[:2]
        parts = [self._read(part) for part in torch.split(views.flatten(0, 1), VIEWS_PER_CALL)]
        flat = torch.cat(parts)
        found = flat.view(count, each, *flat.shape[1:])
        if self.pooled:
            embeddings = found.view(count, self.clips, -1, self.output_dim).mean(dim=2)
            return embeddings, torch.ones(count, self.clips, dtype=torch.bool, device=views.device)
        found = found.flatten(1, 2)
        mask = torch.arange(found.shape[1], device=views.device)[None] < batch["length"][:, None]
        return found.masked_fill(~mask[..., None], 0), mask

    def _read(self, views: Tensor) -> Tensor:
        if views.is_floating_point():
            views = views.to(self.blocks[0].norm_1.weight.dtype)  # type: ignore[union-attr, arg-type]
        x: Tensor = self.pre_norm(self.tokens(views))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype) if self.causal else None
        for block in self.blocks:
            x = block(x, mask)
        if not self.pooled:
            return x
        rows = torch.arange(len(x), device=x.device)
        return F.normalize(self.head(self.norm(x[rows, self.tokens.last(views)])), dim=-1)


def published_name(trunk: Trunk, own: str) -> str:
    """The published checkpoint's name of this module's tensor ``own``.

    What of a checkpoint has no counterpart: ``modality_postprocessors.*`` (temperatures) and the text trunk's causal mask.
    """
    kind, before = KINDS[trunk], f"modality_preprocessors.{trunk}"
    head = f"modality_heads.{trunk}"
    table = f"{before}.pos_embed" if trunk in ("text", "imu") else f"{before}.pos_embedding_helper.pos_embed"
    beginnings = {
        "tokens.project.": f"{before}.{kind.stem}.proj.{'1.' if trunk == 'vision' else ''}",
        "tokens.norm.": f"{before}.{kind.stem}.norm_layer.",
        "tokens.class_token": f"{before}.cls_token",
        "tokens.positions": table,
        "tokens.table.": f"{before}.token_embedding.",
        "pre_norm.": f"modality_trunks.{trunk}.pre_transformer_layer.0.",
        "blocks.": f"modality_trunks.{trunk}.blocks.",
        "norm.": f"{head}.{kind.head[0]}.",
        "head.": f"{head}.{kind.head[1]}.",
    }
    start = next(start for start in beginnings if own.startswith(start))
    rest = own.removeprefix(start).replace(".attention.", ".attn.").replace(".mlp.0.", ".mlp.fc1.")
    return beginnings[start] + rest.replace(".mlp.2.", ".mlp.fc2.")


def make_encoder(config: ImageBindConfig, context: BuildContext) -> ImageBindEncoder:
    """See ``ImageBindConfig.build``."""
    clips = config.stretches if config.output == "clips" else 1
    encoder = ImageBindEncoder(config.trunk, config.numbers, config.output != "tokens", clips)
    if config.pretrained is not None and context.weights:
        reference = context.resolve(config.pretrained)
        files = weight_files(reference, config.revision, ["model.safetensors", "imagebind_huge.safetensors"])
        _check_depth(config, tensor_names(files), reference)
        names = {own: published_name(config.trunk, own) for own in encoder.state_dict()}
        tensors = read_tensors(files, sorted(names.values()))
        load_into(encoder, {own: tensors[name] for own, name in names.items() if name in tensors}, reference)
    return encoder.to(context.dtype).train(False)


def _check_depth(config: ImageBindConfig, names: Sequence[str], source: str) -> None:
    start = f"modality_trunks.{config.trunk}.blocks."
    found = len({name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)})
    if not found:
        raise CheckpointError(
            f"{source} has no {config.trunk} trunk; expected tensors named as in imagebind_huge.pth, such as "
            f"{start}0.attn.in_proj_weight"
        )
    if found != config.numbers.layers:
        raise CheckpointError(
            f"{source} has {found} blocks in its {config.trunk} trunk, expected {config.numbers.layers}; give "
            "`architecture`"
        )
