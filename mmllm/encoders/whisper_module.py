"""Whisper's encoder (transformers' own module underneath), its log-mel windows and its two checkpoint formats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmllm.config.base import BuildContext
from mmllm.encoders.base import Encoder
from mmllm.encoders.numbers import agreed_numbers
from mmllm.encoders.sounds import check_sound, place_windows
from mmllm.encoders.whisper import SIZES, WhisperArchitecture, WhisperConfig
from mmllm.errors import CheckpointError, ConfigError
from mmllm.pretrained import find, load_into, read_json, read_tensors, weight_files

RATE = 16_000  # Hz
HOP, N_FFT = 160, 400  # samples
SAMPLES_PER_FEATURE = 2 * HOP  # the second convolution has stride 2
WINDOWS_PER_CALL = 8  # bounds the memory of a long recording: attention runs over 8 windows at a time


class WhisperPreprocessor:
    """Mono float32 samples at 16 kHz to log-mel windows; deterministic, picklable, no weights.

    An item is ``mels`` (W, M, F) float32, one row per window, and ``length`` (), its real features, int64. Collated:
    ``mels`` of all sounds one after the other; ``index`` (N, S) int64, where in the W*P features of all windows each
    feature of a sound stands; ``mask`` (N, S) bool.
    """

    media = "audio"

    def __init__(self, num_mel_bins: int, positions: int, max_seconds: float) -> None:
        from transformers import WhisperFeatureExtractor

        self.decode_options: dict[str, Any] = {"sample_rate": RATE}
        self.positions, self.max_seconds = positions, max_seconds
        self.extractor = WhisperFeatureExtractor(num_mel_bins, RATE, HOP, n_fft=N_FFT)

    def __call__(self, media: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, Tensor]:
        """Raises ``MediaError``, see ``check_sound``."""
        check_sound(media, RATE, self.max_seconds, "whisper")
        window = self.positions * SAMPLES_PER_FEATURE
        windows = [media[start : start + window] for start in range(0, len(media), window)]
        mels = self.extractor(
            windows, sampling_rate=RATE, padding="max_length", max_length=window, return_tensors="pt"
        ).input_features
        return {"mels": mels, "length": torch.tensor(math.ceil(len(media) / SAMPLES_PER_FEATURE))}

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        return int(item["length"])

    def grid(self, item: dict[str, Tensor]) -> tuple[int, ...] | None:
        return (int(item["length"]),)

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        lengths = torch.stack([item["length"] for item in items])
        windows = torch.tensor([len(item["mels"]) for item in items])
        places = place_windows(lengths, windows, self.positions)
        return {"mels": torch.cat([item["mels"] for item in items])} | places


class WhisperEncoder(Encoder):
    """transformers' ``WhisperEncoder`` without the blocks after the selected one."""

    def __init__(self, numbers: WhisperArchitecture, select_layer: int) -> None:
        from transformers import WhisperConfig as Numbers
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as Reference

        super().__init__()
        blocks = numbers.encoder_layers + 1 + select_layer
        if blocks < 1:
            expected = f"-{numbers.encoder_layers} to -1"
            raise ConfigError([("select_layer", f"found {select_layer}, expected {expected}")], "whisper encoder")
        # The special tokens belong to the decoder; zeros keep transformers from warning about ids it never sees.
        unused = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
        self.encoder = Reference(Numbers(**(numbers.model_dump() | {"encoder_layers": blocks} | unused)))
        if select_layer < -1:
            self.encoder.layer_norm = nn.Identity()
        self.output_dim, self.total = numbers.d_model, numbers.encoder_layers

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``batch`` from ``WhisperPreprocessor.collate``; features (N, S, D), zero on the padding, and their mask."""
        mels = batch["mels"].to(self.encoder.conv1.weight.dtype)
        seen = [self.encoder(part).last_hidden_state for part in torch.split(mels, WINDOWS_PER_CALL)]
        flat = torch.cat(seen).flatten(0, 1)  # (W*P, D)
        mask = batch["mask"]
        return flat[batch["index"]].masked_fill(~mask[..., None], 0), mask

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy the encoder's tensors under transformers' names. Raises ``CheckpointError`` where they do not fit."""
        found = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
        if len(found) != self.total:
            raise CheckpointError(
                f"{source} has {len(found)} encoder blocks, expected {self.total}; correct the numbers"
            )
        load_into(self.encoder, tensors, source)


def make_preprocessor(config: WhisperConfig, context: BuildContext) -> WhisperPreprocessor:
    """See ``WhisperConfig.preprocessor``."""
    numbers = read_numbers(config, context)
    return WhisperPreprocessor(numbers.num_mel_bins, numbers.max_source_positions, config.max_seconds)


def make_encoder(config: WhisperConfig, context: BuildContext) -> WhisperEncoder:
    """See ``WhisperConfig.build``."""
    encoder = WhisperEncoder(read_numbers(config, context), config.select_layer)
    if config.pretrained is not None and context.weights:
        reference = context.resolve(config.pretrained)
        if reference.endswith(".pt"):
            tensors = _from_openai(_read_openai(reference)["model_state_dict"])
        else:
            tensors = read_tensors(weight_files(reference, config.revision, ["model.safetensors"]), [""])
            prefix = next((n.removesuffix("conv1.weight") for n in tensors if n.endswith("conv1.weight")), "")
            tensors = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        encoder.load(tensors, reference)
    return encoder.to(context.dtype).train(False)


def read_numbers(config: WhisperConfig, context: BuildContext) -> WhisperArchitecture:
    """The architecture, from the YAML or the checkpoint; see ``agreed_numbers``."""
    size = (config.pretrained or "").removeprefix("openai/whisper-").removesuffix(".en")
    return agreed_numbers(
        "whisper",
        config.pretrained,
        context,
        declared=SIZES[config.arch] if config.arch else config.architecture,
        known=SIZES.get("large-v1" if size == "large" else size),
        read=lambda reference: _read_checkpoint(reference, config.revision),
    )


def _read_checkpoint(reference: str, revision: str | None) -> WhisperArchitecture:
    if reference.endswith(".pt"):
        dims = _read_openai(reference)["dims"]
        return WhisperArchitecture(
            d_model=dims["n_audio_state"],
            encoder_layers=dims["n_audio_layer"],
            encoder_attention_heads=dims["n_audio_head"],
            encoder_ffn_dim=4 * dims["n_audio_state"],
            num_mel_bins=dims["n_mels"],
            max_source_positions=dims["n_audio_ctx"],
        )
    path = find(reference, revision, ["config.json"])
    content = read_json(path) if path is not None else {}
    if content.get("model_type") != "whisper":
        raise CheckpointError(
            f"found model_type {content.get('model_type')!r} in {reference}, expected a transformers Whisper checkpoint"
        )
    processor = find(reference, revision, ["preprocessor_config.json"])
    sound = read_json(processor) if processor is not None else {}
    for key, value in (("sampling_rate", RATE), ("hop_length", HOP), ("n_fft", N_FFT)):
        if sound.get(key, value) != value:
            raise CheckpointError(f"{processor} has {key} {sound[key]}, expected {value} as in every published Whisper")
    return WhisperArchitecture(**{k: v for k, v in content.items() if k in WhisperArchitecture.model_fields})


def _read_openai(reference: str) -> dict[str, Any]:
    """An openai-whisper checkpoint: ``dims`` and ``model_state_dict``, checked.

    The format is torch's zip archive, so this is the one place that calls ``torch.load``, with ``weights_only=True``:
    torch then builds nothing but tensors and plain containers.
    """
    path = Path(reference)
    if not path.is_file():
        raise CheckpointError(f"found no file {path}; expected an openai-whisper checkpoint, check `pretrained`")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or forbidden file
        raise CheckpointError(
            f"cannot read {path} as an openai-whisper checkpoint: {str(error).splitlines()[0]}"
        ) from error
    names = ("n_audio_state", "n_audio_layer", "n_audio_head", "n_mels", "n_audio_ctx")
    dims = content.get("dims") if isinstance(content, dict) else None
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(dims, dict) or not all(isinstance(dims.get(name), int) for name in names):
        raise CheckpointError(f"{path} has no `dims` with {', '.join(names)}; expected an openai-whisper checkpoint")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} has no `model_state_dict` of tensors; expected an openai-whisper checkpoint")
    return {"dims": dims, "model_state_dict": state}


def _from_openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """openai-whisper's names of the encoder's tensors to transformers'."""
    top = {
        "positional_embedding": "embed_positions.weight",
        "ln_post.weight": "layer_norm.weight",
        "ln_post.bias": "layer_norm.bias",
    }
    parts = {
        "attn.query": "self_attn.q_proj",
        "attn.key": "self_attn.k_proj",
        "attn.value": "self_attn.v_proj",
        "attn.out": "self_attn.out_proj",
        "attn_ln": "self_attn_layer_norm",
        "mlp.0": "fc1",
        "mlp.2": "fc2",
        "mlp_ln": "final_layer_norm",
    }
    renamed = {}
    for full, value in state.items():
        name = full.removeprefix("encoder.")
        if name == full:
            continue
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            renamed[f"layers.{index}.{parts.get(part, part)}.{kind}"] = value
        else:
            renamed[top.get(name, name)] = value
    return renamed
