"""The qformer projector from random weights. Parity with BLIP-2 is in tests/parity."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from mmllm.config.base import BuildContext
from mmllm.errors import CheckpointError
from mmllm.projectors.qformer import QFormerConfig

CONFIG = QFormerConfig(num_queries=6, num_layers=4, hidden_dim=64, num_heads=4)
CONTEXT = BuildContext(weights=False)


def test_outputs_start_at_the_scale_of_embeddings() -> None:
    """Standard deviation 0.02, whatever the features' scale."""
    projector = CONFIG.build(CONTEXT, input_dim=32, output_dim=256).eval()
    mask = torch.ones(8, 20, dtype=torch.bool)
    for scale in (0.1, 1.0, 10.0):
        with torch.no_grad():
            outputs, _ = projector(scale * torch.randn(8, 20, 32), mask)
        assert outputs.std() == pytest.approx(0.02, rel=0.2)


def test_queries_differ_from_the_start() -> None:
    """Equal queries would stay equal: the Q-Former is symmetric in them."""
    projector = CONFIG.build(CONTEXT, input_dim=32, output_dim=16).eval()
    with torch.no_grad():
        outputs, _ = projector(torch.randn(1, 20, 32), torch.ones(1, 20, dtype=torch.bool))
    distances = torch.cdist(outputs[0], outputs[0]) + torch.eye(6)
    assert distances.min() > 0.01


@pytest.mark.parametrize(("every", "layers"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_cross_attention_layers(every: int, layers: list[int]) -> None:
    config = CONFIG.model_copy(update={"cross_attention_every": every})
    projector = config.build(CONTEXT, input_dim=32, output_dim=16)
    assert [i for i, layer in enumerate(projector.qformer.encoder.layer) if layer.has_cross_attention] == layers


def test_num_outputs_does_not_depend_on_the_length() -> None:
    assert {CONFIG.num_outputs(length) for length in (1, 6, 1500)} == {6}


def test_refusals() -> None:
    with pytest.raises(ValidationError, match="num_heads 5 does not divide hidden_dim 64"):
        QFormerConfig(hidden_dim=64, num_heads=5)
    with pytest.raises(CheckpointError, match="found no folder /nowhere"):
        QFormerConfig(pretrained="/nowhere").build(BuildContext(), input_dim=8, output_dim=8)
