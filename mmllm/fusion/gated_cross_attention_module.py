"""The gated cross-attention layers of Flamingo, in the variants of OpenFlamingo and IDEFICS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.fusion.base import Fusion, Seen

if TYPE_CHECKING:
    from mmllm.fusion.gated_cross_attention import GatedCrossAttentionConfig


class GatedLayer(nn.Module):
    """``x += tanh(attention_gate) * Attention(q = norm(x), kv = media)``, then ``x += tanh(feedforward_gate) * FF(norm(x))``.

    No projection has a bias (arXiv 2204.14198, appendix A.1.2).
    """

    def __init__(self, config: GatedCrossAttentionConfig, dim: int, media_dim: int) -> None:
        super().__init__()
        inner, wide = config.num_heads * config.head_dim, config.feedforward_dim or 4 * dim
        self.head_dim = config.head_dim

        def norm(size: int) -> nn.Module:
            return nn.LayerNorm(size) if config.norm == "layer" else nn.RMSNorm(size, eps=1e-6)

        self.norm_attention, self.norm_feedforward = norm(dim), norm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k, self.to_v = (nn.Linear(media_dim, inner, bias=False) for _ in range(2))
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.norm_q = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.ff_gate = nn.Linear(dim, wide, bias=False) if config.feedforward == "swiglu" else None
        self.ff_in, self.ff_out = nn.Linear(dim, wide, bias=False), nn.Linear(wide, dim, bias=False)
        gates = 1 if config.gates == "scalar" else dim
        self.attention_gate, self.feedforward_gate = (nn.Parameter(torch.zeros(gates)) for _ in range(2))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def keys_and_values(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """``media (N, Q, D_m)`` as keys and values, ``(N, Q, heads * head_dim)`` each."""
        media = media.to(self.to_k.weight.dtype)
        keys = self.norm_k(self.to_k(media).unflatten(-1, (-1, self.head_dim))).flatten(-2)
        return keys, self.to_v(media)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, visible: Tensor, some: Tensor) -> Tensor:
        """``x (B, L, D)`` after the attention; ``keys`` and ``values (B, S, heads * head_dim)``; ``visible (B, L, S)`` and
        ``some (B, L)`` bool.
        """
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for t in (self.to_q(self.norm_attention(x)), keys, values)
        )
        q = self.norm_q(q).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k.to(v.dtype), v, attn_mask=visible[:, None])
        found = self.to_out(attended.transpose(1, 2).flatten(2)).masked_fill(~some[..., None], 0.0)
        out: Tensor = x + self.attention_gate.tanh() * found
        return out

    def think(self, x: Tensor) -> Tensor:
        """``x (B, L, D)`` after the feed-forward, which all tokens go through, also without media before them."""
        inner = self.norm_feedforward(x)
        wide = F.gelu(self.ff_in(inner)) if self.ff_gate is None else F.silu(self.ff_gate(inner)) * self.ff_in(inner)
        out: Tensor = x + self.feedforward_gate.tanh() * self.ff_out(wide)
        return out


class GatedCrossAttention(Fusion):
    """``blocks[i]`` is the layer before the backbone's block ``at[i]``."""

    def __init__(self, config: GatedCrossAttentionConfig, at: Sequence[int], dim: int, media_dim: int) -> None:
        super().__init__()
        self.at = at
        self.blocks = nn.ModuleList(GatedLayer(config, dim, media_dim) for _ in at)

    def fuse(self, index: int, hidden: Tensor, seen: Seen | None) -> Tensor:
        layer = cast(GatedLayer, self.blocks[index])
        x = hidden.to(layer.attention_gate.dtype)
        if seen is not None:
            if index in seen.kept:
                keys, values = seen.kept[index]
            else:
                keys, values = (seen.by_rows(made) for made in layer.keys_and_values(seen.media))
                if not torch.is_grad_enabled():
                    seen.kept[index] = keys, values
            x = layer.attend(x, keys, values, *seen.masks(hidden.shape[1]))
        return layer.think(x).to(hidden.dtype)
