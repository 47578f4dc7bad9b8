"""Flamingo's Perceiver resampler."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.errors import ConfigError
from mmllm.projectors.base import Projector

EMBEDDING_STD = 0.02  # of a language model's embedding table; transformers' default `initializer_range`


class ResamplerLayer(nn.Module):
    """``x += Attention(q = x, kv = [features, x])``, then ``x += FeedForward(x)``, each on normalised inputs."""

    def __init__(self, dim: int, num_heads: int, ff_mult: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_features = nn.LayerNorm(dim)
        self.norm_queries = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.norm_ff = nn.LayerNorm(dim)
        self.ff_in = nn.Linear(dim, ff_mult * dim)
        self.ff_out = nn.Linear(ff_mult * dim, dim)

    def forward(self, x: Tensor, features: Tensor, visible: Tensor) -> Tensor:
        """``x`` (N, Q, C), ``features`` (N, S, C), ``visible`` (N, 1, 1, S + Q) bool; returns (N, Q, C)."""
        queries = self.norm_queries(x)
        keys, values = self.to_kv(torch.cat([self.norm_features(features), queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (self.to_q(queries), keys, values))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)  # (N, heads, Q, C / heads)
        x = x + self.to_out(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.ff_out(F.gelu(self.ff_in(self.norm_ff(x))))
        return out


class PerceiverResampler(Projector):
    """``(N, S, input_dim)`` to ``(N, num_queries, output_dim)``; features hidden by the mask get no attention.

    Scale at random initialisation: weights are normal with variance 1 / fan-in, divided by ``2 * depth`` where a branch
    joins the residual stream (the rule of GPT-2), and queries are standard normal, so the stream keeps unit scale. The
    last layer reads LayerNorm's unit variance through weights of standard deviation 0.02 / sqrt(hidden_dim): outputs
    have the standard deviation of language models' embeddings, 0.02.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *,
        num_queries: int,
        depth: int,
        num_heads: int,
        hidden_dim: int,
        ff_mult: int,
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            problem = f"found {num_heads}, expected a divisor of the width {hidden_dim}; or set `hidden_dim`"
            raise ConfigError([("num_heads", problem)], "cross_attention projector")
        self.to_hidden = nn.Identity() if hidden_dim == input_dim else nn.Linear(input_dim, hidden_dim)
        self.queries = nn.Parameter(torch.empty(num_queries, hidden_dim))
        self.layers = nn.ModuleList(ResamplerLayer(hidden_dim, num_heads, ff_mult) for _ in range(depth))
        self.norm_out = nn.LayerNorm(hidden_dim)
        self.to_embeddings = nn.Linear(hidden_dim, output_dim)
        self._initialise(depth)

    def _initialise(self, depth: int) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                joins = name.endswith(("to_out", "ff_out"))
                nn.init.normal_(module.weight, std=(module.in_features * (2 * depth if joins else 1)) ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.queries)
        nn.init.normal_(self.to_embeddings.weight, std=EMBEDDING_STD * self.to_embeddings.in_features**-0.5)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        features = self.to_hidden(features)
        x = self.queries.expand(len(features), -1, -1)
        shown = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        visible = torch.cat([mask, shown], dim=1)[:, None, None]
        for layer in self.layers:
            x = layer(x, features, visible)
        return self.to_embeddings(self.norm_out(x)), shown
