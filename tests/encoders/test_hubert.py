"""The hubert encoder: lengths, batches, trained parts, limits, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mmllm.config.base import BuildContext
from mmllm.encoders.hubert import KNOWN, HubertConfig
from mmllm.encoders.hubert_module import norm_over_time
from mmllm.errors import CheckpointError, ConfigError, MediaError

NO_WEIGHTS = BuildContext(weights=False)
BASE, LARGE = (HubertConfig(pretrained=f"facebook/hubert-{name}").tiny() for name in ("base-ls960", "large-ll60k"))
RATE = 16_000


def noise(samples: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(samples).normal(0.1, 0.1, samples).astype(np.float32)


@pytest.mark.parametrize(
    ("samples", "tokens"), [(1, 1), (399, 1), (400, 1), (719, 1), (720, 2), (RATE, 49), (30 * RATE, 1499)]
)
def test_features_of_a_sound(samples: int, tokens: int) -> None:
    """49 for a second (arXiv 2106.07447: 20 ms each; the first needs 25 ms)."""
    preprocess = BASE.preprocessor(NO_WEIGHTS)
    assert preprocess.num_tokens(preprocess(noise(samples))) == tokens


def test_samples_are_normalised_where_the_checkpoint_wants_it() -> None:
    preprocess = BASE.preprocessor(NO_WEIGHTS)
    wave = preprocess(noise(5000))["wave"]
    assert abs(float(wave.mean())) < 1e-4
    assert abs(float(wave.std(correction=0)) - 1) < 1e-4
    short = preprocess(noise(100))["wave"]
    assert len(short) == 400
    assert not short[100:].any()
    assert abs(float(short[:100].std(correction=0)) - 1) < 1e-4
    assert BASE.architecture is not None
    plain = HubertConfig(architecture=BASE.architecture.model_copy(update={"do_normalize": False}))
    np.testing.assert_array_equal(plain.preprocessor(NO_WEIGHTS)(noise(5000))["wave"], noise(5000))


@pytest.mark.parametrize("config", [BASE, LARGE], ids=["group", "layer"])
def test_a_sound_is_as_alone_in_any_batch(config: HubertConfig) -> None:
    """Measured 3.1e-6; allowed 1e-5."""
    preprocess, encoder = config.preprocessor(NO_WEIGHTS), config.build(NO_WEIGHTS)
    items = [preprocess(noise(samples)) for samples in (700, 40_000, 1, 9999)]
    with torch.no_grad():
        whole, mask = encoder(preprocess.collate(items))
        for row, real, item in zip(whole, mask, items, strict=True):
            torch.testing.assert_close(row[real], encoder(preprocess.collate([item]))[0][0], atol=1e-5, rtol=0)


def test_the_convolutions_run_over_parts_of_a_long_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sounds of which two are read at a time: features as before. Measured 1.5e-6; allowed 1e-5."""
    preprocess, encoder = BASE.preprocessor(NO_WEIGHTS), BASE.build(NO_WEIGHTS)
    batch = preprocess.collate([preprocess(noise(samples)) for samples in (4000, 900, 2000)])
    sizes: list[int] = []
    first = encoder.model.feature_extractor.conv_layers[0].conv
    with torch.no_grad():
        expected, _ = encoder(batch)
        first.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
        monkeypatch.setattr("mmllm.encoders.hubert_module.SAMPLES_PER_CALL", 8000)
        found, _ = encoder(batch)
    assert sizes == [2, 1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_norm_over_time_is_group_norms_on_what_is_real() -> None:
    """Measured 1.2e-6; allowed 1e-5."""
    norm = torch.nn.GroupNorm(6, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, counts = torch.randn(3, 6, 50) + 4, torch.tensor([50, 7, 21])
    with torch.no_grad():
        found = norm_over_time(x, counts, norm)
        for row, whole, count in zip(found, x, counts, strict=True):
            torch.testing.assert_close(row[:, :count], norm(whole[None, :, :count])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [BASE, LARGE], ids=["group", "layer"])
def test_training_is_without_noise_and_reaches_every_parameter(config: HubertConfig) -> None:
    """No dropout, layer drop or masking: what trains is what is used, and nothing waits for a gradient."""
    preprocess, encoder = config.preprocessor(NO_WEIGHTS), config.build(NO_WEIGHTS)
    batch = preprocess.collate([preprocess(noise(samples)) for samples in (700, 4000)])
    with torch.no_grad():
        expected, _ = encoder(batch)
    found, _ = encoder.train()(batch)
    assert torch.equal(found, expected)
    (found * torch.randn_like(found)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


# HuBERT: table 1 of arXiv 2106.07447; wav2vec 2.0: arXiv 2006.11477, section 4.2; WavLM: table 1 of arXiv 2110.13900. All
# three count the pretraining's own head too.
PUBLISHED = {
    "facebook/hubert-base-ls960": 95e6,
    "facebook/hubert-large-ll60k": 317e6,
    "facebook/hubert-xlarge-ll60k": 964e6,
    "facebook/wav2vec2-base": 95e6,
    "facebook/wav2vec2-large-lv60": 317e6,
    "microsoft/wavlm-base": 94.70e6,
    "microsoft/wavlm-large": 316.62e6,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_checkpoints_have_the_published_size(name: str) -> None:
    with torch.device("meta"):
        encoder = HubertConfig(pretrained=name).build(NO_WEIGHTS)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(PUBLISHED[name], rel=0.01)
    assert encoder.output_dim == KNOWN[name].hidden_size


def test_an_earlier_layer_leaves_later_blocks_and_the_last_norm_out() -> None:
    names = [name for name, _ in LARGE.model_copy(update={"select_layer": -2}).build(NO_WEIGHTS).named_parameters()]
    assert any(name.startswith("model.encoder.layers.1.") for name in names)
    assert not any(name.startswith(("model.encoder.layers.2.", "model.encoder.layer_norm.")) for name in names)


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (np.zeros(0, np.float32), "at least one sample"),
        (np.zeros((2, 100), np.float32), "expected mono"),
        (np.zeros(2 * RATE + 1, np.float32), "at most 2; cut it .* of the hubert encoder"),
    ],
)
def test_sounds_that_are_refused(sound: np.ndarray[Any, np.dtype[np.float32]], message: str) -> None:
    preprocess = BASE.model_copy(update={"max_seconds": 2.0}).preprocessor(NO_WEIGHTS)
    with pytest.raises(MediaError, match=message):
        preprocess(sound)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_attention_heads": 5}, "5 heads do not divide hidden_size 768"),
        ({"num_conv_pos_embedding_groups": 5}, "do not divide hidden_size 768"),
        ({"conv_dim": [512]}, r"have \(1, 7, 7\) entries"),
        ({"model_type": "wavlm", "conv_pos_batch_norm": True}, "wavlm has neither conv_pos_batch_norm"),
        ({"model_type": "data2vec"}, "'hubert', 'wav2vec2' or 'wavlm'"),
    ],
)
def test_contradictory_numbers(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HubertConfig.model_validate({"architecture": numbers})


def test_what_is_unknown_or_impossible() -> None:
    with pytest.raises(ValidationError, match="give `pretrained`, or `architecture`"):
        HubertConfig()
    with pytest.raises(ConfigError, match="unknown for 'someone/hubert' without reading it; give `architecture`"):
        HubertConfig(pretrained="someone/hubert").build(NO_WEIGHTS)
    with pytest.raises(ConfigError, match="select_layer: found -13, expected -12 to -1"):
        HubertConfig(pretrained="facebook/hubert-base-ls960", select_layer=-13).build(NO_WEIGHTS)


@pytest.mark.parametrize(
    ("content", "processor", "message"),
    [
        (
            {"model_type": "whisper"},
            {},
            "found model_type 'whisper' in .*, expected a transformers checkpoint of hubert",
        ),
        ({}, {}, "found model_type None"),
        (
            {"model_type": "wav2vec2", "add_adapter": True},
            {},
            "has add_adapter True; checkpoints with trained adapters",
        ),
        ({"model_type": "wav2vec2", "adapter_attn_dim": 16}, {}, "has adapter_attn_dim 16"),
        ({"model_type": "hubert"}, {"sampling_rate": 8000}, "has sampling_rate 8000, expected 16000"),
        ({"model_type": "hubert", "num_hidden_layers": 1}, {}, "found no safetensors weights"),
    ],
)
def test_folders_that_are_refused(
    content: dict[str, Any], processor: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(CheckpointError, match=message):
        HubertConfig(pretrained=str(tmp_path)).build(BuildContext())


def test_declared_numbers_are_checked(tmp_path: Path) -> None:
    from transformers import HubertModel, Wav2Vec2FeatureExtractor

    assert BASE.architecture is not None
    declared = HubertConfig(pretrained=str(tmp_path), architecture=BASE.architecture)
    HubertModel(BASE.build(NO_WEIGHTS).model.config).save_pretrained(tmp_path)
    declared.build(BuildContext())
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="do_normalize: True in the YAML, False in the checkpoint"):
        declared.preprocessor(BuildContext())
    fewer = BASE.architecture.model_copy(update={"num_hidden_layers": 2})
    with pytest.raises(CheckpointError, match="num_hidden_layers: 2 in the YAML, 3 in the checkpoint"):
        HubertConfig(pretrained=str(tmp_path), architecture=fewer).build(BuildContext())
