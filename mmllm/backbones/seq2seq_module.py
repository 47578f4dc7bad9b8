"""A transformers encoder-decoder behind the backbone contract: one sequence in, cut where the assistant replies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mmllm.backbones.base import BackboneOutput
from mmllm.backbones.language_model_module import LanguageModel

if TYPE_CHECKING:
    from transformers import EncoderDecoderCache

    from mmllm.config.families import AdapterConfig


@dataclass
class EncoderMemory:
    """What a decoder reads: its own keys and values, and what the encoder made ``(B, P, D)`` with its mask ``(B, P)``; None
    before the first pass.
    """

    pairs: EncoderDecoderCache
    encoded: Tensor | None = None
    mask: Tensor | None = None


class Cut(NamedTuple):
    """R replies of a batch, each cut off from what stands before it.

    ``before (R, P)`` are the flat positions of what the encoder reads, packed to the left, ``mask (R, P)`` which of them
    are real. ``reply (R, L)`` are those of the decoder's inputs behind its start token (some beyond a reply's end, which
    nothing asks for). ``place (B * T)`` is where the answer to a flat position stands among R * (1 + L) decoder outputs.
    """

    before: Tensor
    mask: Tensor
    reply: Tensor
    place: Tensor


class Seq2Seq(LanguageModel):
    """The encoder reads what stands before a reply, the decoder its start token and the reply.

    So the decoder's output at its start token predicts the reply's first token, as a decoder-only model's does at the position
    before the reply; positions keep their meaning. A conversation with several replies is encoded once for each: as often
    as the model reads it when it is used.
    """

    one_stream = False

    def __init__(
        self,
        model: Any,
        adapter: AdapterConfig | None,
        num_new_tokens: int = 0,
        num_signals: int = 0,
        tie_signals: bool = False,
    ) -> None:
        super().__init__(model, adapter, num_new_tokens, num_signals, tie_signals)
        # Checkpoints say it in either file; T5's own start token is its padding, 0.
        config, stated = model.config.to_dict(), model.generation_config.decoder_start_token_id
        known = (stated, config.get("decoder_start_token_id"), config.get("pad_token_id"), 0)
        self.start_token: int = next(token for token in known if token is not None)

    def new_cache(self) -> EncoderMemory:
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderMemory(EncoderDecoderCache(DynamicCache(), DynamicCache()))

    def keep_rows(self, cache: EncoderMemory, rows: Tensor) -> None:
        cache.pairs.reorder_cache(rows)
        if cache.encoded is not None and cache.mask is not None:
            cache.encoded, cache.mask = cache.encoded[rows], cache.mask[rows]

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        positions: Tensor | None = None,
        states_at: Tensor | None = None,
        cache: EncoderMemory | None = None,
        replies: Tensor | None = None,
        lengths: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> BackboneOutput:
        rows, width = inputs_embeds.shape[:2]
        if cache is not None and cache.encoded is not None:
            _, found = self._run(
                positions,
                states_at,
                targets,
                encoder_outputs=(cache.encoded,),
                attention_mask=cache.mask,
                decoder_inputs_embeds=inputs_embeds,
                past_key_values=cache.pairs,
                use_cache=True,
            )
            return found if positions is None else found._replace(logits=found.logits[0])
        real = inputs_embeds.new_ones(rows, width) if attention_mask is None else attention_mask
        if replies is None:
            whole = torch.arange(rows, device=real.device)[:, None]
            replies = torch.cat([whole, torch.full_like(whole, width), torch.full_like(whole, width)], dim=1)
        cut = cut_replies(real.bool(), replies)
        flat = inputs_embeds.flatten(0, 1)
        start = self.embed(torch.full_like(replies[:, :1], self.start_token))
        out, found = self._run(
            None if positions is None else cut.place[positions],
            None if states_at is None else cut.place[states_at],
            targets,
            inputs_embeds=flat[cut.before],
            attention_mask=cut.mask.to(torch.int64),
            decoder_inputs_embeds=torch.cat([start.to(flat.dtype), flat[cut.reply]], dim=1),
            past_key_values=None if cache is None else cache.pairs,
            use_cache=cache is not None,
        )
        if cache is not None:
            cache.encoded, cache.mask = out.encoder_last_hidden_state, cut.mask.to(torch.int64)
        if positions is not None:
            return found._replace(logits=found.logits[0])
        # Where nothing is replied there is nothing to predict: zeros.
        logits = found.logits.flatten(0, 1)[cut.place] * (cut.place >= 0)[:, None]
        return found._replace(logits=logits.view(rows, width, -1))


def cut_replies(real: Tensor, replies: Tensor) -> Cut:
    """``real (B, T)`` bool tells padding from tokens; ``replies (R, 3)`` as in ``Backbone.forward``."""
    rows, width = real.shape
    row, first, behind = replies.unbind(dim=1)
    columns = torch.arange(width, device=real.device)
    seen = real[row] & (columns < first[:, None])
    lengths = seen.sum(dim=1)
    # Packed to the left: learned positions then count tokens, not padding.
    packed = (~seen).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(lengths.max())]
    before = row[:, None] * width + packed
    mask = columns[: packed.shape[1]] < lengths[:, None]
    steps = torch.arange(int((behind - first).max()) + 1, device=real.device)
    reply = row[:, None] * width + (first[:, None] + steps[:-1]).clamp(max=width - 1)
    place = torch.full((rows * width,), -1, device=real.device)
    held = steps <= (behind - first)[:, None]
    outputs = torch.arange(len(replies), device=real.device)[:, None] * len(steps) + steps
    place[(row[:, None] * width + first[:, None] - 1 + steps)[held]] = outputs[held]
    return Cut(before, mask, reply, place)
