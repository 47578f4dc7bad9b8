"""torch's ``MultiheadAttention`` uses the weights of its projections without calling them: adapters cannot reach them there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OpenAttention(nn.Module):
    """The same attention with ``in_proj`` (D -> 3D) and ``out_proj`` as linear layers that are called.

    Takes over the parameters of ``closed``. Outputs equal its own on torch's path without attention weights.
    """

    def __init__(self, closed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = closed.embed_dim, closed.num_heads, closed.head_dim
        self.batch_first, self.dropout = closed.batch_first, closed.dropout
        with torch.device("meta"):
            self.in_proj = nn.Linear(closed.embed_dim, 3 * closed.embed_dim, closed.in_proj_bias is not None)
            self.out_proj = nn.Linear(closed.embed_dim, closed.embed_dim, closed.out_proj.bias is not None)
        self.in_proj.weight, self.in_proj.bias = closed.in_proj_weight, closed.in_proj_bias
        self.out_proj.weight, self.out_proj.bias = closed.out_proj.weight, closed.out_proj.bias
        self.bias_k, self.bias_v = closed.bias_k, closed.bias_v
        self.train(closed.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """``(N, L, D)``, or ``(L, N, D)`` without ``batch_first``; ``attn_mask`` as torch's: True hides, a float is added.

        There are never weights to return, whatever ``need_weights`` says.
        """
        if query is key is value:
            q, k, v = self.in_proj(query).chunk(3, dim=-1)
        else:
            q, k, v = (self.in_proj(x).chunk(3, dim=-1)[i] for i, x in enumerate((query, key, value)))
        if not self.batch_first:
            q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        count, length, width = q.shape
        if self.bias_k is not None and self.bias_v is not None:  # one learned key more
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(count, 1, width)], dim=1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(count, 1, width)], dim=1)
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in (q, k, v))
        mask, dropout = self._mask(attn_mask, k.shape[2]), self.dropout * self.training
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out: Tensor = self.out_proj(found.transpose(1, 2).reshape(count, length, width))
        return out if self.batch_first else out.transpose(0, 1), None

    def _mask(self, mask: Tensor | None, keys: int) -> Tensor | None:
        """torch's mask ``(L, S)`` or ``(N * heads, L, S)`` as SDPA takes it; everything sees the learned key."""
        if mask is None:
            return None
        mask = ~mask if mask.dtype == torch.bool else mask
        mask = F.pad(mask, (0, keys - mask.shape[-1]), value=True if mask.dtype == torch.bool else 0.0)
        return mask if mask.ndim == 2 else mask.view(-1, self.num_heads, *mask.shape[1:])


def open_attention(model: nn.Module) -> None:
    """Open every ``MultiheadAttention`` in ``model``, in place, whose queries, keys and values are equally wide."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MultiheadAttention) and child.in_proj_weight is not None:
                setattr(module, name, OpenAttention(child))
