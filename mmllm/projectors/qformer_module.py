"""BLIP-2's Q-Former, transformers' own module underneath."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmllm.config.base import BuildContext
from mmllm.errors import CheckpointError
from mmllm.pretrained import find, load_into, read_json, read_tensors, tensor_names, weight_files
from mmllm.projectors.base import Projector
from mmllm.projectors.qformer import QFormerConfig

EMBEDDING_STD = 0.02  # of a language model's embedding table; transformers' default `initializer_range`


class QFormerProjector(Projector):
    """``(N, S, input_dim)`` to ``(N, num_queries, output_dim)``.

    Scale at random initialisation: the last layer reads LayerNorm's unit variance through weights of standard deviation
    0.02 / sqrt(hidden_dim), so outputs have the standard deviation of language models' embeddings, 0.02. Queries start
    at normal values: equal ones would get equal gradients for ever.
    """

    def __init__(self, config: QFormerConfig, input_dim: int, output_dim: int) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        super().__init__()
        self.norm = nn.LayerNorm(input_dim, eps=1e-6) if config.norm else nn.Identity()
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.hidden_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=config.ff_mult * config.hidden_dim,
                cross_attention_frequency=config.cross_attention_every,
                encoder_hidden_size=input_dim,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
            )
        )
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_dim))
        self.language_projection = nn.Linear(config.hidden_dim, output_dim)
        nn.init.normal_(self.query_tokens, std=0.02)
        nn.init.normal_(self.language_projection.weight, std=EMBEDDING_STD * config.hidden_dim**-0.5)
        nn.init.zeros_(self.language_projection.bias)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.query_tokens.expand(len(features), -1, -1)
        read = self.qformer(
            query_embeds=queries, encoder_hidden_states=self.norm(features), encoder_attention_mask=mask.long()
        ).last_hidden_state
        return self.language_projection(read), torch.ones(read.shape[:2], dtype=torch.bool, device=read.device)


def make_projector(config: QFormerConfig, context: BuildContext, input_dim: int, output_dim: int) -> QFormerProjector:
    """See ``QFormerConfig.build``."""
    projector = QFormerProjector(config, input_dim, output_dim)
    if config.pretrained is not None and context.weights:
        _load_blip2(projector, config, context.resolve(config.pretrained))
    return projector.to(context.dtype)


def _load_blip2(projector: QFormerProjector, config: QFormerConfig, reference: str) -> None:
    path = find(reference, config.revision, ["config.json"])
    content = read_json(path) if path is not None else {}
    numbers = content.get("qformer_config")
    if not isinstance(numbers, dict):
        raise CheckpointError(f"found no `qformer_config` in {reference}/config.json, expected a BLIP-2 checkpoint")
    expected = {
        "num_query_tokens": (content.get("num_query_tokens", 32), config.num_queries),
        "num_hidden_layers": (numbers.get("num_hidden_layers", 12), config.num_layers),
        "num_attention_heads": (numbers.get("num_attention_heads", 12), config.num_heads),
        "hidden_size": (numbers.get("hidden_size", 768), config.hidden_dim),
        "intermediate_size": (numbers.get("intermediate_size", 3072), config.ff_mult * config.hidden_dim),
        "cross_attention_frequency": (numbers.get("cross_attention_frequency", 2), config.cross_attention_every),
    }
    wrong = [f"{name} {there}, the YAML makes it {here}" for name, (there, here) in expected.items() if there != here]
    if wrong:
        raise CheckpointError(f"{reference} has {'; '.join(wrong)}; set the YAML to the checkpoint's numbers")

    files = weight_files(reference, config.revision, ["model.safetensors"])
    ending = "query_tokens"
    prefix = next((name.removesuffix(ending) for name in tensor_names(files) if name.endswith(ending)), None)
    if prefix is None:
        raise CheckpointError(f"{reference} holds no query_tokens, expected a BLIP-2 checkpoint")
    wanted = {"qformer.": "qformer.", "query_tokens": "query_tokens"}
    wanted |= {"language_projection.": "language_projection.", "vision_model.post_layernorm.": "norm."}
    tensors = {}
    for name, value in read_tensors(files, [prefix + start for start in wanted]).items():
        start = next(start for start in wanted if name.startswith(prefix + start))
        tensors[wanted[start] + name.removeprefix(prefix + start)] = value
    fresh = projector.language_projection.state_dict(prefix="language_projection.")
    weight = tensors.get("language_projection.weight")
    if weight is None or weight.shape != fresh["language_projection.weight"].shape:
        tensors |= fresh  # made for a language model of another width
    load_into(projector, tensors, reference)
