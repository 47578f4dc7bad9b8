"""The identity of what computes: whatever would change a value changes it, and nothing else does."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmllm.cache.identity import identity
from mmllm.config.base import BuildContext, component_class
from mmllm.errors import MmllmError

CLIP = {"kind": "clip", "architecture": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 16}}  # fmt: skip


def encoder(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = component_class("encoder", "clip").model_validate(CLIP | changes)
    module: nn.Module = config.build(BuildContext(dtype=torch.float32))  # type: ignore[attr-defined]
    return module.eval()


def preprocessor(**changes: Any) -> Any:
    return component_class("encoder", "clip").model_validate(CLIP | changes).preprocessor(BuildContext())  # type: ignore[attr-defined]


def a_weight(module: Any) -> None:
    next(module.parameters()).data.view(-1)[3] += 1e-7


def the_dtype(module: Any) -> None:
    module.bfloat16()


def the_epsilon(module: Any) -> None:
    next(m for m in module.modules() if isinstance(m, nn.LayerNorm)).eps = 1e-3


def the_heads(module: Any) -> None:
    next(m for m in module.modules() if isinstance(m, nn.MultiheadAttention)).num_heads = 4


def the_activation(module: Any) -> None:
    block = module.visual.transformer.resblocks[0].mlp
    block.gelu = nn.ReLU()


@pytest.mark.parametrize("change", [a_weight, the_dtype, the_epsilon, the_heads, the_activation])
def test_what_an_encoder_computes_with_changes_it(change: Callable[[Any], None]) -> None:
    module = encoder()
    change(module)
    assert identity(module) != identity(encoder())


def test_how_a_medium_is_prepared_changes_it() -> None:
    kinds = [{}, {"fit": "pad"}, {"fit": "squash"}, {"image_size": 64}, {"fit": "native"},
             {"fit": "native", "max_patches": 2}, {"select_layer": -1, "keep_class_token": True}]  # fmt: skip
    assert len({identity(preprocessor(**kind)) for kind in kinds}) == len(kinds)
    assert identity(encoder(select_layer=-1)) != identity(encoder(select_layer=-2))


def test_use_and_mode_do_not_change_it() -> None:
    module, before = encoder(), identity(encoder())
    with torch.no_grad():
        module({"pixels": torch.randn(2, 3, 32, 32)})
    module.train()
    module.requires_grad_(False)
    assert identity(module) == before


def test_another_process_with_other_hashes_of_strings_finds_the_same() -> None:
    program = """
import torch
from mmllm.cache.identity import identity
from mmllm.config.base import BuildContext, component_class
for kind in ("vit", "clap", "whisper"):
    cls = component_class("encoder", kind)
    config = cls.model_validate({"kind": kind, **next(iter(cls.suggested.values()))}).tiny()
    torch.manual_seed(0)
    context = BuildContext(dtype=torch.float32, weights=False)
    print(identity(config.build(context)), identity(config.preprocessor(context), {"a", "b", "c", "d"}))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert len(set(outputs.pop().split())) == 6


@dataclass
class Numbers:
    a: int = 1


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a: int) -> None:
        self.a = a


class Words(list[str]):
    pass


def scaled(by: float) -> Callable[[float], float]:
    return lambda value: value * by


DIFFERENT: list[tuple[Any, Any]] = [
    (1, 1.0), (1, True), ("ab", b"ab"), ([1, 2], (1, 2)), ([1, 2], [2, 1]), (["a", "b"], ["ab", ""]),
    ({"a": 1}, {"a": 2}), ({1, 2}, {1, 3}), (Numbers(), Numbers(2)), (Slotted(1), Slotted(2)),
    (Words("ab"), Words("abc")), (Words("ab"), ["a", "b"]), (scaled(2), scaled(3)), (lambda x: x + 1, lambda x: x - 1),
    (functools.partial(max, 1), functools.partial(max, 2)), (functools.partial(max, 1), functools.partial(min, 1)),
    (torch.zeros(2, 8), torch.zeros(4, 4)), (torch.zeros(2), torch.zeros(2).int()), (np.zeros(3), np.ones(3)),
    (np.zeros((2, 8)), np.zeros((4, 4))), (Numbers(2).__eq__, Numbers(3).__eq__), (range(3), range(4)),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=lambda value: type(value).__name__)
def test_different_things_have_different_identities(one: Any, other: Any) -> None:
    assert identity(one) == identity(one)
    assert identity(one) != identity(other)
    assert identity(one, other) != identity(other, one)


def test_the_order_of_names_does_not_count() -> None:
    assert identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1})


def test_an_object_that_holds_itself_is_looked_into_once() -> None:
    one, other = Numbers(), Numbers(2)
    one.me = one  # type: ignore[attr-defined]
    other.me = other  # type: ignore[attr-defined]
    assert identity(one) != identity(other)


def test_what_cannot_be_looked_into_is_refused() -> None:
    with pytest.raises(MmllmError, match="generator"):
        identity({"rows": (x for x in range(3))})
