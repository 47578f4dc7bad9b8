"""AdamW over the trained parts, and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from mmllm.config.run import OptimizerConfig
from mmllm.training.stages import TrainedPart


def build_optimizer(model: nn.Module, parts: Iterable[TrainedPart], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with one group per rate and decay. Holds the trained parameters and no others.

    Weight decay acts on the matrices of linear and convolution layers only: not on norms and biases (vectors),
    embedding tables, or bare parameters such as queries and positions. Each group keeps its peak rate as ``peak_lr``
    and its parameters' qualified names as ``names``.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(p) for name, p in model.named_parameters() if name.endswith("new_tokens.weight")}
    groups: dict[tuple[float, float], dict[str, nn.Parameter]] = {}
    for part in parts:
        for name, parameter in part.parameters.items():
            decays = parameter.ndim >= 2 and name.endswith("weight") and id(parameter) not in tables
            groups.setdefault((part.lr, config.weight_decay if decays else 0.0), {})[name] = parameter
    return torch.optim.AdamW(
        [
            {"params": list(g.values()), "names": list(g), "lr": lr, "peak_lr": lr, "weight_decay": decay}
            for (lr, decay), g in groups.items()
        ],
        betas=config.betas,
        eps=config.eps,
    )


def lr_factor(step: int, total: int, config: OptimizerConfig) -> float:
    """The share of the peak rate at ``step`` (from 0) of ``total``.

    Linear warm-up over the first ``ceil(warmup * total)`` steps, from one part of it upwards (never zero, so the first
    step counts); then constant, linear to zero, or half a cosine to zero (arXiv 1608.03983, without restarts).
    """
    warm = math.ceil(config.warmup * total)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    done = (step - warm) / max(total - warm, 1)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to ``factor`` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
