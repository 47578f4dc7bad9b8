"""The Perceiver resampler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.errors import ConfigError
from mmllm.projectors.cross_attention import CrossAttentionConfig
from mmllm.projectors.cross_attention_module import ResamplerLayer

CONTEXT = BuildContext(weights=False)


def by_the_book(layer: ResamplerLayer, x: Tensor, features: Tensor, count: int) -> Tensor:
    """Flamingo's figure 5 for one item of ``count`` real features, written out head by head."""
    heads, dim = layer.num_heads, x.shape[-1]
    q_in = F.layer_norm(x, (dim,), layer.norm_queries.weight, layer.norm_queries.bias)
    f_in = F.layer_norm(features[:count], (dim,), layer.norm_features.weight, layer.norm_features.bias)
    kv_in = torch.cat([f_in, q_in])
    q, k, v = q_in @ layer.to_q.weight.T, kv_in @ layer.to_kv.weight[:dim].T, kv_in @ layer.to_kv.weight[dim:].T
    size = dim // heads
    columns = [slice(h * size, (h + 1) * size) for h in range(heads)]
    read = [torch.softmax(q[:, c] @ k[:, c].T / size**0.5, dim=-1) @ v[:, c] for c in columns]
    x = x + torch.cat(read, dim=-1) @ layer.to_out.weight.T
    hidden = F.layer_norm(x, (dim,), layer.norm_ff.weight, layer.norm_ff.bias)
    hidden = F.gelu(hidden @ layer.ff_in.weight.T + layer.ff_in.bias)
    return x + hidden @ layer.ff_out.weight.T + layer.ff_out.bias


def test_a_layer_is_flamingos() -> None:
    """Measured 6.9e-7; allowed 1e-5."""
    layer = ResamplerLayer(24, num_heads=3, ff_mult=2)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, features = torch.randn(3, 5, 24), torch.randn(3, 9, 24)
    counts = (9, 4, 1)
    seen = torch.arange(9)[None] < torch.tensor(counts)[:, None]
    visible = torch.cat([seen, torch.ones(3, 5, dtype=torch.bool)], dim=1)[:, None, None]
    with torch.no_grad():
        found = layer(x, features, visible)
        for index, count in enumerate(counts):
            expected = by_the_book(layer, x[index], features[index], count)
            torch.testing.assert_close(found[index], expected, atol=1e-5, rtol=0)


def test_outputs_start_at_the_scale_of_embeddings() -> None:
    """Standard deviation 0.02, whatever the features' scale and the depth."""
    for depth in (1, 12):
        config = CrossAttentionConfig(num_queries=16, depth=depth)
        projector = config.build(CONTEXT, input_dim=64, output_dim=256)
        for scale in (0.1, 1.0, 10.0):
            with torch.no_grad():
                outputs, _ = projector(scale * torch.randn(4, 20, 64), torch.ones(4, 20, dtype=torch.bool))
            assert outputs.std() == pytest.approx(0.02, rel=0.2)


def test_outputs_depend_on_every_real_feature() -> None:
    projector = CrossAttentionConfig(num_queries=4, depth=2).build(CONTEXT, input_dim=32, output_dim=16)
    features = torch.randn(1, 7, 32, requires_grad=True)
    mask = torch.arange(7)[None] < 5
    outputs, _ = projector(features, mask)
    outputs.square().sum().backward()
    assert features.grad is not None
    reached = features.grad[0].abs().sum(-1) > 0
    assert reached.tolist() == mask[0].tolist()


def test_another_width_than_the_encoders() -> None:
    config = CrossAttentionConfig(num_queries=4, depth=1, num_heads=2, hidden_dim=16)
    projector = config.build(CONTEXT, input_dim=33, output_dim=16)
    assert projector.queries.shape == (4, 16)
    outputs, mask = projector(torch.randn(2, 3, 33), torch.ones(2, 3, dtype=torch.bool))
    assert outputs.shape == (2, 4, 16)
    assert mask.all()


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="num_heads: found 8, expected a divisor of the width 33"):
        CrossAttentionConfig().build(CONTEXT, input_dim=33, output_dim=16)
