"""Gated cross-attention equals that of transformers' IDEFICS, and OpenFlamingo's formula. Tiny and random, float32, CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmllm.config.base import BuildContext
from mmllm.fusion.base import Seen
from mmllm.fusion.gated_cross_attention import GatedCrossAttentionConfig


def ours(dim: int, media_dim: int, **keys: Any) -> Any:
    config = GatedCrossAttentionConfig(**keys)
    module = config.build(BuildContext(weights=False), hidden_dim=dim, media_dim=media_dim, num_layers=1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("gates", ["scalar", "vector"])
def test_layer_of_idefics(gates: str) -> None:
    """Two pictures, a token before any of them, padding. Measured 2e-7, allowed 1e-5."""
    from transformers import IdeficsConfig
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

    kinds = {"scalar": "float", "vector": "vector"}
    config = IdeficsConfig(
        hidden_size=24,
        num_attention_heads=3,
        intermediate_size=40,
        vision_config={"embed_dim": 20},
        qk_layer_norms=True,
        alpha_type=kinds[gates],
        attn_implementation="eager",
    )
    theirs: Any = IdeficsGatedCrossAttentionLayer(config, layer_idx=0).eval()
    keys = {"num_heads": 3, "head_dim": 8, "norm": "rms", "feedforward": "swiglu", "feedforward_dim": 40}
    module = ours(24, 20, qk_norm=True, gates=gates, **keys)
    names = {
        "cross_attn.q_proj": "to_q",
        "cross_attn.k_proj": "to_k",
        "cross_attn.v_proj": "to_v",
        "cross_attn.o_proj": "to_out",
        "cross_attn.q_layer_norm": "norm_q",
        "cross_attn.k_layer_norm": "norm_k",
        "mlp.gate_proj": "ff_gate",
        "mlp.up_proj": "ff_in",
        "mlp.down_proj": "ff_out",
        "input_layernorm": "norm_attention",
        "post_attention_layernorm": "norm_feedforward",
    }
    renamed = {f"{new}.weight": theirs.state_dict()[f"{old}.weight"] for old, new in names.items()}
    renamed |= {"attention_gate": theirs.alpha_cross_attn, "feedforward_gate": theirs.alpha_dense}
    own = module.blocks[0].state_dict()
    assert own.keys() == renamed.keys()
    for name, tensor in own.items():  # into theirs: ours are random everywhere, gates included
        renamed[name].data.copy_(tensor.view(renamed[name].shape))

    hidden, media = torch.randn(2, 6, 24), torch.randn(3, 4, 20)
    places = torch.tensor([[0, 1, 4], [0, 4, 4], [1, 0, 4]])
    sees = torch.zeros(2, 6, 2, 4, dtype=torch.bool)  # row, token, picture of the row, feature
    sees[0, 1:4, 0] = sees[0, 4:, 1] = sees[1, :, 0] = True
    flat = torch.stack([torch.cat([media[0], media[1]]), torch.cat([media[2], torch.zeros(4, 20)])])
    visible = sees.flatten(2)
    mask = torch.zeros(2, 1, 6, 8).masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = theirs(
            hidden, image_hidden_states=flat, image_attention_mask=mask, cross_attention_gate=visible.any(-1).float()
        )
        found = module.fuse(0, hidden, Seen(media, places, (2, 6)))
    assert not torch.equal(found, hidden)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def flamingo(x: Tensor, media: Tensor, w: dict[str, Tensor], heads: int) -> Tensor:
    """One token sequence ``(T, D)`` that sees ``media (Q, D_m)``: x + tanh(a) Attn(LN x, media), then x + tanh(b) FF(LN x)."""

    def normed(t: Tensor, name: str) -> Tensor:
        centred = t - t.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    q = normed(x, "norm_attention") @ w["to_q.weight"].T
    k, v = media @ w["to_k.weight"].T, media @ w["to_v.weight"].T
    size = q.shape[-1] // heads
    heard = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = (q[:, part] * size**-0.5) @ k[:, part].T
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        heard.append(weights / weights.sum(-1, keepdim=True) @ v[:, part])
    x = x + w["attention_gate"].tanh() * (torch.cat(heard, -1) @ w["to_out.weight"].T)
    inner = normed(x, "norm_feedforward") @ w["ff_in.weight"].T
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    return x + w["feedforward_gate"].tanh() * (inner @ w["ff_out.weight"].T)


def test_layer_of_open_flamingo() -> None:
    """Each token against the formula with the one picture before it. Measured 2e-7, allowed 1e-5."""
    module = ours(24, 20, num_heads=2, head_dim=8)
    weights = module.blocks[0].state_dict()
    hidden, media = torch.randn(1, 7, 24), torch.randn(2, 3, 20)
    with torch.no_grad():
        found = module.fuse(0, hidden, Seen(media, torch.tensor([[0, 0, 3], [0, 5, 2]]), (1, 7)))[0]
        first = flamingo(hidden[0, :5], media[0], weights, heads=2)
        second = flamingo(hidden[0, 5:], media[1, :2], weights, heads=2)
    torch.testing.assert_close(found, torch.cat([first, second]), atol=1e-5, rtol=0)
