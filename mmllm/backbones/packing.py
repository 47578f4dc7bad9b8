"""Attention for rows that hold several sequences behind each other, without padding between them.

A transformers model hands its attention mask to every layer as it got it, when that has four axes. In such a row it is
therefore the sequences' lengths, an int64 tensor ``(1, 1, 1, S)`` in the processor's memory: every attention call then
knows where sequences begin, through activation checkpointing and whatever else a model does with its layers' arguments.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen

PACKED = "mmllm_packed"
"""The name under which transformers knows this attention."""


def register() -> None:
    """Tell transformers of the attention ``PACKED``. Batches with an ordinary mask get its ``sdpa``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)


def as_mask(lengths: Tensor) -> Tensor:
    """The mask of a row that holds sequences of ``lengths (S,)``."""
    return lengths.cpu().view(1, 1, 1, -1)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention ``(1, T, H, D)`` of ``query (1, H, T, D)`` within each sequence of the row, ``key`` and ``value
    (1, H_kv, T, D)``; transformers' own ``sdpa`` for any other mask.

    On a GPU in half precision one kernel does all sequences, elsewhere one call each: a block-diagonal mask would cost the
    square of the whole row.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    options = {"dropout": dropout, "scaling": scaling, **others}
    if attention_mask is None or attention_mask.dtype != torch.int64:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    lengths: list[int] = attention_mask.flatten().tolist()
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # rotations may have made them float32 again
        half = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(half), key.to(half), value.to(half)
    if not dropout and _has_kernel(query, value):
        return _varlen(query, key, value, lengths, scaling, sliding_window), None
    pieces = []
    for q, k, v in zip(*(torch.split(x, lengths, dim=2) for x in (query, key, value)), strict=True):
        mask = None if sliding_window is None or q.shape[2] <= sliding_window else _band(q, sliding_window)
        pieces.append(sdpa_attention_forward(module, q, k, v, mask, **{**options, "is_causal": True})[0])
    return torch.cat(pieces, dim=1), None


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether torch's attention for sequences of any length takes these: flash attention's limits."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None, window: int | None
) -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(query.device, torch.int32, non_blocking=True)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    longest = max(lengths)
    found = varlen.varlen_attn(
        q,
        k,
        v,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return cast(Tensor, found)[None]


def _band(query: Tensor, window: int) -> Tensor:
    """Which of the last ``window`` places, its own included, each place of a sequence sees."""
    places = torch.arange(query.shape[2], device=query.device)
    behind = places[:, None] - places
    return ((behind >= 0) & (behind < window))[None, None]
