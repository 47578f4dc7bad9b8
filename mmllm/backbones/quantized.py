"""Linear layers whose frozen weights are kept in 8 or 4 bits, for adapters on top (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64  # weights that share a scale, as in QLoRA
OFFSET = 0.9677083  # QLoRA's: the outermost quantiles of NF4 are those of 1/2 (1 - 1/32 + 1 - 1/30)


def normal_float() -> Tensor:
    """The 16 values of NF4, ascending from -1 to 1, float32: quantiles of the normal distribution with an exact zero, seven
    below and eight above (QLoRA, section 3 and appendix E).
    """
    above = torch.special.ndtri(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([above, below, above.new_zeros(1)]).sort().values
    return (values / values.max()).float()


def pack_4(values: Tensor) -> Tensor:
    """Blocks ``(N, 64)`` of values from -1 to 1 to the nearest of NF4, two to a byte: ``(N, 32)`` uint8."""
    table = normal_float().to(values.device)
    codes = torch.bucketize(values, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes[:, 0::2] * 16 + codes[:, 1::2]


def unpack_4(codes: Tensor) -> Tensor:
    pairs = torch.stack([codes // 16, codes % 16], dim=-1).flatten(1)
    return normal_float().to(codes.device)[pairs.int()]


def pack_8(values: Tensor) -> Tensor:
    """Blocks ``(N, 64)`` of values from -1 to 1 to steps of 1/127: ``(N, 64)`` int8."""
    return (values * 127).round().to(torch.int8)


def unpack_8(codes: Tensor) -> Tensor:
    return codes.float() / 127


FORMATS = {4: (pack_4, unpack_4), 8: (pack_8, unpack_8)}


class _Product(torch.autograd.Function):
    """``x W^T`` of packed weights; they are unpacked again for the gradient instead of being kept until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpacked(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.unpacked(gradient.dtype), None


class QuantizedLinear(nn.Linear):
    """A frozen ``nn.Linear``. ``codes`` (blocks of 64 weights, row after row) and ``scales``, the largest size in each block.

    ``weight`` is what they stand for, made anew whenever it is asked for, in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: Literal[4, 8]) -> None:
        """From ``weight (out, in)``."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.bits = bits
        flat = weight.detach().float().flatten()
        blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1)
        codes = FORMATS[bits][0](blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weights ``(out, in)``."""
        blocks = FORMATS[self.bits][1](self.codes) * self.scales[:, None].float()
        return (
            blocks.flatten()[: self.out_features * self.in_features].view(self.out_features, self.in_features).to(dtype)
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.unpacked(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        found: Tensor = _Product.apply(x, self)
        return found if self.bias is None else found + self.bias.to(found.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


def quantize(model: Any, bits: Literal[4, 8]) -> None:
    """Replace the linear layers of a transformers model by ``QuantizedLinear``, in place, one after the other.

    The head stays as it is, as do embeddings, and experts that are one tensor.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is head or not isinstance(child, nn.Linear | Conv1D):
                continue
            weight = child.weight if isinstance(child, nn.Linear) else child.weight.T
            setattr(module, name, QuantizedLinear(weight, child.bias, bits))
