"""What the processor makes of conversations: token ids, spans of media, and the batch that the model takes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mmllm.cache.media import CachedBatch, Known

OBJECTIVES = (
    "text", "condition", "denoise", "contrastive", "decision",
    "itc", "itm", "itg", "alignment", "reconstruction", "self_contrastive", "quantization",
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """One media item in a sequence: ``count`` features from token ``start`` on.

    ``layout`` is how the encoder's features lie, where the projector asks for it; ``caption`` what the assistant says to it,
    where it is alone of its modality in its message.
    With a cache of features ``known`` is what was found in it, and ``item`` is empty.
    A ``fused`` one takes no tokens beside its markers; its features are seen from the first marker on, ``start - 1``.
    """

    modality: str
    start: int
    count: int
    item: dict[str, Tensor]
    layout: tuple[int, ...] | None = None
    caption: str | None = None
    fused: bool = False
    known: Known | None = None


@dataclass(frozen=True)
class Made:
    """One medium that the assistant makes: its signal tokens from token ``start`` on, what it shows, and the tensor of
    the target (None when it is not wanted or not given; with a cache of latents what was found in it).

    ``seen`` is what the encoder of its modality takes of it (None likewise); ``retrieved`` whether it is an existing
    medium (None where the data do not say).
    """

    modality: str
    start: int
    caption: str | None
    target: Tensor | Known | None
    seen: dict[str, Tensor] | None = None
    retrieved: bool | None = None


@dataclass(frozen=True)
class Encoded:
    """One conversation ready for batching. ``supervised[i]`` says whether token i is to be predicted; ``said`` is what the
    assistant says in it.
    """

    id: str
    ids: list[int]
    supervised: list[bool]
    spans: list[Span]
    made: list[Made] = field(default_factory=list)
    said: str = ""

    @property
    def replies(self) -> list[tuple[int, int]]:
        """Where runs of supervised tokens begin and end; the first token has nothing before it to be predicted from."""
        found, at = list[tuple[int, int]](), 1
        for flag, run in groupby(self.supervised[1:]):
            first, at = at, at + len(list(run))
            if flag:
                found.append((first, at))
        return found

    @property
    def num_supervised(self) -> int:
        # The first token has nothing before it to be predicted from.
        return sum(self.supervised[1:])


@dataclass
class MediaBatch:
    """The media of one modality in a batch: N items.

    ``inputs`` is what the encoder takes. Row ``sources[i]`` of the projector's output, seen as ``(N * Q, D_llm)``, belongs
    at row ``positions[i]`` of the token embeddings, seen as ``(B * T, D_llm)``. ``width`` is Q. ``layouts (N, K)`` are the
    items' layouts where the projector asks for them. Of fused media none has a row: ``fused (N, 3)`` are row, first column that
    sees it, and number of features of each. With a cache of features ``inputs`` are those of the items that are not ``cached``
    only.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    sources: Tensor
    width: int
    layouts: Tensor | None = None
    fused: Tensor | None = None
    cached: CachedBatch | None = None

    def to(self, device: torch.device | str) -> MediaBatch:
        inputs = {k: v.to(device, non_blocking=True) for k, v in self.inputs.items()}
        layouts, fused = (None if t is None else t.to(device) for t in (self.layouts, self.fused))
        cached = None if self.cached is None else self.cached.to(device)
        return MediaBatch(
            inputs, self.positions.to(device), self.sources.to(device), self.width, layouts, fused, cached
        )


@dataclass
class CaptionBatch:
    """Captions of n media of one modality in a batch: ``ids (n, L)`` int64, padded where ``real (n, L)`` is False, are those of
    the items ``items (n,)`` of its ``MediaBatch``. The first token is the class token, the last real one the separator;
    ``unknown`` is the mask token.
    """

    items: Tensor
    ids: Tensor
    real: Tensor
    unknown: int

    def to(self, device: torch.device | str) -> CaptionBatch:
        items, ids, real = (t.to(device, non_blocking=True) for t in (self.items, self.ids, self.real))
        return CaptionBatch(items, ids, real, self.unknown)


@dataclass
class MadeBatch:
    """What the assistant makes of one modality in a batch: N items.

    ``positions (N, K)`` are flat indices of their signal tokens into B*T. Item ``captioned[i]`` shows ``captions[i]``; item
    ``drawn[i]`` has the target ``targets[i]`` (None without any). ``seen`` is what the modality's encoder takes of the
    items ``shown`` (None without any). Of item ``decided[i]`` the data say whether it exists, ``retrieved[i]`` (1), or is
    generated (0). With a cache of latents ``targets`` are those of the media that are not ``cached`` only.
    """

    positions: Tensor
    captions: list[str]
    captioned: Tensor
    targets: Tensor | None
    drawn: Tensor
    seen: dict[str, Tensor] | None
    shown: Tensor
    decided: Tensor
    retrieved: Tensor
    cached: CachedBatch | None = None

    def to(self, device: torch.device | str) -> MadeBatch:
        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(tensor) for name, tensor in value.items()}
            if isinstance(value, CachedBatch):
                return value.to(device)
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return MadeBatch(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})


@dataclass
class CodeBatch:
    """The media of one modality in a batch that are written in codes: N items.

    ``targets (N, …)`` is what the frozen generator makes codes of. The one at place p of item n stands at flat index
    ``positions[n, p]`` of B*T, as the token ``firsts[p]`` plus the code.
    """

    targets: Tensor
    positions: Tensor
    firsts: Tensor

    def to(self, device: torch.device | str) -> CodeBatch:
        return CodeBatch(*(t.to(device, non_blocking=True) for t in (self.targets, self.positions, self.firsts)))


@dataclass
class Batch:
    """B conversations padded to T tokens.

    ``ids (B, T)`` int64, ``attention_mask (B, T)`` int64. Logits at flat positions ``predict (K,)`` into B*T are to give
    ``targets (K,)``: the head runs nowhere else. Where media are written in codes, ``ids`` and ``targets`` hold others until
    ``MultimodalLM.with_codes`` has made them. ``captions`` has those of media of an input that aligns with them,
    ``prompted`` the same as its P-Former reads them, and ``sentences`` what the assistant says in each conversation (``items``
    are rows then). ``replies (R, 3)`` are the assistant's replies that are supervised: row, first position, position behind
    the last one. In a packed batch the conversations stand behind each other in one row, without padding; ``lengths (S,)``, in
    the processor's memory, are theirs.
    """

    ids: Tensor
    attention_mask: Tensor
    predict: Tensor
    targets: Tensor
    media: dict[str, MediaBatch]
    sample_ids: list[str] = field(default_factory=list)
    made: dict[str, MadeBatch] = field(default_factory=dict)
    codes: dict[str, CodeBatch] = field(default_factory=dict)
    captions: dict[str, CaptionBatch] = field(default_factory=dict)
    prompted: dict[str, CaptionBatch] = field(default_factory=dict)
    sentences: dict[str, CaptionBatch] = field(default_factory=dict)
    replies: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of supervised tokens."""
        return int(self.targets.numel())

    @property
    def counts(self) -> dict[str, int]:
        """How many terms each objective's sum has."""
        captions = sum(len(own.items) for own in self.captions.values())
        sentences = sum(len(own.items) for own in self.sentences.values())
        owners = self.predict // self.ids.shape[1]
        return {
            "text": self.tokens,
            "condition": sum(len(made.captions) for made in self.made.values()),
            "denoise": sum(len(made.drawn) for made in self.made.values()),
            "contrastive": sum(len(made.shown) for made in self.made.values()),
            "decision": sum(len(made.decided) for made in self.made.values()),
            "itc": captions,
            "itm": 3 * captions,  # the pair itself, and each side of it with another
            "itg": sum(int(own.real[:, 1:].sum()) for own in self.captions.values()),
            "alignment": sum(len(own.items) for own in self.prompted.values()),
            "reconstruction": sum(int(torch.isin(owners, own.items).sum()) for own in self.sentences.values()),
            "self_contrastive": sentences,
            "quantization": sentences,
        }

    def to(self, device: torch.device | str) -> Batch:
        """A copy on ``device``."""
        media = {name: m.to(device) for name, m in self.media.items()}
        ids, attention = self.ids.to(device, non_blocking=True), self.attention_mask.to(device, non_blocking=True)
        predict, targets = self.predict.to(device, non_blocking=True), self.targets.to(device, non_blocking=True)
        made = {name: m.to(device) for name, m in self.made.items()}
        codes = {name: c.to(device) for name, c in self.codes.items()}
        captions, prompted, sentences = (
            {name: c.to(device) for name, c in read.items()} for read in (self.captions, self.prompted, self.sentences)
        )
        replies = None if self.replies is None else self.replies.to(device, non_blocking=True)
        own = media, self.sample_ids, made, codes, captions, prompted, sentences, replies, self.lengths
        return Batch(ids, attention, predict, targets, *own)
