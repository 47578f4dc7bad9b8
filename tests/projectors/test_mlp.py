"""Activations of the MLP projector."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.projectors.mlp import MLPConfig

CONTEXT = BuildContext(weights=False)


def test_swiglu_is_ultravoxs() -> None:
    """Eight frames to one, a layer of twice the width, first half times SiLU of the second, a layer; no biases."""
    config = MLPConfig(stack=8, activation="swiglu", bias=False, hidden_dim=6)
    projector = config.build(CONTEXT, input_dim=4, output_dim=5)
    wide, last = projector.layers[0].weight, projector.layers[2].weight
    assert (wide.shape, last.shape) == ((12, 32), (5, 6))
    assert len(list(projector.parameters())) == 2
    features = torch.randn(2, 16, 4)
    with torch.no_grad():
        value, gate = (features.reshape(2, 2, 32) @ wide.T).split(6, dim=2)
        found, _ = projector(features, torch.ones(2, 16, dtype=torch.bool))
        torch.testing.assert_close(found, (value * (gate * gate.sigmoid())) @ last.T, atol=1e-6, rtol=0)


def test_relu_as_in_slam_asr() -> None:
    projector = MLPConfig(activation="relu", hidden_dim=6).build(CONTEXT, input_dim=4, output_dim=5)
    features = torch.randn(1, 3, 4)
    with torch.no_grad():
        found, _ = projector(features, torch.ones(1, 3, dtype=torch.bool))
        expected = projector.layers[2](F.relu(projector.layers[0](features)))
    assert torch.equal(found, expected)
