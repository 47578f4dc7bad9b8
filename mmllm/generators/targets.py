"""Targets of generators: decoded media as the tensors that ``Generator.denoising_loss`` takes. Run by data workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class ImageTarget:
    """``(3, height, width)`` float32 in [-1, 1], scaled to the generator's size without keeping the aspect ratio."""

    media = "image"

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.decode_options: dict[str, Any] = {}

    def __call__(self, media: Image.Image) -> Tensor:
        pixels = media.convert("RGB").resize((self.width, self.height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(pixels, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


class MelTarget:
    """``(1, frames, bins)`` float32: the log-mel spectrogram that AudioLDM's autoencoder takes.

    Slaney mel bands up to 8 kHz (or half the rate) over magnitudes of 1024-sample Hann windows, natural logarithm, at least
    1e-5: `audioldm_train/utilities/audio/stft.py` of AudioLDM's authors, HiFi-GAN's own front end. A sound is cut or filled
    up with silence at its end.
    """

    media = "audio"

    def __init__(self, rate: int, hop: int, frames: int, bins: int) -> None:
        from transformers.audio_utils import mel_filter_bank

        self.hop, self.frames = hop, frames
        self.window = 1024 if hop >= 64 else 16 * hop
        self.decode_options: dict[str, Any] = {"sample_rate": rate}
        bank = mel_filter_bank(self.window // 2 + 1, bins, 0, min(8000, rate / 2), rate, "slaney", "slaney")
        self.bank = torch.from_numpy(np.asarray(bank, dtype=np.float32))

    def __call__(self, media: np.ndarray[Any, np.dtype[np.float32]]) -> Tensor:
        wave = _fitted(torch.from_numpy(media), self.frames * self.hop)
        edge = (self.window - self.hop) // 2
        padded = torch.nn.functional.pad(wave[None], (edge, self.window - self.hop - edge), mode="reflect")[0]
        spectrum = torch.stft(
            padded, self.window, self.hop, window=torch.hann_window(self.window), center=False, return_complex=True
        )
        mel = spectrum.abs().T @ self.bank
        return mel.clamp(min=1e-5).log()[None, : self.frames]


class WaveTarget:
    """``(channels, samples)`` float32: the wave itself, cut or filled up with silence at its end."""

    media = "audio"

    def __init__(self, rate: int, samples: int, channels: int) -> None:
        self.samples, self.channels = samples, channels
        self.decode_options: dict[str, Any] = {"sample_rate": rate}

    def __call__(self, media: np.ndarray[Any, np.dtype[np.float32]]) -> Tensor:
        return _fitted(torch.from_numpy(media), self.samples).expand(self.channels, -1).clone()


def _fitted(wave: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(wave[:length], (0, max(0, length - len(wave))))


class VideoTarget:
    """``(3, frames, height, width)`` float32 in [-1, 1]: ``frames`` pictures spread evenly over the clip."""

    media = "video"

    def __init__(self, width: int, height: int, frames: int) -> None:
        self.picture, self.frames = ImageTarget(width, height), frames
        self.decode_options: dict[str, Any] = {"frames": frames}

    def __call__(self, media: Sequence[Image.Image]) -> Tensor:
        places = np.linspace(0, len(media) - 1, self.frames).round().astype(int)
        return torch.stack([self.picture(media[place]) for place in places], dim=1)
