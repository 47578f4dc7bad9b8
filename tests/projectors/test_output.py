"""Output projectors: shapes from the generator, and the published numbers of parameters."""

from __future__ import annotations

import pytest
import torch

from mmllm.config.base import BuildContext, component_class, kinds
from mmllm.config.families import OutputProjectorConfig
from mmllm.generators.base import Condition
from mmllm.projectors.output import LinearOutputConfig, TinyTransformerConfig

SHAPES = {"text": (7, 12), "pooled": (1, 5)}


@pytest.mark.parametrize("kind", kinds("output_projector"))
@pytest.mark.parametrize("signals", [1, 3, 8])
def test_every_kind_gives_the_generators_shape(kind: str, signals: int) -> None:
    config = component_class("output_projector", kind)().tiny()
    assert isinstance(config, OutputProjectorConfig)
    module = config.build(BuildContext(), input_dim=10, num_signals=signals, condition_shape=SHAPES)
    found = module(torch.randn(2, signals, 10))
    assert {name: tuple(value.shape) for name, value in found.items()} == {"text": (2, 7, 12), "pooled": (2, 1, 5)}


def test_with_as_many_signals_as_positions_linear_is_position_by_position() -> None:
    module = LinearOutputConfig().build(BuildContext(), input_dim=10, num_signals=7, condition_shape={"text": (7, 12)})
    signals = torch.randn(2, 7, 10)
    changed = signals.clone()
    changed[:, 3] += 1
    moved = (module(signals)["text"] - module(changed)["text"]).abs().sum(dim=(0, 2)) > 0
    assert moved.tolist() == [False] * 3 + [True] + [False] * 3


# SD 1.5, ZeroScope, AudioLDM behind a backbone of width 4096 (OPT-6.7B, Vicuna-7B).
@pytest.mark.parametrize("shape", [(77, 768), (77, 1024), (1, 512)])
def test_tiny_transformer_has_the_references_parameters(shape: tuple[int, int]) -> None:
    """GILL's mapper (`gill/layers.py`) written out; NExT-GPT's is the same."""
    width, (length, dim) = 4096, shape
    reference = {
        "fc": torch.nn.Linear(width, 512),
        "tfm": torch.nn.Transformer(
            batch_first=True,
            norm_first=True,
            d_model=512,
            num_encoder_layers=4,
            num_decoder_layers=4,
            dim_feedforward=512 * 4,
            dropout=0.0,
            nhead=4,
        ),
        "model": torch.nn.Linear(512, dim),
    }
    wanted = sum(p.numel() for m in reference.values() for p in m.parameters()) + length * 512
    with torch.device("meta"):
        ours = TinyTransformerConfig().build(
            BuildContext(), input_dim=width, num_signals=8, condition_shape={"text": shape}
        )
    assert sum(p.numel() for p in ours.parameters()) == wanted


def test_distance_is_the_mean_norm_over_real_positions() -> None:
    found = Condition({"text": torch.zeros(2, 3, 4), "pooled": torch.zeros(2, 1, 2)})
    wanted = Condition(
        {"text": torch.ones(2, 3, 4), "pooled": torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])},
        {"text": torch.tensor([[True, True, True], [True, False, False]])},
    )
    # |(1,1,1,1)| = 2 at each real position, |(3,4)| = 5.
    torch.testing.assert_close(found.distance(wanted), torch.tensor([(3 * 2 + 5) / 4, (2 + 0) / 2]))
    same = wanted.distance(wanted, "cosine")
    assert same[0] < 1e-6
