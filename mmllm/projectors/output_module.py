"""The modules of the output projectors. A condition is a dict of streams, ``{name: (N, L, D)}``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.config.families import Shape


class OutputProjector(nn.Module):
    """Maps signals ``(N, K, D_llm)`` (last hidden state plus input embedding) to a generator's condition."""

    @abstractmethod
    def forward(self, signals: Tensor) -> dict[str, Tensor]:
        """``{stream: (N, L, D)}`` with the streams and shapes that the projector was built for."""


class MLPOutput(OutputProjector):
    """Every signal token alone: a trunk of ``depth - 1`` layers, then one linear head per stream.

    The head of a stream of L positions gives ``ceil(L / K)`` of them per token; what exceeds L is dropped.
    """

    def __init__(
        self, input_dim: int, num_signals: int, condition_shape: Mapping[str, Shape], *, depth: int, hidden_dim: int
    ) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (depth - 1)]
        trunk: list[nn.Module] = []
        for before, after in pairwise(widths):
            trunk += [nn.Linear(before, after), nn.GELU()]
        self.trunk = nn.Sequential(*trunk)
        self.shapes = dict(condition_shape)
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(widths[-1], -(-length // num_signals) * dim)
                for name, (length, dim) in self.shapes.items()
            }
        )

    def forward(self, signals: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(signals)
        return {
            name: self.heads[name](hidden).reshape(len(signals), -1, dim)[:, :length]
            for name, (length, dim) in self.shapes.items()
        }


class QueryOutput(OutputProjector):
    """Base of the projectors with trained queries: one query per position of every stream, and a head per stream."""

    def __init__(self, hidden_dim: int, condition_shape: Mapping[str, Shape]) -> None:
        super().__init__()
        self.lengths = {name: length for name, (length, _) in condition_shape.items()}
        self.queries = nn.Parameter(torch.randn(1, sum(self.lengths.values()), hidden_dim))
        self.heads = nn.ModuleDict({name: nn.Linear(hidden_dim, dim) for name, (_, dim) in condition_shape.items()})

    @abstractmethod
    def read(self, signals: Tensor, queries: Tensor) -> Tensor:
        """What the ``queries (N, L, hidden_dim)`` find in ``signals (N, K, D_llm)``: ``(N, L, hidden_dim)``."""

    def forward(self, signals: Tensor) -> dict[str, Tensor]:
        read = self.read(signals, self.queries.expand(len(signals), -1, -1))
        pieces = torch.split(read, list(self.lengths.values()), dim=1)
        return {name: self.heads[name](piece) for name, piece in zip(self.lengths, pieces, strict=True)}


class TinyTransformer(QueryOutput):
    """GILL's mapper: a linear layer, torch's own pre-norm encoder-decoder transformer, a linear layer."""

    def __init__(
        self,
        input_dim: int,
        condition_shape: Mapping[str, Shape],
        *,
        num_layers: int = 4,
        hidden_dim: int = 512,
        num_heads: int = 4,
        ff_mult: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(hidden_dim, condition_shape)
        self.fc = nn.Linear(input_dim, hidden_dim)
        numbers: dict[str, Any] = {
            "d_model": hidden_dim,
            "nhead": num_heads,
            "dim_feedforward": ff_mult * hidden_dim,
            "dropout": dropout,
            "norm_first": True,
            "batch_first": True,
        }
        # torch makes the same encoder, but warns that nested tensors do not go with pre-norm.
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**numbers), num_layers, nn.LayerNorm(hidden_dim), enable_nested_tensor=False
        )
        self.transformer = nn.Transformer(custom_encoder=encoder, num_decoder_layers=num_layers, **numbers)

    def read(self, signals: Tensor, queries: Tensor) -> Tensor:
        found: Tensor = self.transformer(self.fc(signals), queries)
        return found


class QFormerOutput(QueryOutput):
    """transformers' BLIP-2 Q-Former between the queries and the signals."""

    def __init__(
        self,
        input_dim: int,
        condition_shape: Mapping[str, Shape],
        *,
        num_layers: int,
        hidden_dim: int,
        num_heads: int,
        ff_mult: int,
        cross_attention_every: int,
        dropout: float,
    ) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        super().__init__(hidden_dim, condition_shape)
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=hidden_dim,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                intermediate_size=ff_mult * hidden_dim,
                cross_attention_frequency=cross_attention_every,
                encoder_hidden_size=input_dim,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
        )

    def read(self, signals: Tensor, queries: Tensor) -> Tensor:
        found: Tensor = self.qformer(query_embeds=queries, encoder_hidden_states=signals).last_hidden_state
        return found
