"""What CLAP's tower reads: log-mel spectrograms as of transformers' ``ClapFeatureExtractor``, without its chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.encoders.clap import KNOWN, SOUND, ClapArchitecture, ClapConfig
from mmllm.encoders.numbers import agreed_numbers, extractor_settings
from mmllm.encoders.sounds import Samples, check_sound, place_windows
from mmllm.errors import CheckpointError, ConfigError
from mmllm.pretrained import find, read_json

VIEWS = 4  # of a long sound in fusion: the whole, and three stretches
# Values that every published checkpoint has and the tower here takes for granted.
FIXED = {"hidden_act": "gelu", "projection_hidden_act": "relu", "patch_embed_input_channels": 1, "fusion_type": None}


class ClapPreprocessor:
    """Mono float32 samples to log-mel windows in dB; deterministic, picklable, no weights.

    An item is ``mels`` (W, C, T, F) float32, one row per window, and ``longer`` (W,) bool, whether the C = 4 views of it
    (fusion) differ; C is 1 otherwise. Collated: both of all sounds one after the other; ``index`` (N, S) int64, where in the
    W * P features of all windows each feature of a sound stands; ``mask`` (N, S) bool.
    """

    media = "audio"

    def __init__(self, numbers: ClapArchitecture, config: ClapConfig) -> None:
        from transformers.audio_utils import mel_filter_bank, window_function

        self.decode_options: dict[str, Any] = {"sample_rate": numbers.sampling_rate}
        self.numbers, self.long, self.max_seconds = numbers, config.long, config.max_seconds
        self.positions = numbers.grid**2 if config.output == "sequence" else 1
        slaney = numbers.truncation == "rand_trunc"
        self.filters = mel_filter_bank(
            numbers.fft_window_size // 2 + 1,
            numbers.num_mel_bins,
            numbers.frequency_min,
            numbers.frequency_max,
            numbers.sampling_rate,
            norm="slaney" if slaney else None,
            mel_scale="slaney" if slaney else "htk",
        )
        self.hann = window_function(numbers.fft_window_size, "hann")

    def __call__(self, media: Samples) -> dict[str, Tensor]:
        """Raises ``MediaError``, see ``check_sound``."""
        check_sound(media, self.numbers.sampling_rate, self.max_seconds, "clap")
        if self.long == "fusion":
            return self._fused(media)
        mels = torch.stack([self._mel(window) for window in self._windows(media)])
        return {"mels": mels[:, None], "longer": torch.zeros(len(mels), dtype=torch.bool)}

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        return len(item["mels"]) * self.positions

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        windows = torch.tensor([len(item["mels"]) for item in items])
        views = {name: torch.cat([item[name] for item in items]) for name in ("mels", "longer")}
        return views | place_windows(windows * self.positions, windows, self.positions)

    def _windows(self, media: Samples) -> list[Samples]:
        size = self.numbers.window
        room = len(media) - size
        if room <= 0:
            return [self._filled(media)]
        if self.long == "crop":
            return [media[room // 2 : room // 2 + size]]
        last = -(-len(media) // size) - 1  # at least 1
        return [media[k * room // last : k * room // last + size] for k in range(last + 1)]

    def _filled(self, media: Samples) -> Samples:
        """A sound of at most a window, made as long as one."""
        size, times = self.numbers.window, self.numbers.window // len(media)
        if self.numbers.padding == "repeat":
            return np.tile(media, times + 1)[:size]
        if self.numbers.padding == "repeatpad":
            media = np.tile(media, times)
        return np.pad(media, (0, size - len(media)))

    def _mel(self, wave: Samples) -> Tensor:
        """Power spectra through the mel filters, in dB: ``(T, F)``."""
        from transformers.audio_utils import spectrogram

        size, hop = self.numbers.fft_window_size, self.numbers.hop_length
        found = spectrogram(wave, self.hann, size, hop, power=2.0, mel_filters=self.filters, log_mel="dB")
        return torch.from_numpy(found.T.astype(np.float32))

    def _fused(self, media: Samples) -> dict[str, Tensor]:
        """The whole, shrunk to a window's spectra, and three stretches of it; a sound of one window four times."""
        frames = self.numbers.frames
        mel = self._mel(self._filled(media) if len(media) <= self.numbers.window else media)
        longer = len(mel) > frames
        views = mel.expand(VIEWS, -1, -1)
        if longer:
            size = (frames, self.numbers.num_mel_bins)
            shrunk = F.interpolate(mel[None, None], size, mode="bilinear", align_corners=False)[0, 0]
            thirds = np.array_split(np.arange(len(mel) - frames + 1), VIEWS - 1)
            starts = [int(third[len(third) // 2]) if len(third) else 0 for third in thirds]
            views = torch.stack([shrunk, *(mel[start : start + frames] for start in starts)])
        return {"mels": views[None].contiguous(), "longer": torch.tensor([longer])}


def make_preprocessor(config: ClapConfig, context: BuildContext) -> ClapPreprocessor:
    """See ``ClapConfig.preprocessor``."""
    return ClapPreprocessor(read_numbers(config, context), config)


def read_numbers(config: ClapConfig, context: BuildContext) -> ClapArchitecture:
    """The architecture, from the YAML or the checkpoint; see ``agreed_numbers``."""
    numbers = agreed_numbers(
        "clap",
        config.pretrained,
        context,
        declared=config.architecture,
        known=KNOWN.get(config.pretrained or ""),
        read=lambda reference: _read_checkpoint(reference, config),
    )
    if config.long == "fusion" and not numbers.enable_fusion:
        text = "found fusion, but the checkpoint was made without (enable_fusion: false); choose windows or crop"
        raise ConfigError([("long", text)], "clap encoder")
    return numbers


def _read_checkpoint(reference: str, config: ClapConfig) -> ClapArchitecture:
    path = find(reference, config.revision, ["config.json"])
    content = read_json(path) if path is not None else {}
    if content.get("model_type") not in ("clap", "clap_audio_model"):
        raise CheckpointError(
            f"found model_type {content.get('model_type')!r} in {reference}, expected a transformers CLAP checkpoint"
        )
    above = {name: content[name] for name in ("projection_dim", "projection_hidden_act") if name in content}
    tower = content.get("audio_config", content) | above
    for name, value in FIXED.items():
        if tower.get(name, value) != value:
            raise CheckpointError(f"{path} has {name} {tower[name]!r}, expected {value!r} as in every published CLAP")
    sound = extractor_settings(reference, config.revision)
    bins = {tower.get("num_mel_bins", 64), sound.get("feature_size", tower.get("num_mel_bins", 64))}
    if len(bins) > 1:
        raise CheckpointError(f"the tower and the extractor in {reference} have different mel bins: {sorted(bins)}")
    if not sound and config.architecture is not None:  # nothing beside the weights says it
        sound = config.architecture.model_dump(include=SOUND)
    fields = {name: tower[name] for name in ClapArchitecture.model_fields if name in tower}
    fields |= {name: sound[name] for name in SOUND if name in sound}
    for name in ("patch_size", "patch_stride"):
        sides = fields.get(name)
        if isinstance(sides, list) and len(set(sides)) == 1:
            fields[name] = sides[0]
    try:
        return ClapArchitecture.model_validate(fields)
    except ValueError as error:
        raise CheckpointError(f"{path} describes a CLAP that cannot be built: {error}") from error
