"""NExT-GPT's group projector, with the parameter names of its code.

``in_fc``; for each stage i ``layers.i.group_token``, ``layers.i.group_projector.{0,1}`` (from the second stage on),
``layers.i.blocks.j.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}`` and ``layers.i.downsample.{norm_tokens,mlp_inter,
norm_post_tokens,norm_x,pre_assign_attn,assign,norm_new_x,mlp_channels}``; ``norm`` and ``out_fc``. Unlike there, features
may be of different numbers: padding is seen by nothing.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.projectors.base import Projector
from mmllm.projectors.group import GroupConfig

ASSIGNED_BEFORE = 1.0  # a group's features are summed and divided by their number plus this (GroupViT's `assign_eps`)


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))``."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(input_dim, hidden_dim), nn.Linear(hidden_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class MixerMlp(Mlp):
    """The same over tokens: ``(N, S, C)`` to ``(N, S', C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, visible: Tensor) -> Tensor:
    """Attention of ``(N, Q, C)`` to ``(N, S, C)``; ``visible (N, S)`` bool."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    read = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None])
    return read.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        query, key, value = self.qkv(x).split(x.shape[2], dim=2)
        out: Tensor = self.proj(attend(query, key, value, self.heads, visible))
        return out


class CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
        out: Tensor = self.proj(attend(self.q_proj(query), self.k_proj(key), self.v_proj(key), self.heads, visible))
        return out


class Block(nn.Module):
    """A transformer block with its norms in front."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), SelfAttention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4 * dim, dim)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), visible)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class CrossBlock(nn.Module):
    """Groups read features; the norm stands behind."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_post, self.attn = nn.LayerNorm(dim), CrossAttention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4 * dim, dim)

    def forward(self, query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
        x = query + self.attn(query, key, visible)
        out: Tensor = self.norm_post(x + self.mlp(self.norm2(x)))
        return out


class Assignment(nn.Module):
    """Every feature goes to one group; a group is the mean of its values, with ``ASSIGNED_BEFORE``.

    One-hot forward, softmax backward; in training with Gumbel noise.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, groups: Tensor, features: Tensor, visible: Tensor) -> Tensor:
        """``groups (N, G, C)``, ``features (N, S, C)``, ``visible (N, S)``; returns (N, G, C)."""
        logits = self.q_proj(groups) @ self.k_proj(features).transpose(1, 2) * groups.shape[2] ** -0.5  # (N, G, S)
        if self.training:
            chosen = F.gumbel_softmax(logits, hard=True, dim=1)
        else:
            soft = logits.softmax(dim=1)
            hard = torch.zeros_like(soft).scatter(1, soft.argmax(dim=1, keepdim=True), 1.0)
            chosen = hard - soft.detach() + soft
        chosen = chosen.masked_fill(~visible[:, None], 0)
        weights = chosen / (chosen.sum(dim=2, keepdim=True) + ASSIGNED_BEFORE)
        out: Tensor = self.proj(weights @ self.v_proj(features))
        return out


class Grouping(nn.Module):
    """GroupViT's grouping block: ``tokens`` group tokens become ``groups``, which take up the features."""

    def __init__(self, dim: int, heads: int, tokens: int, groups: int) -> None:
        super().__init__()
        self.norm_tokens, self.mlp_inter = nn.LayerNorm(dim), MixerMlp(tokens, dim // 2, groups)
        self.norm_post_tokens, self.norm_x = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.pre_assign_attn, self.assign = CrossBlock(dim, heads), Assignment(dim)
        self.norm_new_x, self.mlp_channels = nn.LayerNorm(dim), Mlp(dim, 4 * dim, dim)

    def forward(self, x: Tensor, visible: Tensor, tokens: Tensor) -> Tensor:
        """``x (N, S, C)`` and group tokens ``(N, T, C)`` to ``(N, G, C)``."""
        x = self.norm_x(x)
        groups = self.norm_post_tokens(self.mlp_inter(self.norm_tokens(tokens)))
        groups = self.pre_assign_attn(groups, x, visible)
        grouped = groups + self.assign(groups, x, visible)
        out: Tensor = grouped + self.mlp_channels(self.norm_new_x(grouped))
        return out


class Stage(nn.Module):
    """Blocks over features and group tokens, and the grouping behind them; the last stage has neither tokens nor grouping."""

    def __init__(self, dim: int, heads: int, depth: int, before: int | None, tokens: int | None, groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        if tokens is None:
            self.group_token = self.downsample = self.group_projector = None
            return
        self.group_token = nn.Parameter(torch.zeros(1, tokens, dim))
        if before is None:
            nn.init.trunc_normal_(self.group_token, std=0.02)
        # Those of the stage before come in, so the own ones may start at zero.
        self.group_projector = (
            None if before is None else nn.Sequential(nn.LayerNorm(dim), MixerMlp(before, dim // 2, tokens))
        )
        self.downsample = Grouping(dim, heads, tokens, groups)

    def forward(self, x: Tensor, visible: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features, which of them are real, and group tokens, all of the next stage."""
        if self.group_token is None or self.downsample is None:
            for block in self.blocks:
                x = block(x, visible)
            return x, visible, None
        tokens = self.group_token.expand(len(x), -1, -1)
        if self.group_projector is not None:
            tokens = tokens + self.group_projector(before)
        count = tokens.shape[1]
        x, seen = torch.cat([x, tokens], dim=1), F.pad(visible, (0, count), value=True)
        for block in self.blocks:
            x = block(x, seen)
        x, tokens = x[:, :-count], x[:, -count:]
        x = self.downsample(x, visible, tokens)
        return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), tokens


class GroupProjector(Projector):
    """``(N, S, input_dim)`` to ``(N, num_output_groups[-1], output_dim)``."""

    def __init__(self, config: GroupConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        dim, heads = config.hidden_dim, config.num_heads
        self.in_fc = nn.Linear(input_dim, dim)
        stages = itertools.zip_longest(config.depths, config.num_group_tokens, config.num_output_groups)
        before = [None, *config.num_group_tokens]
        self.layers = nn.ModuleList(
            Stage(dim, heads, depth, last, tokens, groups)
            for (depth, tokens, groups), last in zip(stages, before, strict=True)
        )
        self.norm, self.out_fc = nn.LayerNorm(dim), nn.Linear(dim, output_dim)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, tokens = self.in_fc(features), None
        for stage in self.layers:
            x, mask, tokens = stage(x, mask, tokens)
        return self.out_fc(self.norm(x)), mask
