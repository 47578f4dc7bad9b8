"""BLIP-2's first stage (arXiv 2301.12597): a Q-Former learns from captions, before there is a language model."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.config.alignment import AlignmentConfig
from mmllm.config.base import BuildContext
from mmllm.errors import CheckpointError
from mmllm.pretrained import find, load_into, read_json, read_tensors, tensor_names, weight_files
from mmllm.projectors.gather import gathered, largest
from mmllm.projectors.qformer import QFormerConfig
from mmllm.projectors.qformer_module import QFormerProjector, bert_tensors, check_taken

FLOOR = 1e-4  # of a negative's weight, from LAVIS: no other is impossible


class TextBlock(nn.Module):
    """The feed-forward block of text in one layer of a Q-Former, transformers' own modules."""

    def __init__(self, config: object) -> None:
        from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerIntermediate, Blip2QFormerOutput

        super().__init__()
        self.intermediate, self.output = Blip2QFormerIntermediate(config), Blip2QFormerOutput(config)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.output(self.intermediate(states), states)
        return out


class WordHead(nn.Module):
    """BERT's head: a layer, GELU, LayerNorm, and the table of word embeddings for the logits."""

    def __init__(self, hidden_dim: int, rows: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, states: Tensor, table: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(states))), table, self.bias)


class Blip2Alignment(nn.Module):
    """What BLIP-2's first stage needs beside a Q-Former: its text side, and the heads of three objectives.

    From LAVIS (``lavis/models/blip2_models/blip2_qformer.py``); one more row of the table than the tokenizer has tokens is
    ``[DEC]``, which begins a caption that is to be written. Captions are ``ids (N, L)`` with ``[CLS]`` first, of which
    ``real (N, L)`` are not padding. The projector is given in every call: it is a part of its own.
    """

    def __init__(self, config: AlignmentConfig, projector: QFormerConfig) -> None:
        from transformers import Blip2QFormerConfig
        from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

        super().__init__()
        width, rows = projector.hidden_dim, config.vocab_size + 1
        numbers = Blip2QFormerConfig(
            vocab_size=rows,
            hidden_size=width,
            intermediate_size=projector.ff_mult * width,
            hidden_dropout_prob=projector.dropout,
            max_position_embeddings=config.max_positions,
        )
        self.max_length, self.label_smoothing, self.begin = config.max_length, config.label_smoothing, config.vocab_size
        self.embeddings = Blip2TextEmbeddings(numbers)
        self.text_blocks = nn.ModuleList(TextBlock(numbers) for _ in range(projector.num_layers))
        self.vision_projection = nn.Linear(width, config.dim)
        self.text_projection = nn.Linear(width, config.dim)
        self.itm_head = nn.Linear(width, 2)
        self.itg_head = WordHead(width, rows)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def embed_media(self, projector: QFormerProjector, features: Tensor, seen: Tensor) -> Tensor:
        """Unit vectors ``(N, Q, dim)``, float32, of media by their encoder's ``features (N, S, D)`` and mask."""
        return self._unit(self.vision_projection(projector.read(features, seen)))

    def embed_captions(self, projector: QFormerProjector, ids: Tensor, real: Tensor) -> Tensor:
        """Unit vectors ``(N, dim)``, float32."""
        states = projector.read_text(self.embeddings(ids), self.text_blocks, real[:, None])
        return self._unit(self.text_projection(states[:, 0]))

    def match(self, projector: QFormerProjector, features: Tensor, seen: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """Logits ``(N, 2)``, float32, that a medium and a caption do not, or do, belong together: means over the queries."""
        count = projector.queries().shape[1]
        mask = F.pad(real, (count, 0), value=True)[:, None]
        states = projector.read_text(self.embeddings(ids), self.text_blocks, mask, (features, seen))
        logits: Tensor = self.itm_head(states[:, :count]).float().mean(dim=1)
        return logits

    def write(
        self, projector: QFormerProjector, features: Tensor, seen: Tensor, ids: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The states ``(N, Q, hidden_dim)`` of the queries, which see no text, and the logits ``(N, L - 1, rows)`` of the tokens
        of the captions from the second on, each from the queries and the tokens before it, ``[DEC]`` first.
        """
        count, length = projector.queries().shape[1], ids.shape[1]
        begun = torch.cat([torch.full_like(ids[:, :1], self.begin), ids[:, 1:]], dim=1)
        mask = torch.ones(count + length, count + length, dtype=torch.bool, device=ids.device).tril()
        mask[:count, :count] = True
        mask = mask & F.pad(real, (count, 0), value=True)[:, None]
        states = projector.read_text(self.embeddings(begun), self.text_blocks, mask, (features, seen))
        table = self.embeddings.word_embeddings.weight
        return states[:, :count], self.itg_head(states[:, count:-1], table)

    def losses(
        self,
        projector: QFormerProjector,
        features: Tensor,
        seen: Tensor,
        ids: Tensor,
        real: Tensor,
        objectives: Collection[str],
    ) -> dict[str, Tensor]:
        """Sums, float32 scalars, over N media with their captions: ``itc`` of N terms, ``itm`` of 3 N, ``itg`` of as many as there
        are tokens after the first.

        Every process must call this for ``itc`` and ``itm``, also with N = 0: the others' media and captions are those that
        each is told apart from, in training.
        """
        sums: dict[str, Tensor] = {}
        count, told_apart = len(ids), "itc" in objectives or "itm" in objectives
        states = None
        if "itg" in objectives and count:
            states, logits = self.write(projector, features, seen, ids, real)
            wanted = real[:, 1:].nonzero(as_tuple=True)
            sums["itg"] = self._cross_entropy(logits[wanted].float(), ids[:, 1:][wanted])
        if told_apart:
            dim = self.text_projection.out_features
            queries = projector.queries().shape[1]
            media = text = self.temperature.new_zeros(0)
            with torch.set_grad_enabled(torch.is_grad_enabled() and "itc" in objectives):
                media, text = media.view(0, queries, dim), text.view(0, dim)
                if count:
                    states = projector.read(features, seen) if states is None else states
                    media = self._unit(self.vision_projection(states))
                    text = self.embed_captions(projector, ids, real)
                first, to_text, to_media = self._similarities(media, text)
            if "itc" in objectives:
                own = first + torch.arange(count, device=ids.device)
                sums["itc"] = (self._cross_entropy(to_text, own) + self._cross_entropy(to_media, own)) / 2
            if "itm" in objectives:
                sums["itm"] = self._matching(projector, features, seen, ids, real, first, to_text, to_media)
        return sums

    def _similarities(self, media: Tensor, text: Tensor) -> tuple[int, Tensor, Tensor]:
        """Of unit vectors ``media (n, Q, dim)`` and ``text (n, dim)``: where this process's pairs begin among all N, and the
        similarities ``(n, N)`` of its media to all captions and of its captions to all media, each by the best query.
        """
        first, everyone = 0, torch.cat([media.flatten(1), text], dim=1)
        if self.training:
            first, everyone = gathered(everyone)
        dim = text.shape[1]
        all_media = everyone[:, :-dim].reshape(len(everyone), media.shape[1], dim)
        all_text = everyone[:, -dim:]
        with torch.autocast(text.device.type, enabled=False):
            to_text = torch.einsum("nqd,md->nmq", media, all_text).amax(dim=-1)
            to_media = torch.einsum("nd,mqd->nmq", text, all_media).amax(dim=-1)
            return first, to_text / self.temperature, to_media / self.temperature

    def _matching(
        self,
        projector: QFormerProjector,
        features: Tensor,
        seen: Tensor,
        ids: Tensor,
        real: Tensor,
        first: int,
        to_text: Tensor,
        to_media: Tensor,
    ) -> Tensor:
        """The pairs themselves, the media of others with their captions, and their media with captions of others."""
        count = len(ids)
        all_features, all_seen, all_ids, all_real = features, seen, ids, real
        if self.training:
            all_features, all_seen = _gather_features(features, seen)
            all_ids, all_real = _gather_captions(ids, real, self.max_length)
        if not count or to_text.shape[1] == 1:  # with nothing to tell it apart from, a pair teaches nothing
            idle = self.match(projector, features, seen, ids, real).sum() if count else self.temperature
            return (idle + all_features.sum()) * 0.0
        # The same every time in evaluation; in training from the state that the step begins with.
        draws = None if self.training else torch.Generator(ids.device).manual_seed(0)
        other_media = _negatives(to_media, first, draws)
        other_text = _negatives(to_text, first, draws)
        features, all_features = _as_long(features, all_features)
        seen, all_seen = _as_long(seen, all_seen)
        ids, all_ids = _as_long(ids, all_ids)
        real, all_real = _as_long(real, all_real)
        logits = self.match(
            projector,
            torch.cat([features, all_features[other_media], features]),
            torch.cat([seen, all_seen[other_media], seen]),
            torch.cat([ids, ids, all_ids[other_text]]),
            torch.cat([real, real, all_real[other_text]]),
        )
        belong = torch.cat([ids.new_ones(count), ids.new_zeros(2 * count)])
        return F.cross_entropy(logits, belong, reduction="sum")

    def _cross_entropy(self, logits: Tensor, wanted: Tensor) -> Tensor:
        if not len(wanted):  # torch's smoothed sum over nothing is not a number
            return logits.sum() * 0.0
        return F.cross_entropy(logits, wanted, label_smoothing=self.label_smoothing, reduction="sum")

    def _unit(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors.float(), dim=-1)


@torch.no_grad()
def _negatives(similarities: Tensor, first: int, draws: torch.Generator | None) -> Tensor:
    """For each of n rows one of N others, in proportion to the softmax of its ``similarities (n, N)``. Row i's own is ``first``
    + i.
    """
    weights = similarities.softmax(dim=1) + FLOOR
    rows = torch.arange(len(weights), device=weights.device)
    weights[rows, first + rows] = 0.0
    return torch.multinomial(weights, 1, generator=draws).flatten()


def _gather_features(features: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Those of all processes, padded to one length. Gradients go back to each where its encoder learns."""
    length = largest(features.shape[1], features.device)
    # In one precision: a process without media does not know in which its encoder would have answered.
    features = F.pad(features.float(), (0, 0, 0, length - features.shape[1]))
    with torch.set_grad_enabled(features.requires_grad):
        _, rows = gathered(features.flatten(1))
    with torch.no_grad():
        _, mask = gathered(F.pad(seen, (0, length - seen.shape[1])).long())
    return rows.view(len(rows), length, features.shape[2]), mask.bool()


@torch.no_grad()
def _gather_captions(ids: Tensor, real: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Those of all processes, padded to ``length``."""
    short = (0, length - ids.shape[1])
    _, rows = gathered(torch.cat([F.pad(ids, short), F.pad(real, short).long()], dim=1))
    return rows[:, :length], rows[:, length:].bool()


def _as_long(own: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Both, with ``own (n, S, …)`` padded to the length of ``others``, which is not less."""
    more = others.shape[1] - own.shape[1]
    padded = torch.cat([own, own.new_zeros(len(own), more, *own.shape[2:])], dim=1)
    return padded, others


def make_alignment(config: AlignmentConfig, projector: QFormerConfig, context: BuildContext) -> Blip2Alignment:
    """The alignment of ``projector``. Raises ``CheckpointError`` when the weights to start from have other numbers."""
    alignment = Blip2Alignment(config, projector)
    if config.bert is not None and context.weights:
        _load_bert(alignment, context.resolve(config.bert))
    if config.pretrained is not None and context.weights:
        _load_retrieval(alignment, context.resolve(config.pretrained))
    return alignment.to(context.dtype)


def _load_bert(alignment: Blip2Alignment, reference: str) -> None:
    """Embeddings, feed-forward blocks and the head of words of a BERT; ``[DEC]`` and what is not BERT's stay new."""
    found, own = bert_tensors(reference), alignment.state_dict()
    words = {"embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight"}
    words["itg_head.bias"] = "cls.predictions.bias"
    taken = {"embeddings.position_embeddings.weight": "embeddings.position_embeddings.weight"}
    for module, theirs in {"dense": "transform.dense", "norm": "transform.LayerNorm"}.items():
        taken |= {f"itg_head.{module}.{end}": f"cls.predictions.{theirs}.{end}" for end in ("weight", "bias")}
    taken |= {name: name.replace("text_blocks.", "encoder.layer.") for name in own if name.startswith("text_blocks.")}
    check_taken(taken | words, found, reference)
    tensors = own | {name: found[theirs] for name, theirs in taken.items()}
    for name, theirs in words.items():
        rows = found[theirs]
        tensors[name] = torch.cat([rows, own[name][-1:].to(rows)])
    load_into(alignment, tensors, reference)


def _load_retrieval(alignment: Blip2Alignment, reference: str) -> None:
    """The text side and the heads of a transformers ``Blip2ForImageTextRetrieval``."""
    path = find(reference, None, ["config.json"])
    content = read_json(path) if path is not None else {}
    if not content.get("qformer_config", {}).get("use_qformer_text_input"):
        raise CheckpointError(f"{reference} has no Q-Former that reads text; expected a Blip2ForImageTextRetrieval")
    files = weight_files(reference, None, ["model.safetensors"])
    own = alignment.state_dict()
    taken = {}
    for name in own:
        if name.startswith("text_blocks."):
            taken[name] = name.replace("text_blocks.", "qformer.encoder.layer.")
        elif not name.startswith(("itg_head.", "temperature")):
            taken[name] = name
    found = read_tensors(files, list(taken.values()))
    if lost := sorted(set(taken.values()) - set(found)):
        there = ", ".join(tensor_names(files)[:3])
        raise CheckpointError(f"{reference} holds no {', '.join(lost[:3])} (but {there}, …); expected as many layers")
    load_into(alignment, own | {name: found[theirs] for name, theirs in taken.items()}, reference)
