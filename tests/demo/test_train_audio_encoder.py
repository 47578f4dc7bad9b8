"""The audio encoder's recipe: same numbers as transformers' Whisper, and a run that resumes where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

DEMO = Path(__file__).parents[2] / "demo"
sys.path.insert(0, str(DEMO))
import audio_model
import audio_windows
import train_audio_encoder


@pytest.fixture(scope="module")
def encoder() -> audio_model.Encoder:
    torch.manual_seed(0)
    return audio_model.Encoder("eager").eval()


@pytest.fixture(scope="module")
def mels() -> torch.Tensor:
    return audio_model.LogMel()(0.1 * torch.randn(2, audio_windows.WINDOW, generator=torch.Generator().manual_seed(1)))


def test_log_mel_is_the_feature_extractors() -> None:
    log_mel = audio_model.LogMel()
    waves = np.random.default_rng(0).uniform(-0.5, 0.5, (2, audio_windows.WINDOW)).astype(np.float32)
    waves[1, 30_000:] = 0
    expected = log_mel.extractor(list(waves), sampling_rate=16_000, return_tensors="pt").input_features
    torch.testing.assert_close(log_mel(torch.from_numpy(waves)), expected, atol=1e-5, rtol=0)  # measured: 0


@torch.no_grad()
def test_features_are_the_whisper_encoders(encoder: audio_model.Encoder, mels: torch.Tensor) -> None:
    expected = encoder.whisper.encoder(mels).last_hidden_state
    torch.testing.assert_close(encoder.features(mels), expected, atol=1e-5, rtol=0)  # measured: 0
    assert encoder.features(mels[:, :, :100]).shape == (2, 50, 160)


@torch.no_grad()
def test_heads_start_out_looking_where_they_should(encoder: audio_model.Encoder) -> None:
    whisper = encoder.whisper.encoder
    hidden = whisper.layers[0].self_attn_layer_norm(whisper.embed_positions.weight[None])
    attention = whisper.layers[0].self_attn(hidden, attention_mask=None)[1]  # (1, heads, FRAMES, FRAMES)
    assert (attention[0, :, 100].argmax(-1) - 100).tolist() == list(audio_model.LOOK[0])


@torch.no_grad()
def test_the_exported_folder_loads_in_transformers(
    encoder: audio_model.Encoder, mels: torch.Tensor, tmp_path: Path
) -> None:
    from transformers import WhisperFeatureExtractor, WhisperModel

    train_audio_encoder.export(encoder, audio_model.LogMel(), tmp_path)
    loaded = WhisperModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(loaded.encoder(mels).last_hidden_state, encoder.features(mels), atol=0.05, rtol=0)
    assert WhisperFeatureExtractor.from_pretrained(tmp_path).n_samples == audio_windows.WINDOW
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert (tmp_path / "model.safetensors").stat().st_size < 3_600_000


def test_pooling_takes_the_frames_of_the_clip_only() -> None:
    features = torch.arange(12.0).reshape(2, 6, 1)
    assert audio_model.pool(features, [2, 6]).flatten().tolist() == [0.5, 8.5]


@pytest.mark.parametrize("short", [False, True])
def test_windows_mark_the_clip_where_it_sounds(short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_windows.Window, "noise", lambda *arguments: None)
    clips = [(np.full(8_000, 0.5, np.float32), "seven")]
    for seed in range(20):
        window = audio_windows.digit_window(np.random.default_rng(seed), clips, short)
        marked = np.repeat(window.events[0] != audio_windows.UNKNOWN, audio_windows.FRAME)
        loud = np.abs(window.samples) > 0.7 * np.abs(window.samples).max()
        assert window.facts == {"label": "seven"}
        assert set(window.events[0]) <= {audio_windows.EVENTS.index("seven"), audio_windows.UNKNOWN}
        assert loud[marked].mean() > 0.9
        assert not loud[~marked].any()
        assert not window.samples[window.end :].any()


def write_messages(folder: Path, labels: list[str]) -> None:
    (folder / "audio").mkdir(parents=True)
    rows = []
    for i, label in enumerate(labels):
        samples = (3000 * np.sin(np.arange(12_000) * (0.05 + 0.1 * i))).astype("<i2")
        with wave.open(str(folder / "audio" / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(samples.tobytes())
        content = [{"type": "audio", "path": f"audio/{i}.wav"}, {"type": "text", "text": "?"}]
        answer = [{"type": "text", "text": label}]
        row = {
            "id": str(i),
            "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        }
        rows.append(json.dumps(row))
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "validation.jsonl").write_text(rows[0])


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_messages(tmp_path / "fsdd", ["three", "eight"])
    write_messages(tmp_path / "esc10", ["rain", "rooster"])
    monkeypatch.setattr(train_audio_encoder, "FINAL_PROBE", 20)

    def run(output: str, *more: str) -> dict[str, torch.Tensor]:
        folders = ["--fsdd", str(tmp_path / "fsdd"), "--esc10", str(tmp_path / "esc10")]
        options = ["--output", str(tmp_path / output), "--batch", "4", "--steps", "4", "--device", "cpu", *more]
        train_audio_encoder.train(train_audio_encoder.parse(folders + options))
        return safetensors.torch.load_file(tmp_path / output / "checkpoint.safetensors")

    whole = run("whole")
    # The process dies at the start of the third step; a checkpoint is written after every step.
    monkeypatch.setattr(train_audio_encoder, "CHECKPOINT_SECONDS", 0)
    make_batches, calls = train_audio_encoder.make_batches, []

    def dies(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make_batches(*arguments)

    monkeypatch.setattr(train_audio_encoder, "make_batches", dies)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    monkeypatch.setattr(train_audio_encoder, "make_batches", make_batches)
    resumed = run("cut", "--resume")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    (tmp_path / "cut" / "scores.json").unlink()
    run("cut", "--resume")  # as after an interruption between the last checkpoint and the scores
    scores = json.loads((tmp_path / "cut" / "scores.json").read_text())["scores"]
    assert scores["digits"]["n"] == scores["esc10"]["n"] == 1


def test_help_names_the_folders() -> None:
    done = subprocess.run([sys.executable, DEMO / "train_audio_encoder.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--fsdd" in done.stdout
