"""Head and cross-entropy in one, a few rows at a time: of a large vocabulary the logits of all rows never exist at once.

The gradient of a row's logits is its softmax minus one at the target, so it is there as soon as the logits are. Each piece
is therefore done with, gradients included, before the next begins, and nothing is computed twice. (The same idea as Liger
kernels' and "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009, for any device.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE = 1 << 22
"""Logits at once; more where that would make more pieces than ``PIECES``."""
PIECES = 16


def linear_cross_entropy(
    states: Tensor, weight: Tensor, bias: Tensor | None, signals: Tensor | None, targets: Tensor
) -> Tensor:
    """The summed cross-entropy, a float32 scalar, of logits ``states @ weight.T + bias`` and, behind them, ``states @ signals.T``.

    ``states (K, D)``, ``weight (V, D)``, ``bias (V,)``, ``signals (S, D)``, ``targets (K,)`` int64 below V + S. Products are
    computed in the weights' dtype, or autocast's, softmax in float32.
    """
    if not torch.is_grad_enabled():  # parameters say that they need gradients even then
        weight, bias, signals = weight.detach(), *(None if x is None else x.detach() for x in (bias, signals))
    loss: Tensor = _LinearCrossEntropy.apply(states, weight, bias, signals, targets)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, signals: Tensor | None, targets: Tensor
    ) -> Tensor:
        inputs = (states, weight, bias, signals)
        grads = [
            torch.zeros_like(x) if n and x is not None else None
            for x, n in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        loss = states.new_zeros((), dtype=torch.float32)
        vocabulary = len(weight)
        rows = max(PIECE // vocabulary, -(-len(states) // PIECES), 1)
        for first in range(0, len(states), rows):
            piece, wanted = states[first : first + rows], targets[first : first + rows]
            logits = F.linear(piece.to(weight.dtype), weight, bias)
            if signals is not None:
                logits = torch.cat([logits, F.linear(piece.to(signals.dtype), signals).to(logits.dtype)], dim=-1)
            dtype, logits = logits.dtype, logits.float()
            said, top = logits.gather(1, wanted[:, None]), logits.amax(dim=-1, keepdim=True)
            powers = logits.sub_(top).exp_()  # in place: these are the largest tensors of a step
            total = powers.sum(dim=-1, keepdim=True)
            loss += (total.log() + top - said).sum()
            if not any(ctx.needs_input_grad):
                continue
            slope = powers.div_(total)
            slope[torch.arange(len(slope), device=slope.device), wanted] -= 1.0
            slope = slope.to(dtype)
            words, own = slope[:, :vocabulary], slope[:, vocabulary:]
            if grads[0] is not None:
                back = words @ weight.to(dtype)
                grads[0][first : first + rows] = back if signals is None else back + own @ signals.to(dtype)
            for grad, part in zip((grads[1], grads[3]), (words, own), strict=True):
                if grad is not None:
                    grad += part.t() @ piece.to(dtype)
            if grads[2] is not None:
                grads[2] += words.sum(dim=0)
        ctx.grads = grads
        return loss

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if grad is None else grad * slopes[0].to(grad.dtype) for grad in ctx.grads), None)
