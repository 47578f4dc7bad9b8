"""The whisper encoder: windows, long recordings, limits, and refusals."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mmllm.config.base import BuildContext
from mmllm.encoders.whisper import SIZES, WhisperConfig
from mmllm.encoders.whisper_module import WINDOWS_PER_CALL, WhisperEncoder
from mmllm.errors import CheckpointError, ConfigError, MediaError

NO_WEIGHTS = BuildContext(weights=False)
TINY = WhisperConfig(arch="tiny").tiny()  # windows of half a second, 25 features
RATE = 16_000


def noise(samples: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)


@pytest.mark.parametrize(
    ("samples", "windows", "tokens"),
    [(1, 1, 1), (320, 1, 1), (321, 1, 2), (7999, 1, 25), (8000, 1, 25), (8001, 2, 26), (40_000, 5, 125)],
)
def test_windows_and_features(samples: int, windows: int, tokens: int) -> None:
    preprocess = TINY.preprocessor(NO_WEIGHTS)
    item = preprocess(noise(samples))
    assert item["mels"].shape == (windows, 16, 50)
    assert preprocess.num_tokens(item) == tokens


def test_windows_of_one_sound_follow_each_other() -> None:
    """Each window alone gives the same features as in its place. Measured 3.6e-7; allowed 1e-5."""
    preprocess, encoder = TINY.preprocessor(NO_WEIGHTS), TINY.build(NO_WEIGHTS)
    sound = noise(20_000)
    with torch.no_grad():
        whole, mask = encoder(preprocess.collate([preprocess(sound), preprocess(noise(100))]))
        for index, start in enumerate(range(0, len(sound), 8000)):
            part, _ = encoder(preprocess.collate([preprocess(sound[start : start + 8000])]))
            found = whole[0, 25 * index : 25 * index + part.shape[1]]
            torch.testing.assert_close(found, part[0], atol=1e-5, rtol=0)
    assert mask.sum(1).tolist() == [63, 1]
    assert not whole[1, 1:].any()


def test_ten_minutes_run_in_bounded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess, encoder = TINY.preprocessor(NO_WEIGHTS), TINY.build(NO_WEIGHTS)
    sizes: list[int] = []
    encoder.encoder.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    item = preprocess(noise(600 * RATE))
    with torch.no_grad():
        features, mask = encoder(preprocess.collate([item]))
    assert features.shape == (1, 30_000, 32)
    assert mask.all()
    assert sum(sizes) == 1200
    assert max(sizes) == WINDOWS_PER_CALL


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (np.zeros(0, np.float32), "at least one sample"),
        (np.zeros((2, 100), np.float32), "expected mono"),
        (
            np.zeros(2 * RATE + 1, np.float32),
            "the sound lasts 2.0 seconds, this model takes at most 2; cut it",
        ),
    ],
)
def test_sounds_that_are_refused(sound: np.ndarray[Any, np.dtype[np.float32]], message: str) -> None:
    preprocess = TINY.model_copy(update={"max_seconds": 2.0}).preprocessor(NO_WEIGHTS)
    with pytest.raises(MediaError, match=message):
        preprocess(sound)


def test_openai_sizes() -> None:
    """Parameters of the encoders, counted on openai-whisper's own module on the meta device."""
    from whisper.model import AudioEncoder

    for name, size in SIZES.items():
        with torch.device("meta"):
            numbers = (size.max_source_positions, size.d_model, size.encoder_attention_heads, size.encoder_layers)
            theirs = AudioEncoder(size.num_mel_bins, *numbers)
            ours = WhisperConfig(arch=name).build(NO_WEIGHTS)
        count = sum(p.numel() for p in theirs.parameters()) + theirs.positional_embedding.numel()
        assert sum(p.numel() for p in ours.parameters()) == count, name
    with torch.device("meta"):
        assert WhisperConfig(pretrained="openai/whisper-large-v3").build(NO_WEIGHTS).output_dim == 1280
        assert WhisperConfig(pretrained="openai/whisper-tiny.en").build(NO_WEIGHTS).output_dim == 384


def test_contradictions() -> None:
    with pytest.raises(ValidationError, match="found `arch` and `architecture`"):
        WhisperConfig(arch="tiny", architecture=TINY.architecture)
    with pytest.raises(ValidationError, match="give `pretrained`, or `arch`"):
        WhisperConfig()
    with pytest.raises(ValidationError, match="5 heads do not divide d_model 384"):
        WhisperConfig.model_validate({"architecture": {"encoder_attention_heads": 5}})
    with pytest.raises(ConfigError, match="select_layer: found -5, expected -4 to -1"):
        WhisperConfig(arch="tiny", select_layer=-5).build(NO_WEIGHTS)
    with pytest.raises(ConfigError, match="unknown for 'someone/whisper'"):
        WhisperConfig(pretrained="someone/whisper").build(NO_WEIGHTS)


# Checkpoints that do not fit ------------------------------------------------------------------------------------------
def write_openai(path: Path, **changes: Any) -> None:
    from whisper.model import AudioEncoder

    dims = {"n_mels": 16, "n_audio_ctx": 25, "n_audio_state": 32, "n_audio_head": 2, "n_audio_layer": 2}
    encoder = AudioEncoder(16, 25, 32, 2, 2)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({"dims": dims, "model_state_dict": state} | changes, path)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_a_pickle_with_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_openai(tmp_path / "bad.pt", extra=Malicious())
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Malicious()))
    for name in ("bad.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match=r"cannot read .* as an openai-whisper checkpoint"):
            WhisperConfig(pretrained=f"./{name}").build(BuildContext(root=tmp_path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": {"n_mels": 16}}, "has no `dims` with"),
        ({"model_state_dict": [1]}, "has no `model_state_dict` of tensors"),
        ({"model_state_dict": {}}, "has 0 encoder blocks, expected 2"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_openai(tmp_path / "other.pt", **changes)
    with pytest.raises(CheckpointError, match=message):
        WhisperConfig(pretrained="./other.pt").build(BuildContext(root=tmp_path))


def test_declared_numbers_are_checked(tmp_path: Path) -> None:
    write_openai(tmp_path / "tiny.pt")
    context = BuildContext(root=tmp_path)
    assert isinstance(WhisperConfig(pretrained="./tiny.pt").build(context), WhisperEncoder)
    config = WhisperConfig(pretrained="./tiny.pt", architecture=TINY.architecture)
    with pytest.raises(
        CheckpointError, match="encoder_layers: 3 in the YAML, 2 in the checkpoint; encoder_ffn_dim: 64 in"
    ):
        config.build(context)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    with pytest.raises(CheckpointError, match=r"found model_type 'wav2vec2' in .*, expected a transformers Whisper"):
        WhisperConfig(pretrained=str(tmp_path)).build(BuildContext())
    numbers = TINY.architecture.model_dump() if TINY.architecture else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "whisper"} | numbers))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin, but pytorch_model\.bin is a pickle"):
        WhisperConfig(pretrained=str(tmp_path)).build(BuildContext())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"hop_length": 80}))
    with pytest.raises(CheckpointError, match="has hop_length 80, expected 160"):
        WhisperConfig(pretrained=str(tmp_path)).preprocessor(BuildContext())
