"""Linear layers in use: how their weights lie in memory, and what multiplies them.

Values and shapes stay; products differ by rounding. docs/inference.md has what each choice gives.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def quicken(*models: nn.Module) -> int:
    """Let the linear layers of models that are only used, not trained, compute faster on a processor in float32; how many.

    A product with one token reads every weight once. MKL reads a matrix ``(out, in)`` that lies by rows as ``out`` scalar
    products; one that lies by columns as ``in`` sums of columns, which for ``out > in`` takes half of the time. So wide matrices
    lie by columns from now on: such a tensor is not contiguous, and has to be made so where it is saved. Products with more
    tokens are oneDNN's instead of MKL's. Other devices and precisions are left alone.
    """
    modules = [module for model in models for module in model.modules()]
    looked_up = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    # Subclasses (quantised layers) know of their own layout.
    found = [module for module in modules if type(module) is nn.Linear and _plain(module.weight)]
    for module in found:
        weight = module.weight
        if weight.shape[0] > weight.shape[1] and id(weight) not in looked_up:
            weight.data = weight.data.t().contiguous().t()
        if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            vars(module)["forward"] = partial(product, module)
    return len(found)


def _plain(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()


def product(layer: nn.Linear, x: Tensor) -> Tensor:
    """What ``layer`` gives for ``x (…, in)``: by oneDNN, for several tokens that nothing is to be learned from."""
    usual = x.is_cpu and x.dtype == torch.float32  # the model may have been moved since
    if x.numel() == layer.in_features or not usual or torch.is_grad_enabled():
        return F.linear(x, layer.weight, layer.bias)
    # The operation that torch's own compiler chooses; `F.linear` would take MKL.
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return found
