"""The C-Former: integrate-and-fire against the paper's loop, counts known beforehand, and its BERT against transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmllm.config.base import BuildContext
from mmllm.encoders.cformer import CFormerConfig
from mmllm.encoders.cformer_module import integrate_and_fire
from mmllm.errors import CheckpointError

NO_WEIGHTS = BuildContext(weights=False)


def loop(features: Tensor, weights: Tensor) -> list[Tensor]:
    """arXiv 1905.11235, section 3.1, for one item: collect frames until the weights reach 1, fire, go on with what is left."""
    fired, weight, state = [], 0.0, torch.zeros(features.shape[1], dtype=features.dtype)
    for frame, alpha in zip(features, weights.tolist(), strict=True):
        left = alpha
        while weight + left >= 1 - 1e-9:  # a frame of a scaled weight above 1 fires more than once
            used = 1 - weight
            fired.append(state + used * frame)
            left, weight, state = left - used, 0.0, torch.zeros_like(state)
        weight, state = weight + left, state + left * frame
    return fired


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 7, 2), (11, 4, 5), (30, 1, 9)])
def test_integration_is_the_papers_loop(counts: tuple[int, int, int]) -> None:
    """Items of 12, 5 and 9 frames; up to several features from one frame. Measured 2.9e-6; allowed 2e-5."""
    lengths = torch.tensor([12, 5, 9])
    features, weights = torch.randn(3, 12, 4), torch.rand(3, 12)
    weights = weights.masked_fill(torch.arange(12)[None] >= lengths[:, None], 0)
    found = integrate_and_fire(features, weights, torch.tensor(counts))
    assert found.shape == (3, max(counts), 4)
    for item, count in enumerate(counts):
        exact = weights[item].double()
        expected = loop(features[item].double(), exact * count / exact.sum())
        assert len(expected) == count
        torch.testing.assert_close(found[item, :count], torch.stack(expected).float(), atol=2e-5, rtol=0)
        assert not found[item, count:].any()


def test_whatever_fires_has_the_weight_one() -> None:
    """Of constant frames comes the constant; and gradients reach weights and features, the loop's own."""
    weights = torch.rand(2, 1500, requires_grad=True)
    found = integrate_and_fire(torch.ones(2, 1500, 1), weights, torch.tensor([300, 7]))
    torch.testing.assert_close(found[0], torch.ones(300, 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1, :7], torch.ones(7, 1), atol=1e-4, rtol=0)
    features = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    alphas = torch.tensor([[0.4, 0.5, 0.3, 0.6, 0.7, 0.5]], dtype=torch.float64)  # they add up to 3
    ours = torch.autograd.grad(integrate_and_fire(features, alphas, torch.tensor([3])).sin().sum(), features)[0]
    theirs = torch.autograd.grad(torch.stack(loop(features[0], alphas[0])).sin().sum(), features)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_weights_move_the_boundaries() -> None:
    """Loud weights at the end leave the start to one long feature."""
    features = torch.arange(8.0)[None, :, None]
    early = integrate_and_fire(features, torch.tensor([[4.0, 4, 4, 4, 1, 1, 1, 1]]), torch.tensor([2]))
    late = integrate_and_fire(features, torch.tensor([[1.0, 1, 1, 1, 4, 4, 4, 4]]), torch.tensor([2]))
    assert (early < late).all()


def sound(seconds: float) -> Any:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)


@pytest.mark.parametrize(("seconds", "rate", "count"), [(1.0, 5.0, 5), (0.01, 5.0, 1), (2.5, 12.5, 31), (0.49, 3.0, 1)])
def test_the_count_is_known_before_the_forward(seconds: float, rate: float, count: int) -> None:
    config = CFormerConfig(rate=rate, max_seconds=30).tiny()
    preprocess, encoder = config.preprocessor(NO_WEIGHTS), config.build(NO_WEIGHTS)
    item = preprocess(sound(seconds))
    with torch.no_grad():
        features, mask = encoder(preprocess.collate([item]))
    assert preprocess.num_tokens(item) == features.shape[1] == int(mask.sum()) == count


def test_loudness_does_not_matter() -> None:
    """Log-mel bins are normalised over the sound. Measured 3.5e-5 of unit variance; allowed 1e-3."""
    preprocess = CFormerConfig().preprocessor(NO_WEIGHTS)
    quiet, loud = preprocess(sound(1))["mel"], preprocess(4 * sound(1))["mel"]
    torch.testing.assert_close(quiet, loud, atol=1e-3, rtol=0)
    assert quiet.shape == (98, 80)
    torch.testing.assert_close(quiet.std(dim=0, unbiased=False), torch.ones(80), atol=1e-3, rtol=0)


@pytest.fixture
def bert(tmp_path: Path) -> Any:
    """A tiny BertForMaskedLM, saved in ``tmp_path / 'bert'``."""
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**small, vocab_size=11)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "bert")
    return model


def with_bert(root: Path, layers: int = 2) -> Any:
    numbers = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    config = CFormerConfig.model_validate(
        {
            "acoustic": {**numbers, "num_hidden_layers": 1, "num_mel_bins": 16},
            "transformer": {**numbers, "num_hidden_layers": layers},
            "bert": "./bert",
        }
    )
    return config, config.build(BuildContext(root=root))


def test_bert_behind_is_the_checkpoints(bert: Any, tmp_path: Path) -> None:
    """What fired, through the reference's own model with its mask. Measured 0; allowed 1e-5."""
    config, encoder = with_bert(tmp_path)
    preprocess = config.preprocessor(NO_WEIGHTS)
    batch = preprocess.collate([preprocess(sound(2)), preprocess(sound(0.7))])
    seen: list[Tensor] = []
    encoder.to_bert.register_forward_hook(lambda module, given, out: seen.append(out.relu()))
    with torch.no_grad():
        features, mask = encoder(batch)
        expected = bert.bert(inputs_embeds=seen[0], attention_mask=mask.long()).last_hidden_state
    assert mask.sum(dim=1).tolist() == [10, 4]
    torch.testing.assert_close(features[mask], expected[mask], atol=1e-5, rtol=0)


def test_old_names_of_norms_are_read(bert: Any, tmp_path: Path) -> None:
    """bert-base-chinese's file has ``LayerNorm.gamma`` and ``LayerNorm.beta``."""
    from safetensors.torch import load_file, save_file

    path = tmp_path / "bert" / "model.safetensors"
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(path).items()
    }
    save_file(renamed, path)
    _, encoder = with_bert(tmp_path)
    theirs = bert.bert.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in encoder.bert.state_dict().items())


def test_refusals(bert: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="num_hidden_layers 2, the YAML makes it 3; set `transformer`"):
        with_bert(tmp_path, layers=3)
    with pytest.raises(
        ValidationError, match="600 features, but the transformer has 512 positions; lower max_seconds or rate"
    ):
        CFormerConfig(rate=10)
    with pytest.raises(ValidationError, match="less than or equal to 25"):
        CFormerConfig(rate=30)
