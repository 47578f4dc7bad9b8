"""The group projector: NExT-GPT's parameter names and counts, and its forward written out from its paper and code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.projectors.group import GroupConfig

CONTEXT = BuildContext(weights=False)
Weights = dict[str, Tensor]


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w[f"{name}.weight"], w[f"{name}.bias"])


def mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    return linear(F.gelu(linear(x, w, f"{name}.fc1")), w, f"{name}.fc2")


def heads_of(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    size = q.shape[1] // heads
    columns = [slice(h * size, (h + 1) * size) for h in range(heads)]
    return torch.cat([torch.softmax(q[:, c] @ k[:, c].T / size**0.5, dim=1) @ v[:, c] for c in columns], dim=1)


def by_hand(w: Weights, x: Tensor, heads: int, depths: tuple[int, ...]) -> Tensor:
    """One item without padding, at evaluation."""
    x, before = linear(x, w, "in_fc"), None
    for stage, depth in enumerate(depths):
        at = f"layers.{stage}"
        tokens = w.get(f"{at}.group_token")
        if tokens is not None:
            tokens = tokens[0]
            if before is not None:
                mixed = norm(before, w, f"{at}.group_projector.0")
                tokens = tokens + mlp(mixed.T, w, f"{at}.group_projector.1").T
            x = torch.cat([x, tokens])
        for block in range(depth):
            b = f"{at}.blocks.{block}"
            q, k, v = linear(norm(x, w, f"{b}.norm1"), w, f"{b}.attn.qkv").chunk(3, dim=1)
            x = x + linear(heads_of(q, k, v, heads), w, f"{b}.attn.proj")
            x = x + mlp(norm(x, w, f"{b}.norm2"), w, f"{b}.mlp")
        if tokens is None:
            break
        x, before = x[: -len(tokens)], x[-len(tokens) :]
        d = f"{at}.downsample"
        features = norm(x, w, f"{d}.norm_x")
        groups = mlp(norm(before, w, f"{d}.norm_tokens").T, w, f"{d}.mlp_inter").T
        groups = norm(groups, w, f"{d}.norm_post_tokens")
        p = f"{d}.pre_assign_attn"
        q, k, v = (
            linear(source, w, f"{p}.attn.{n}_proj") for source, n in ((groups, "q"), (features, "k"), (features, "v"))
        )
        groups = groups + linear(heads_of(q, k, v, heads), w, f"{p}.attn.proj")
        groups = norm(groups + mlp(norm(groups, w, f"{p}.norm2"), w, f"{p}.mlp"), w, f"{p}.norm_post")
        a = f"{d}.assign"
        likeness = linear(groups, w, f"{a}.q_proj") @ linear(features, w, f"{a}.k_proj").T
        values = linear(features, w, f"{a}.v_proj")
        taken = [values[likeness.argmax(dim=0) == group] for group in range(len(groups))]
        means = torch.stack([mine.sum(dim=0) / (len(mine) + 1) for mine in taken])
        x = groups + linear(means, w, f"{a}.proj")
        x = x + mlp(norm(x, w, f"{d}.norm_new_x"), w, f"{d}.mlp_channels")
    return linear(norm(x, w, "norm"), w, "out_fc")


@pytest.mark.parametrize(
    "numbers",
    [
        {"num_group_tokens": (6, 3), "num_output_groups": (5, 4), "depths": (2, 1, 2)},
        {"num_group_tokens": (4,), "num_output_groups": (7,), "depths": (1, 3)},
    ],
)
def test_forward_is_nextgpts(numbers: dict[str, Any]) -> None:
    """Items of different numbers of features. Measured 1.2e-7; allowed 1e-5."""
    config = GroupConfig(hidden_dim=16, num_heads=2, **numbers)
    projector = config.build(CONTEXT, input_dim=10, output_dim=12).eval()
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    counts = (9, 1, 4)
    features, mask = torch.randn(3, 9, 10), torch.arange(9)[None] < torch.tensor(counts)[:, None]
    weights = projector.state_dict()
    with torch.no_grad():
        found, real = projector(features, mask)
        assert found.shape == (3, config.num_outputs(9), 12)
        assert real.all()
        for item, count in enumerate(counts):
            expected = by_hand(weights, features[item, :count], 2, numbers["depths"])
            torch.testing.assert_close(found[item], expected, atol=1e-5, rtol=0)


def test_assignments_are_drawn_in_training_and_fixed_otherwise() -> None:
    projector = GroupConfig().tiny().build(CONTEXT, input_dim=10, output_dim=12)
    features, mask = torch.randn(1, 9, 10), torch.ones(1, 9, dtype=torch.bool)
    with torch.no_grad():
        drawn = [projector.train()(features, mask)[0] for _ in range(6)]
        fixed = [projector.eval()(features, mask)[0] for _ in range(2)]
    assert torch.equal(*fixed)
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])


def test_published_names_and_count() -> None:
    """NExT-GPT's defaults (1024 to 4096): the parameters of its modules, counted from their definition."""
    with torch.device("meta"):
        projector = GroupConfig().build(CONTEXT, input_dim=1024, output_dim=4096)
    c = 512
    layer_norm, four = 2 * c, (c * 4 * c + 4 * c) + (4 * c * c + c)
    block = 2 * layer_norm + 3 * c * c + (c * c + c) + four
    cross = 2 * layer_norm + 4 * (c * c + c) + four

    def mixer(tokens: int, groups: int) -> int:
        return tokens * (c // 2) + c // 2 + (c // 2) * groups + groups

    def grouping(tokens: int, groups: int) -> int:
        return 4 * layer_norm + mixer(tokens, groups) + cross + 4 * (c * c + c) + four

    expected = 1024 * c + c + 12 * block + (64 + 8) * c + layer_norm + mixer(64, 8)
    expected += grouping(64, 64) + grouping(8, 8) + layer_norm + c * 4096 + 4096
    assert sum(p.numel() for p in projector.parameters()) == expected == 53_144_912
    names = set(dict(projector.named_parameters()))
    assert {
        "in_fc.weight",
        "layers.0.group_token",
        "layers.0.blocks.5.attn.qkv.weight",
        "layers.0.downsample.pre_assign_attn.attn.k_proj.bias",
        "layers.1.group_projector.1.fc2.weight",
        "layers.1.downsample.assign.proj.weight",
        "layers.2.blocks.2.mlp.fc1.bias",
        "out_fc.bias",
    } <= names
    assert not [
        name for name in names if name.startswith(("layers.2.group", "layers.2.downsample", "layers.0.group_proj"))
    ]


def test_stages_must_agree() -> None:
    with pytest.raises(
        ValidationError, match="found 2 num_group_tokens and 2 depths, expected 2 and 3 for 2 num_output_groups"
    ):
        GroupConfig(depths=(6, 3))
    with pytest.raises(ValidationError, match="num_heads 3 does not divide hidden_dim 512"):
        GroupConfig(num_heads=3)
