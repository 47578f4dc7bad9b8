"""Linear and MLP projectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.projectors.base import Projector


class SwiGLU(nn.Module):
    """``(…, 2 D)`` to ``(…, D)``: the first half times SiLU of the second (arXiv 2002.05202; halves as in Ultravox's code)."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "swiglu": SwiGLU}


class MLPProjector(Projector):
    """Linear layers with an activation between, applied to every group of ``stack`` neighbouring features.

    ``(N, S, D)`` becomes ``(N, ceil(S / stack) * expand, output_dim)``: the last group of an item is filled up with
    zeros, and every group gives ``expand`` outputs, one behind the other. With ``row_ends`` features of zeros give ``row_end``
    (output_dim,), which starts as LLaVA-NeXT's ``image_newline`` does: normal, of standard deviation output_dim ** -0.5.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        depth: int = 2,
        hidden_dim: int | tuple[int, ...] | None = None,
        activation: str = "gelu",
        bias: bool = True,
        stack: int = 1,
        expand: int = 1,
        norm: bool = False,
        row_ends: bool = False,
    ) -> None:
        super().__init__()
        self.stack, self.expand = stack, expand
        hidden = hidden_dim if isinstance(hidden_dim, tuple) else (hidden_dim or output_dim,) * (depth - 1)
        widths = [input_dim * stack, *hidden, output_dim * expand]
        self.norm = nn.LayerNorm(input_dim) if norm else nn.Identity()
        wider = 2 if activation == "swiglu" else 1
        layers: list[nn.Module] = []
        for i in range(depth - 1):
            layers += [nn.Linear(widths[i], wider * widths[i + 1], bias=bias), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=bias))
        self.row_end = nn.Parameter(torch.randn(output_dim) * output_dim**-0.5) if row_ends else None

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        seen, features = features, self.norm(features)
        if self.stack > 1:
            features = features.masked_fill(~mask[..., None], 0.0)
            missing = -features.shape[1] % self.stack
            features = F.pad(features, (0, 0, 0, missing))
            mask = F.pad(mask, (0, missing))
            n, s, d = features.shape
            features = features.reshape(n, s // self.stack, self.stack * d)
            mask = mask.reshape(n, s // self.stack, self.stack).any(dim=-1)
        out: Tensor = self.layers(features)
        if self.row_end is not None:
            out = torch.where(seen.any(dim=-1, keepdim=True), out, self.row_end.to(out.dtype))
        n, s, d = out.shape
        return out.reshape(n, s * self.expand, d // self.expand), mask.repeat_interleave(self.expand, dim=1)
