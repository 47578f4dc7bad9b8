"""The clap encoder: windows, outputs, trained parts, limits, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mmllm.config.base import BuildContext
from mmllm.encoders.clap import KNOWN, ClapConfig
from mmllm.encoders.clap_module import WINDOWS_PER_CALL
from mmllm.errors import CheckpointError, ConfigError, MediaError

NO_WEIGHTS = BuildContext(weights=False)
TINY = ClapConfig(pretrained="laion/clap-htsat-unfused").tiny()
FUSED = ClapConfig(pretrained="laion/clap-htsat-fused", long="fusion").tiny()
RATE = 48_000  # a window of the tiny ones is one second


def noise(samples: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)


@pytest.mark.parametrize(
    ("seconds", "windows"), [(0.001, 1), (1, 1), (10, 1), (10.001, 2), (20, 2), (20.001, 3), (90, 9)]
)
def test_windows_of_the_published_towers(seconds: float, windows: int) -> None:
    """64 features of 10 s: the tower's last stage is 8 x 8."""
    for output, features in (("sequence", 64), ("pooled", 1), ("embedding", 1)):
        config = ClapConfig(pretrained="laion/clap-htsat-unfused", output=output)  # type: ignore[arg-type]
        preprocess = config.preprocessor(NO_WEIGHTS)
        preprocess._mel = lambda wave: torch.zeros(1001, 64)  # type: ignore[method-assign]
        item = preprocess(np.zeros(int(seconds * RATE), np.float32))
        assert item["mels"].shape == (windows, 1, 1001, 64)
        assert preprocess.num_tokens(item) == windows * features


@pytest.mark.parametrize(("long", "windows", "views"), [("windows", 4, 1), ("crop", 1, 1), ("fusion", 1, 4)])
def test_what_becomes_of_a_long_sound(long: str, windows: int, views: int) -> None:
    preprocess = FUSED.model_copy(update={"long": long}).preprocessor(NO_WEIGHTS)
    item = preprocess(noise(3 * RATE + 1))
    assert item["mels"].shape == (windows, views, 101, 8)
    assert item["longer"].tolist() == [long == "fusion"] * windows
    assert preprocess(noise(RATE))["longer"].tolist() == [False]
    assert item["mels"].isfinite().all()


def test_windows_cover_the_sound_from_start_to_end() -> None:
    preprocess = TINY.preprocessor(NO_WEIGHTS)
    sound = np.arange(2 * RATE + RATE // 2, dtype=np.float32)
    first = [int(window[0]) for window in preprocess._windows(sound)]
    assert first == [0, RATE * 3 // 4, RATE * 3 // 2]
    assert all(len(window) == RATE for window in preprocess._windows(sound))


@pytest.mark.parametrize("config", [TINY, FUSED], ids=["windows", "fusion"])
def test_a_sound_is_as_alone_in_any_batch(config: ClapConfig) -> None:
    """Measured 0; allowed 1e-5."""
    preprocess, encoder = config.preprocessor(NO_WEIGHTS), config.build(NO_WEIGHTS)
    items = [preprocess(noise(samples)) for samples in (700, 3 * RATE, 1, RATE + 9999)]
    with torch.no_grad():
        whole, mask = encoder(preprocess.collate(items))
        for row, real, item in zip(whole, mask, items, strict=True):
            torch.testing.assert_close(row[real], encoder(preprocess.collate([item]))[0][0], atol=1e-5, rtol=0)
    assert not whole[~mask].any()


def test_long_recordings_run_in_bounded_batches() -> None:
    preprocess, encoder = TINY.preprocessor(NO_WEIGHTS), TINY.build(NO_WEIGHTS)
    sizes: list[int] = []
    norm = encoder.model.audio_encoder.batch_norm
    norm.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    with torch.no_grad():
        features, mask = encoder(preprocess.collate([preprocess(noise(20 * RATE))]))
    assert sizes == [WINDOWS_PER_CALL, 20 - WINDOWS_PER_CALL]
    assert features.shape == (1, 20 * 16, 16)
    assert mask.all()


def test_embeddings_have_unit_length() -> None:
    config = TINY.model_copy(update={"output": "embedding"})
    preprocess = config.preprocessor(NO_WEIGHTS)
    with torch.no_grad():
        found, _ = config.build(NO_WEIGHTS)(preprocess.collate([preprocess(noise(2 * RATE))]))
    assert found.shape == (1, 2, 12)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(1, 2))


@pytest.mark.parametrize("config", [TINY, FUSED], ids=["windows", "fusion"])
def test_training_reaches_every_parameter(config: ClapConfig) -> None:
    """Parts of the fusion are there only when it is used."""
    preprocess, encoder = config.preprocessor(NO_WEIGHTS), config.build(NO_WEIGHTS)
    features, _ = encoder(preprocess.collate([preprocess(noise(3 * RATE)), preprocess(noise(5))]))
    (features * torch.randn_like(features)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert any("fusion_model" in name for name, _ in encoder.named_parameters()) == (config.long == "fusion")


def test_known_towers_have_the_published_tensors() -> None:
    """laion/clap-htsat-fused holds 266 tensors of its tower and 4 of its projection."""
    with torch.device("meta"):
        towers = {
            name: ClapConfig(
                pretrained=name, long="fusion" if KNOWN[name].enable_fusion else "crop", output="embedding"
            )
            for name in KNOWN
        }
        built = {name: config.build(NO_WEIGHTS) for name, config in towers.items()}
    assert len(built["laion/clap-htsat-fused"].state_dict()) == 266 + 4
    assert {encoder.output_dim for encoder in built.values()} == {512}
    assert ClapConfig(pretrained="laion/larger_clap_music").tiny().build(NO_WEIGHTS).output_dim == 16


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (np.zeros(0, np.float32), "at least one sample"),
        (np.zeros((2, 100), np.float32), "expected mono"),
        (np.zeros(2 * RATE + 1, np.float32), "at most 2; cut it .* of the clap encoder"),
    ],
)
def test_sounds_that_are_refused(sound: np.ndarray[Any, np.dtype[np.float32]], message: str) -> None:
    preprocess = TINY.model_copy(update={"max_seconds": 2.0}).preprocessor(NO_WEIGHTS)
    with pytest.raises(MediaError, match=message):
        preprocess(sound)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"depths": [2, 2]}, "have 2 and 4 entries"),
        ({"num_mel_bins": 60}, "num_mel_bins 60 do not divide spec_size 256"),
        ({"max_length_s": 11}, "11 seconds are 1101 frames, but the tower reads at most 1024"),
        ({"num_mel_bins": 16, "max_length_s": 1}, "the last stage has 8 rows, not a multiple of .* 16"),
        ({"window_size": 9}, "the last stage has 8 rows, fewer than window_size 9"),
    ],
)
def test_contradictory_numbers(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ClapConfig.model_validate({"architecture": numbers})


def test_what_is_unknown_or_impossible() -> None:
    with pytest.raises(ValidationError, match="give `pretrained`, or `architecture`"):
        ClapConfig()
    with pytest.raises(ConfigError, match="unknown for 'someone/clap' without reading it; give `architecture`"):
        ClapConfig(pretrained="someone/clap").preprocessor(NO_WEIGHTS)
    with pytest.raises(ConfigError, match="long: found fusion, but the checkpoint was made without"):
        ClapConfig(pretrained="laion/clap-htsat-unfused", long="fusion").build(NO_WEIGHTS)


@pytest.mark.parametrize(
    ("content", "sound", "message"),
    [
        ({"model_type": "clip"}, {}, "found model_type 'clip' in .*, expected a transformers CLAP"),
        ({"audio_config": {"fusion_type": "channel_map"}}, {}, "has fusion_type 'channel_map', expected None"),
        ({"audio_config": {"num_mel_bins": 64}}, {"feature_size": 80}, r"have different mel bins: \[64, 80\]"),
        ({"audio_config": {"patch_stride": [4, 8]}}, {}, "a CLAP that cannot be built"),
        ({"audio_config": {"depths": [1, 1, 1, 1]}}, {}, "found no safetensors weights"),
    ],
)
def test_folders_that_are_refused(content: dict[str, Any], sound: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clap"} | content))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(sound))
    with pytest.raises(CheckpointError, match=message):
        ClapConfig(pretrained=str(tmp_path)).build(BuildContext())


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    from transformers import ClapFeatureExtractor

    assert TINY.architecture is not None
    TINY.build(NO_WEIGHTS).model.save_pretrained(tmp_path)
    # Without an extractor's file the declared numbers stand for it.
    ClapConfig(pretrained=str(tmp_path), architecture=TINY.architecture).build(BuildContext())
    sound = {"feature_size": 8, "max_length_s": 1, "frequency_min": 50, "truncation": "rand_trunc"}
    ClapFeatureExtractor(**sound).save_pretrained(tmp_path)
    ClapConfig(pretrained=str(tmp_path), architecture=TINY.architecture).build(BuildContext())
    with pytest.raises(CheckpointError, match="has no `audio_projection`; an embedding needs"):
        ClapConfig(pretrained=str(tmp_path), output="embedding").build(BuildContext())
    other = TINY.architecture.model_copy(update={"frequency_max": 20_000.0})
    with pytest.raises(CheckpointError, match=r"frequency_max: 20000.0 in the YAML, 14000.0 in the checkpoint"):
        ClapConfig(pretrained=str(tmp_path), architecture=other).preprocessor(BuildContext())
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"depths": [2, 4]}))
    with pytest.raises(CheckpointError, match=r"has stages of \(2, 2\) blocks, expected \(2, 4\)"):
        ClapConfig(pretrained=str(tmp_path)).build(BuildContext())
