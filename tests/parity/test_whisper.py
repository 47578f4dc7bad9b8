"""The whisper encoder equals transformers' and openai-whisper's, from checkpoints of both formats.

Float32, CPU. Each tolerance stands beside the largest difference seen when it was set.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmllm.config.base import BuildContext
from mmllm.encoders.whisper import WhisperConfig

POSITIONS = 50  # one second
WINDOW = POSITIONS * 320
LAYERS = 3


def transformers_config() -> Any:
    import transformers

    return transformers.WhisperConfig(
        d_model=32, encoder_layers=LAYERS, encoder_attention_heads=4, encoder_ffn_dim=128, num_mel_bins=80,
        max_source_positions=POSITIONS, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
        vocab_size=12, max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        dropout=0.1, init_std=0.15,
    )  # fmt: skip


def sounds() -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    rng = np.random.default_rng(1)
    return [rng.normal(0, 0.2, size).astype(np.float32) for size in (WINDOW, WINDOW // 3, 2 * WINDOW + 777)]


def ours(path: str, root: Path, **options: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The real features of each of ``sounds()``, and the batch."""
    config = WhisperConfig(pretrained=path, **options)
    context = BuildContext(root=root)
    preprocess = config.preprocessor(context)
    batch = preprocess.collate([preprocess(sound) for sound in sounds()])
    with torch.no_grad():
        features, mask = config.build(context)(batch)
    return [row[real] for row, real in zip(features, mask, strict=True)], batch


def windows(sound: np.ndarray[Any, np.dtype[np.float32]]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    return [sound[start : start + WINDOW] for start in range(0, len(sound), WINDOW)]


@pytest.mark.parametrize("saved", ["WhisperModel", "WhisperForConditionalGeneration"])
def test_transformers_encoder(tmp_path: Path, saved: str) -> None:
    """Sound to features at every layer, features of the padding left out. Measured 1.4e-6 (another batch size);
    allowed 1e-5."""
    import transformers

    model = getattr(transformers, saved)(transformers_config()).eval()
    model.save_pretrained(tmp_path / "whisper")
    extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
    encoder = model.get_encoder()
    for select_layer in (-1, -2, -3):
        found, _ = ours("./whisper", tmp_path, select_layer=select_layer)
        for sound, features in zip(sounds(), found, strict=True):
            mels = extractor(windows(sound), sampling_rate=16_000, return_tensors="pt").input_features
            with torch.no_grad():
                hidden = encoder(mels, output_hidden_states=True).hidden_states[select_layer].flatten(0, 1)
            expected = hidden[: -(-len(sound) // 320)]
            torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_openai_encoder(tmp_path: Path) -> None:
    """openai-whisper's own mels and encoder. Measured 3.3e-7; allowed 1e-5."""
    import whisper
    from whisper.audio import log_mel_spectrogram
    from whisper.model import ModelDimensions, Whisper

    dims = ModelDimensions(80, POSITIONS, 32, 4, LAYERS, 12, 8, 32, 4, 1)
    model = Whisper(dims).eval()
    for parameter in model.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    assert whisper.audio.N_SAMPLES == 30 * 16_000
    torch.save({"dims": asdict(dims), "model_state_dict": model.state_dict()}, tmp_path / "tiny.pt")
    found, _ = ours("./tiny.pt", tmp_path)
    for sound, features in zip(sounds(), found, strict=True):
        padded = [np.pad(window, (0, WINDOW - len(window))) for window in windows(sound)]
        mels = torch.stack([log_mel_spectrogram(window) for window in padded])
        with torch.no_grad():
            expected = model.encoder(mels).flatten(0, 1)[: -(-len(sound) // 320)]
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_both_formats_of_the_same_weights(tmp_path: Path) -> None:
    """Measured 0; allowed 0."""
    import transformers
    from whisper.model import ModelDimensions, Whisper

    theirs = transformers.WhisperModel(transformers_config())
    theirs.save_pretrained(tmp_path / "whisper")
    dims = ModelDimensions(80, POSITIONS, 32, 4, LAYERS, 12, 8, 32, 4, 1)
    names = {"self_attn.q_proj": "attn.query", "self_attn.k_proj": "attn.key", "self_attn.v_proj": "attn.value"}
    names |= {"self_attn.out_proj": "attn.out", "self_attn_layer_norm": "attn_ln", "fc1": "mlp.0", "fc2": "mlp.2"}
    names |= {"final_layer_norm": "mlp_ln", "layers.": "blocks.", "embed_positions.weight": "positional_embedding"}
    model = Whisper(dims)
    state = model.state_dict()
    for name, value in theirs.encoder.state_dict().items():
        renamed = name if name.startswith("layers.") else name.replace("layer_norm.", "ln_post.")
        for theirs_name, openai_name in names.items():
            renamed = renamed.replace(theirs_name, openai_name)
        assert f"encoder.{renamed}" in state
        state[f"encoder.{renamed}"] = value
    torch.save({"dims": asdict(dims), "model_state_dict": state}, tmp_path / "same.pt")
    for a, b in zip(ours("./whisper", tmp_path)[0], ours("./same.pt", tmp_path)[0], strict=True):
        assert torch.equal(a, b)


def test_log_mel_is_the_feature_extractors(tmp_path: Path) -> None:
    """Measured 0; allowed 0."""
    import transformers

    transformers.WhisperModel(transformers_config()).save_pretrained(tmp_path / "whisper")
    _, batch = ours("./whisper", tmp_path)
    extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
    pieces = [window for sound in sounds() for window in windows(sound)]
    expected = extractor(pieces, sampling_rate=16_000, return_tensors="pt").input_features
    assert torch.equal(batch["mels"], expected)
