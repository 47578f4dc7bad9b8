"""What encoders of sounds share: the check of what was decoded, windows in a batch, and Kaldi's log-mel filter bank."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.errors import MediaError

RATE = 16_000  # Hz, of the filter bank
WINDOW, HOP, N_FFT = 400, 160, 512  # samples: 25 ms, 10 ms, the next power of two
PREEMPHASIS = 0.97

Samples = np.ndarray[Any, np.dtype[np.float32]]


def check_sound(media: Samples, rate: int, max_seconds: float, kind: str) -> None:
    """Raises ``MediaError`` when the sound is empty, has several channels or is longer than ``max_seconds``."""
    if media.ndim != 1 or not len(media):
        raise MediaError(f"found samples of shape {media.shape}, expected mono with at least one sample")
    if len(media) > max_seconds * rate:
        raise MediaError(
            f"the sound lasts {len(media) / rate:.1f} seconds, this model takes at most {max_seconds:g}; "
            f"cut it (or train with a larger `max_seconds` of the {kind} encoder)"
        )


def place_windows(lengths: Tensor, windows: Tensor, positions: int) -> dict[str, Tensor]:
    """Where the features of N sounds stand among those of all their windows, one sound after the other.

    ``lengths (N,)`` features of ``windows (N,)`` windows of ``positions`` each. ``index`` (N, S) int64 into the features of
    all windows, ``mask`` (N, S) bool.
    """
    starts = (windows.cumsum(0) - windows) * positions
    steps = torch.arange(int(lengths.max()))
    mask = steps[None] < lengths[:, None]
    return {"index": (starts[:, None] + steps[None]).masked_fill(~mask, 0), "mask": mask}


def mel_bank(bins: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Kaldi's triangular filters (257, bins) from 20 Hz to half the rate, on the mel scale ``1127 ln(1 + f / 700)``."""
    from transformers.audio_utils import mel_filter_bank

    with warnings.catch_warnings():
        # Of 128 filters the lowest are narrower than the spectrum's steps and hold nothing: so it is in the reference.
        warnings.filterwarnings("ignore", message="At least one mel filter")
        bank = mel_filter_bank(
            N_FFT // 2 + 1, bins, 20, RATE / 2, RATE, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
        )
    return np.asarray(bank, dtype=np.float32)


def hann() -> Tensor:
    """The symmetric Hann window (400,)."""
    return torch.hann_window(WINDOW, periodic=False)


def povey() -> Tensor:
    """Kaldi's own window (400,), ``hann ** 0.85``."""
    return hann() ** 0.85


def filter_bank(wave: Tensor, bank: Tensor, window: Tensor) -> Tensor:
    """Log-mel energies ``(frames, bins)`` of ``wave (T,)``: Kaldi's ``fbank`` without dither (feature-window.cc).

    Each stretch of 25 ms loses its mean, is pre-emphasised and weighted with ``window``; power spectrum; energies are at
    least float32's epsilon. Stretches that would reach over the end are left out; a wave shorter than one is padded.
    """
    wave = F.pad(wave, (0, max(WINDOW - len(wave), 0)))
    frames = wave.unfold(0, WINDOW, HOP)
    frames = frames - frames.mean(dim=1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    frames = (frames - PREEMPHASIS * before) * window
    power = torch.fft.rfft(frames, N_FFT).abs() ** 2
    energies: Tensor = power @ bank
    return energies.clamp(min=torch.finfo(torch.float32).eps).log()
