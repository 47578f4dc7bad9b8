"""The clap encoder equals transformers' ClapFeatureExtractor and ClapModel.

Float32, CPU, tiny random checkpoints written by ``save_pretrained``. Where the reference draws by chance, it is made to draw
what mmllm takes. Each tolerance stands beside the largest difference seen when it was set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmllm.config.base import BuildContext
from mmllm.encoders.clap import ClapConfig

RATE, SECONDS = 8000, 2
WINDOW = RATE * SECONDS
# 64 mel bins, since the reference shrinks to that number whatever the tower reads
TOWER: dict[str, Any] = {
    "spec_size": 128, "num_mel_bins": 64, "patch_size": 8, "patch_stride": [8, 8], "patch_embeds_hidden_size": 16,
    "depths": [2, 2], "num_attention_heads": [2, 4], "window_size": 4, "hidden_size": 32, "aff_block_r": 2,
    "hidden_dropout_prob": 0.3,
}  # fmt: skip
SOUND: dict[str, Any] = {
    "feature_size": 64, "sampling_rate": RATE, "hop_length": 80, "fft_window_size": 512, "max_length_s": SECONDS,
    "frequency_min": 50, "frequency_max": 3000,
}  # fmt: skip


def make(folder: Path, name: str = "ClapModel", fused: bool = False, **sound: Any) -> tuple[Any, Any]:
    """The reference extractor and model, saved. The model's numbers are far from trivial."""
    import transformers

    torch.manual_seed(0)
    tower = transformers.ClapAudioConfig(**TOWER, enable_fusion=fused, projection_dim=24)
    text = {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    whole = transformers.ClapConfig(text_config=text, audio_config=tower.to_dict(), projection_dim=24)
    model = getattr(transformers, name)(whole if name == "ClapModel" else tower).eval()
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                random = 0.3 * torch.randn_like(value)
                value += random.abs() if "running_var" in key else random
    model.save_pretrained(folder)
    extractor = transformers.ClapFeatureExtractor(
        **SOUND, **({"truncation": "fusion" if fused else "rand_trunc"} | sound)
    )
    extractor.save_pretrained(folder)
    return extractor, model


def noise(samples: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(samples).normal(0, 0.2, samples).astype(np.float32)


def ours(folder: Path, sounds: list[Any], **options: Any) -> list[torch.Tensor]:
    """The real features of each sound, all in one batch."""
    config = ClapConfig.model_validate({"pretrained": str(folder), **options})
    preprocess = config.preprocessor(BuildContext())
    items = [preprocess(sound) for sound in sounds]
    with torch.no_grad():
        features, mask = config.build(BuildContext())(preprocess.collate(items))
    assert mask.sum(1).tolist() == [preprocess.num_tokens(item) for item in items]
    return [row[real] for row, real in zip(features, mask, strict=True)]


def theirs(extractor: Any, model: Any, sound: Any, longer: bool = False) -> dict[str, torch.Tensor]:
    """The reference's features of one sound; the reference calls one sound of a batch without a long one long."""
    inputs = extractor(sound, sampling_rate=RATE, return_tensors="pt")
    inputs["is_longer"] = torch.tensor([[longer]])
    with torch.no_grad():
        seen = model.audio_model(**inputs)
        embedding = model.get_audio_features(**inputs).pooler_output
    steps = torch.stack([seen.last_hidden_state[0, :, f, t] for t in range(16) for f in range(4)])
    return {"sequence": steps, "pooled": seen.pooler_output, "embedding": embedding}


@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
@pytest.mark.parametrize("fused", [False, True])
def test_sounds_of_a_window(fused: bool, padding: str, tmp_path: Path) -> None:
    """Both mel filters, all outputs. Measured 3.0e-6; allowed 1e-5."""
    extractor, model = make(tmp_path, fused=fused, padding=padding)
    sounds = [noise(samples) for samples in (WINDOW, WINDOW // 3, 700, 1)]
    cases = [("sequence", "windows"), ("pooled", "windows"), ("embedding", "crop")]
    cases += [("sequence", "fusion")] if fused else []
    expected = [theirs(extractor, model, sound) for sound in sounds]
    for output, long in cases:
        for found, reference in zip(ours(tmp_path, sounds, output=output, long=long), expected, strict=True):
            torch.testing.assert_close(found, reference[output], atol=1e-5, rtol=0)


@pytest.mark.parametrize("samples", [WINDOW + 1, WINDOW + 79, WINDOW + 80, WINDOW + 240, 3 * WINDOW + 17])
def test_fusion_of_a_long_sound(samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stretches that the reference may draw are taken from the middle. Measured 1.2e-7; allowed 1e-5."""
    extractor, model = make(tmp_path, fused=True)
    monkeypatch.setattr(np.random, "choice", lambda places: places[len(places) // 2])
    sounds = [noise(500), noise(samples)]
    for output in ("sequence", "embedding"):
        short, found = ours(tmp_path, sounds, output=output, long="fusion")
        expected = theirs(extractor, model, sounds[1], longer=samples >= WINDOW + 80)[output]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(short, theirs(extractor, model, sounds[0])[output], atol=1e-5, rtol=0)


def test_the_crop_of_a_long_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured 0; allowed 1e-5."""
    extractor, model = make(tmp_path)
    monkeypatch.setattr(np.random, "randint", lambda low, high: (high - 1) // 2)
    (found,) = ours(tmp_path, [noise(2 * WINDOW + 5)], long="crop")
    torch.testing.assert_close(found, theirs(extractor, model, noise(2 * WINDOW + 5))["sequence"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("output", ["sequence", "pooled"])
def test_windows_of_a_long_sound(output: str, tmp_path: Path) -> None:
    """Evenly from start to end, each as the reference has it alone. Measured 2.3e-6; allowed 1e-5."""
    extractor, model = make(tmp_path, fused=True)
    sound = noise(2 * WINDOW + 1001)
    short, found = ours(tmp_path, [noise(9), sound], output=output)
    starts = (0, (WINDOW + 1001) // 2, WINDOW + 1001)
    pieces = [theirs(extractor, model, sound[start : start + WINDOW])[output] for start in starts]
    torch.testing.assert_close(found, torch.cat(pieces), atol=1e-5, rtol=0)
    torch.testing.assert_close(short, theirs(extractor, model, noise(9))[output], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ClapAudioModel", "ClapAudioModelWithProjection"])
def test_other_classes(name: str, tmp_path: Path) -> None:
    """Measured 0; allowed 1e-5."""
    extractor, model = make(tmp_path, name=name)
    inputs = extractor(noise(WINDOW), sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        seen = model(**inputs)
    expected = seen.last_hidden_state[0].permute(2, 1, 0).flatten(0, 1)
    torch.testing.assert_close(ours(tmp_path, [noise(WINDOW)])[0], expected, atol=1e-5, rtol=0)
    if name == "ClapAudioModelWithProjection":
        expected = seen.audio_embeds / seen.audio_embeds.norm()
        torch.testing.assert_close(ours(tmp_path, [noise(WINDOW)], output="embedding")[0], expected, atol=1e-5, rtol=0)
