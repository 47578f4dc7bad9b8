"""Weights in few bytes, so that the embedded assistant stays small.

Matrices of the largest frozen parts are rounded to eight bits (e4m3, arXiv 2209.05433: 2.7 % of a value, whatever its size)
before anything is trained on top of them; what is trained then knows them as they ship. `stored` keeps a tensor in
the smallest type that holds it exactly, so rounded values take one byte each in an ordinary safetensors file. Libraries
convert them to the type they compute in as they load them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SMALL = torch.float8_e4m3fn


def rounded(tensor: Tensor) -> Tensor:
    """Matrices and kernels rounded to eight bits, in their own type; biases, norms and integers as they are."""
    return tensor.to(SMALL).to(tensor.dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor


def stored(tensor: Tensor) -> Tensor:
    """In eight bits where that loses nothing, else in half precision."""
    if not tensor.is_floating_point():
        return tensor.contiguous()
    small = tensor.to(SMALL)
    return (small if torch.equal(small.to(tensor.dtype), tensor) else tensor.half()).contiguous()


def rewrite(
    source: Path, target: Path, change: Callable[[Tensor], Tensor], prefix: str = "", unused: tuple[str, ...] = ()
) -> None:
    """Write a safetensors file again, each tensor changed: those whose names start with ``prefix``, without ``unused``."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = {
        n: change(v).contiguous() for n, v in load_file(source).items() if n.startswith(prefix) and n not in unused
    }
    new = target.with_suffix(".new")
    save_file(tensors, new, metadata=metadata)
    new.replace(target)
