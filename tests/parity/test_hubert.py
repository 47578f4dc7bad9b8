"""The hubert encoder equals transformers' feature extractor and HubertModel, Wav2Vec2Model and WavLMModel.

Float32, CPU, tiny random checkpoints written by ``save_pretrained``. Each tolerance stands beside the largest difference
seen when it was set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmllm.config.base import BuildContext
from mmllm.encoders.hubert import HubertConfig

LAYERS = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True},
}


def make(name: str, folder: Path, *, normalize: bool = True, **numbers: Any) -> tuple[Any, Any]:
    """The reference extractor and model, saved."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, name)
    given = {
        "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48,
        "conv_dim": (24,) * 3, "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2), "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4, "hidden_dropout": 0.3, "layerdrop": 0.3, "initializer_range": 0.2,
    }  # fmt: skip
    built = model(model.config_class(**(given | numbers))).eval()
    with torch.no_grad():
        for key, value in built.named_parameters():  # biases and norms start at trivial values
            if value.ndim == 1 or "rel_attn" in key:
                value += 0.3 * torch.randn_like(value)
        for key, value in built.named_buffers():
            if "running" in key:
                value += 0.3 * torch.rand_like(value)
    built.save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize)
    extractor.save_pretrained(folder)
    return extractor, built


def sounds() -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    rng = np.random.default_rng(1)
    return [(0.02 + 0.3 * rng.normal(0, 1, size)).astype(np.float32) for size in (3000, 45, 9001, 1)]


def ours(folder: Path, **options: Any) -> list[torch.Tensor]:
    """The real features of each of ``sounds()``, all in one batch."""
    config = HubertConfig.model_validate({"pretrained": str(folder), **options})
    preprocess = config.preprocessor(BuildContext())
    items = [preprocess(sound) for sound in sounds()]
    with torch.no_grad():
        features, mask = config.build(BuildContext())(preprocess.collate(items))
    assert mask.sum(1).tolist() == [preprocess.num_tokens(item) for item in items]
    assert not features[~mask].any()
    return [row[real] for row, real in zip(features, mask, strict=True)]


def check(extractor: Any, model: Any, folder: Path) -> None:
    """A whole batch against the reference on each sound alone, at every layer."""
    found = {layer: ours(folder, select_layer=layer) for layer in range(-LAYERS, 0)}
    for index, sound in enumerate(sounds()):
        # The reference's own padding: zeros behind the normalised samples, up to what the convolutions need.
        size = {"padding": "max_length", "max_length": max(len(sound), 30)}
        values = extractor(sound, sampling_rate=16_000, return_attention_mask=True, **size)
        with torch.no_grad():
            seen = model(torch.tensor(np.array(values["input_values"])), output_hidden_states=True)
        for layer, features in found.items():
            expected = seen.last_hidden_state if layer == -1 else seen.hidden_states[layer]
            torch.testing.assert_close(features[index], expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["HubertModel", "Wav2Vec2Model", "WavLMModel"])
def test_every_sound_of_a_batch_is_as_alone(name: str, variant: str, tmp_path: Path) -> None:
    """Measured 4.3e-6; allowed 1e-5."""
    check(*make(name, tmp_path, **VARIANTS[variant]), tmp_path)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("HubertForCTC", {"vocab_size": 7}),
        ("WavLMForXVector", {}),
        ("HubertModel", {"conv_pos_batch_norm": True, "feat_proj_layer_norm": False}),
        ("HubertModel", {"mask_time_prob": 0.0, "hidden_act": "relu", "layer_norm_eps": 1e-3}),
        ("WavLMModel", {"num_buckets": 20, "max_bucket_distance": 60}),
    ],
)
def test_other_checkpoints(name: str, numbers: dict[str, Any], tmp_path: Path) -> None:
    """Heads are left out; numbers come from the files. Measured 6.8e-6; allowed 1e-5."""
    extractor, model = make(name, tmp_path, normalize=False, **numbers)
    check(extractor, model.base_model, tmp_path)


def test_a_padded_batch_of_the_reference_with_its_mask(tmp_path: Path) -> None:
    """Where the reference itself says that a mask is to be used. Measured 1.2e-6; allowed 1e-5."""
    extractor, model = make("HubertModel", tmp_path, **VARIANTS["large"])
    chosen = [0, 2]
    inputs = extractor(
        [sounds()[i] for i in chosen],
        sampling_rate=16_000,
        padding=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    found = ours(tmp_path)
    for row, index in zip(expected, chosen, strict=True):
        torch.testing.assert_close(found[index], row[: len(found[index])], atol=1e-5, rtol=0)


def test_names_of_older_checkpoints(tmp_path: Path) -> None:
    """``weight_g`` and ``weight_v``, as published. Measured 0; allowed 0."""
    from safetensors.torch import load_file, save_file

    make("HubertModel", tmp_path)
    expected = ours(tmp_path)
    start = "encoder.pos_conv_embed.conv."
    names = {f"{start}parametrizations.weight.original{i}": f"{start}weight_{half}" for i, half in enumerate("gv")}
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(names) <= set(tensors)
    save_file({names.get(name, name): value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    for a, b in zip(ours(tmp_path), expected, strict=True):
        assert torch.equal(a, b)
