"""BLIP-2's Q-Former, transformers' own module underneath."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.config.base import BuildContext
from mmllm.errors import CheckpointError
from mmllm.pretrained import find, load_into, read_json, read_tensors, tensor_names, weight_files
from mmllm.projectors.base import LayoutProjector, Projector
from mmllm.projectors.qformer import MQFormerConfig, QFormerConfig, QueryingConfig

EMBEDDING_STD = 0.02  # of a language model's embedding table; transformers' default `initializer_range`


def bare_qformer(config: QueryingConfig, feature_dim: int) -> Any:
    """transformers' Q-Former for features of ``feature_dim``, at random values."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    numbers = Blip2QFormerConfig(
        hidden_size=config.hidden_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.ff_mult * config.hidden_dim,
        cross_attention_frequency=config.cross_attention_every,
        encoder_hidden_size=feature_dim,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
    )
    return Blip2QFormerModel(numbers)


def start_at_embeddings(last: nn.Linear) -> None:
    """A last layer whose outputs are of embeddings' scale, see ``QFormerProjector``."""
    nn.init.normal_(last.weight, std=EMBEDDING_STD * last.in_features**-0.5)
    nn.init.zeros_(last.bias)


class QFormerProjector(Projector):
    """``(N, S, input_dim)`` to ``(N, num_queries, output_dim)``, or with windows to as many for each.

    Scale at random initialisation: the last layer reads LayerNorm's unit variance through weights of standard deviation
    0.02 / sqrt(hidden_dim), so outputs have the standard deviation of language models' embeddings, 0.02. Queries start
    at normal values: equal ones would get equal gradients for ever.
    """

    def __init__(self, config: QFormerConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(input_dim, eps=1e-6) if config.norm else nn.Identity()
        self.qformer = bare_qformer(config, input_dim)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_dim))
        self.language_projection = nn.Linear(config.hidden_dim, output_dim)
        nn.init.normal_(self.query_tokens, std=0.02)
        self.extra_query_tokens: nn.Parameter | None = None
        if config.extra_queries:
            self.extra_query_tokens = nn.Parameter(0.02 * torch.randn(1, config.extra_queries, config.hidden_dim))
        start_at_embeddings(self.language_projection)
        self.window, self.stride = config.window, config.stride or config.window

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.window is None or self.stride is None:
            read = self.read(features, mask)
            return self.language_projection(read), torch.ones(read.shape[:2], dtype=torch.bool, device=read.device)
        pieces, seen, real = windows(features, mask, self.window, self.stride)
        read = self.language_projection(self.read(pieces[real], seen[real]))  # one row for each window of each item
        outputs = read.new_zeros(*real.shape, *read.shape[1:]).index_put(real.nonzero(as_tuple=True), read)
        return outputs.flatten(1, 2), real.repeat_interleave(read.shape[1], dim=1)

    def queries(self) -> Tensor:
        """All queries ``(1, Q, hidden_dim)``."""
        if self.extra_query_tokens is None:
            return self.query_tokens
        return torch.cat([self.query_tokens, self.extra_query_tokens], dim=1)

    def read(self, features: Tensor, mask: Tensor) -> Tensor:
        """``(N, S, input_dim)`` to ``(N, queries, hidden_dim)``: what the queries have read, behind the last layer."""
        found: Tensor = self.qformer(
            query_embeds=self.queries().expand(len(features), -1, -1),
            encoder_hidden_states=self.norm(features),
            encoder_attention_mask=mask.long(),
        ).last_hidden_state
        return found

    def read_text(
        self,
        text: Tensor,
        text_blocks: Iterable[Callable[[Tensor], Tensor]],
        mask: Tensor,
        media: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The Q-Former's states ``(N, Q + L, hidden_dim)`` with text behind the queries, as BLIP-2's first stage needs them.

        ``text (N, L, hidden_dim)`` are embeddings; ``text_blocks`` are its feed-forward blocks, one for each layer. ``mask``, of a
        shape that expands to ``(N, Q + L, Q + L)``, tells which states each one (a row) attends to. ``media`` are features
        ``(N, S, input_dim)`` with their mask ``(N, S)``; without them there are no queries, and Q is 0.
        """
        count, parts, features, seen = 0, [text], None, None
        if media is not None:
            own = self.queries()
            count = own.shape[1]
            parts.insert(0, own.expand(len(text), -1, -1).to(text.dtype))
            features, seen = self.norm(media[0]), media[1][:, None, None]
        states: Tensor = self.qformer.dropout(self.qformer.layernorm(torch.cat(parts, dim=1)))
        for layer, text_block in zip(self.qformer.encoder.layer, text_blocks, strict=True):
            states = layer.attention(states, mask[:, None])
            queries, words = states[:, :count], text_block(states[:, count:])
            if media is None:
                states = words
                continue
            if layer.has_cross_attention:
                queries = layer.crossattention(queries, encoder_hidden_states=features, encoder_attention_mask=seen)
            states = torch.cat([layer.feed_forward_chunk_query(queries), words], dim=1)
        return states


def windows(features: Tensor, mask: Tensor, window: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stretches of ``window`` features, each ``stride`` after the one before: ``(N, W, window, D)``, their masks ``(N, W,
    window)``, and ``(N, W)``, true where an item has that window: the first, and those that begin before all its features
    have been in one.
    """
    count = 1 + max(0, -(-(features.shape[1] - window) // stride))
    missing = (count - 1) * stride + window - features.shape[1]
    pieces = nn.functional.pad(features, (0, 0, 0, missing)).unfold(1, window, stride).transpose(2, 3)
    seen = nn.functional.pad(mask, (0, missing)).unfold(1, window, stride)
    starts = stride * torch.arange(count, device=mask.device)
    return pieces, seen, (starts - stride + window < mask.sum(dim=1, keepdim=True)) | (starts == 0)


class MultiQueryProjector(LayoutProjector):
    """``(N, S, input_dim)`` of several encoders, one's features behind the other's, to ``(N, all queries, output_dim)``.

    ``layouts (N, P)`` are the numbers of features of each encoder; they must be given. Scale at random initialisation as in
    ``QFormerProjector``.
    """

    def __init__(self, config: MQFormerConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        width = config.hidden_dim
        self.to_width = nn.ModuleDict({name: nn.Linear(input_dim, width) for name in config.queries})
        self.qformer = bare_qformer(config, width)
        self.query_tokens = nn.Parameter(torch.empty(1, sum(config.queries.values()), width))
        self.language_projection = nn.Linear(width, output_dim)
        nn.init.normal_(self.query_tokens, std=0.02)
        start_at_embeddings(self.language_projection)
        self.counts = list(config.queries.values())

    def forward(self, features: Tensor, mask: Tensor, layouts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if layouts is None:
            raise ValueError("mq_former found features without their layout, expected how many each encoder has")
        places = torch.arange(mask.shape[1], device=mask.device)[None, :, None]
        # The encoder of each feature: how many encoders' features end at or before it.
        owner = (places >= layouts.cumsum(dim=1)[:, None]).sum(dim=2)  # (N, S)
        common = torch.stack([layer(features) for layer in self.to_width.values()])  # (P, N, S, width)
        chosen = owner.clamp(max=len(self.counts) - 1)[None, :, :, None].expand(1, -1, -1, common.shape[3])
        counts = torch.tensor(self.counts, device=mask.device)
        reader = torch.arange(len(counts), device=mask.device).repeat_interleave(counts)  # the encoder of each query
        visible = (owner[:, None] == reader[None, :, None]) & mask[:, None]  # (N, queries, S)
        read = self.qformer(
            query_embeds=self.query_tokens.expand(len(features), -1, -1),
            encoder_hidden_states=common.gather(0, chosen)[0],
            # transformers takes a mask of four dimensions as it is: what is added to the scores.
            encoder_attention_mask=torch.zeros_like(visible, dtype=common.dtype).masked_fill(
                ~visible, torch.finfo(common.dtype).min
            )[:, None],
        ).last_hidden_state
        return self.language_projection(read), torch.ones(read.shape[:2], dtype=torch.bool, device=read.device)


def make_projector(config: QFormerConfig, context: BuildContext, input_dim: int, output_dim: int) -> QFormerProjector:
    """See ``QFormerConfig.build``."""
    projector = QFormerProjector(config, input_dim, output_dim)
    if config.pretrained is not None and context.weights:
        _load_blip2(projector, config, context.resolve(config.pretrained))
    if config.bert is not None and context.weights:
        _load_bert(projector, context.resolve(config.bert))
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
    if projector.extra_query_tokens is not None:  # new beside the checkpoint's
        tensors["extra_query_tokens"] = projector.extra_query_tokens.detach()
    load_into(projector, tensors, reference)


# Where a Q-Former's modules are in BERT, in which feed-forward blocks are the text's.
_BERT = {
    "attention.attention": "attention.self",
    "attention.output": "attention.output",
    "intermediate_query": "intermediate",
    "output_query": "output",
}


def _load_bert(projector: QFormerProjector, reference: str) -> None:
    """Self-attention and feed-forward blocks of a BERT. Raises ``CheckpointError`` when it has other numbers."""
    found = bert_tensors(reference)
    tensors = projector.qformer.state_dict()
    taken = {"layernorm.weight": "embeddings.LayerNorm.weight", "layernorm.bias": "embeddings.LayerNorm.bias"}
    for name in tensors:
        for own, theirs in _BERT.items():
            if f".{own}." in name:
                taken[name] = name.replace(f".{own}.", f".{theirs}.")
    check_taken(taken, found, reference)
    load_into(projector.qformer, tensors | {own: found[theirs] for own, theirs in taken.items()}, reference)


def bert_tensors(reference: str) -> dict[str, Tensor]:
    """The tensors of a transformers BERT, with or without a head, named from ``embeddings.``, ``encoder.`` or ``cls.`` on.

    Raises ``CheckpointError`` when there is none.
    """
    files = weight_files(reference, None, ["model.safetensors"])
    # Google's own checkpoints name the parameters of a LayerNorm as TensorFlow did.
    endings = {"gamma": "weight", "beta": "bias"}
    tensors = {}
    for name, value in read_tensors(files, [""]).items():
        stem, _, last = name.removeprefix("bert.").rpartition(".")
        tensors[f"{stem}.{endings.get(last, last)}"] = value
    return tensors


def check_taken(taken: Mapping[str, str], found: Mapping[str, Tensor], reference: str) -> None:
    """Raise ``CheckpointError`` when ``found`` lacks something of what is ``taken`` of it."""
    if lost := [theirs for theirs in taken.values() if theirs not in found]:
        raise CheckpointError(f"{reference} holds no {', '.join(lost[:3])}; expected a BERT of as many layers")
