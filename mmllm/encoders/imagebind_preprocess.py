"""What ImageBind's trunks read: pictures, films, sounds, text, depth and heat, motion (`imagebind/data.py` of the reference)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmllm.encoders.imagebind import ImageBindArchitecture, ImageBindConfig, Modality
from mmllm.encoders.pictures import not_narrow
from mmllm.encoders.sounds import RATE, filter_bank, hann, mel_bank
from mmllm.errors import MediaError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI CLIP's
SECONDS = 2  # of a stretch of a film or sound
FRAMES = 2  # of a film's stretch
MEL_MEAN, MEL_STD = -4.268, 9.138


class ImageBindPreprocessor(ABC):
    """One medium to ``views`` (M, …) and ``length`` (), its tokens, int64. Deterministic, picklable, no weights.

    Collated: ``views`` (N, M, …) and ``length`` (N,). M is the same for all media of a modality.
    """

    media: str

    def __init__(self, config: ImageBindConfig) -> None:
        self.numbers, self.clips = config.numbers, config.stretches
        self.embeddings = {"pooled": 1, "clips": config.stretches}.get(config.output)  # None: tokens
        self.decode_options: dict[str, Any] = {}

    @abstractmethod
    def views(self, media: Any) -> Tensor:
        """What the trunk reads of one medium, ``(M, …)``."""

    def tokens(self, views: Tensor) -> int:
        """Tokens of one medium's views, class tokens included."""
        return len(views) * (1 + self.numbers.steps(0) * self.numbers.steps(1))

    def __call__(self, media: Any) -> dict[str, Tensor]:
        views = self.views(media)
        return {"views": views, "length": torch.tensor(self.tokens(views))}

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        return int(item["length"]) if self.embeddings is None else self.embeddings

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([item[name] for item in items]) for name in ("views", "length")}


class Pictures(ImageBindPreprocessor):
    """Bicubic to the shorter side, centre crop, CLIP's mean and deviation; as two equal frames ``(1, 3, 2, H, W)``."""

    media = "image"

    def views(self, media: Image.Image) -> Tensor:
        from torchvision.transforms.functional import normalize, to_tensor

        pixels = normalize(to_tensor(_square(media.convert("RGB"), self.numbers)), MEAN, STD)
        views: Tensor = pixels[None, :, None].repeat(1, 1, FRAMES, 1, 1)
        return views


class Films(ImageBindPreprocessor):
    """Stretches of two frames, bilinear to the shorter side, cropped left, centre and right (or above and below):
    ``(3 * clips, 3, 2, H, W)``, the crops of a stretch one after the other.
    """

    media = "video"

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__(config)
        self.decode_options = {"frames": FRAMES, "clips": self.clips, "seconds": float(SECONDS)}

    def views(self, media: Sequence[Image.Image]) -> Tensor:
        """Raises ``MediaError`` unless there are ``clips * FRAMES`` pictures."""
        if len(media) != self.clips * FRAMES:
            raise MediaError(f"found {len(media)} frames, expected {self.clips} stretches of {FRAMES}")
        side = self.numbers.size[0]
        frames = np.stack([np.asarray(not_narrow(picture.convert("RGB"))) for picture in media])
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        height, width = pixels.shape[2:]
        short = min(height, width)
        size = (height * side // short, width * side // short)
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        films = pixels.view(self.clips, FRAMES, 3, *size).transpose(1, 2)  # (clips, 3, 2, h, w)
        return torch.stack([_crop(films, side, place) for place in range(3)], dim=1).flatten(0, 1)


class Sounds(ImageBindPreprocessor):
    """Kaldi's log-mel filter bank of stretches of two seconds: ``(clips, 1, bins, frames)``.

    A sound shorter than a stretch is every stretch; frames that it lacks are zero, as in the reference. Shorter than one
    window (25 ms) it is filled up with silence first, where the reference fails.
    """

    media = "audio"

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__(config)
        self.decode_options = {"sample_rate": RATE}
        self.bank = torch.from_numpy(mel_bank(self.numbers.size[0]))

    def views(self, media: np.ndarray[Any, np.dtype[np.float32]]) -> Tensor:
        """Raises ``MediaError`` unless the samples are mono and there is at least one."""
        if media.ndim != 1 or not len(media):
            raise MediaError(f"found samples of shape {media.shape}, expected mono with at least one sample")
        wave, length = torch.from_numpy(media), SECONDS * RATE
        room = max(len(wave) - length, 0)
        starts = [k * room // max(self.clips - 1, 1) for k in range(self.clips)]
        return torch.stack([self._mel(wave[start : start + length]) for start in starts])[:, None]

    def _mel(self, wave: Tensor) -> Tensor:
        frames = self.numbers.size[1]
        mel = filter_bank(wave - wave.mean(), self.bank, hann()).T[:, :frames]
        return (F.pad(mel, (0, frames - mel.shape[1])) - MEL_MEAN) / MEL_STD


class Texts(ImageBindPreprocessor):
    """CLIP's byte pairs between start and end token, zeros behind them: ``(1, positions)`` int64."""

    media = "text"

    def __init__(self, config: ImageBindConfig) -> None:
        import open_clip

        super().__init__(config)
        # open_clip's tokenizer has CLIP's vocabulary, and cuts a long text before its end token.
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.numbers.size[1])

    def views(self, media: str) -> Tensor:
        found: Tensor = self.tokenizer([media])
        return found

    def tokens(self, views: Tensor) -> int:
        return int(views[0].argmax()) + 1


class Maps(ImageBindPreprocessor):
    """Grey pictures of depth or heat in [0, 1]: ``(1, 1, H, W)``. The reference publishes no preprocessing for these."""

    media = "image"

    def views(self, media: Image.Image) -> Tensor:
        from torchvision.transforms.functional import to_tensor

        found: Tensor = to_tensor(_square(media.convert("L"), self.numbers))
        return found[None]


class Motion(ImageBindPreprocessor):
    """Accelerometer and gyroscope, ``(C, T)``, cut or filled up with zeros at the end: ``(1, C, samples)``."""

    media = "imu"

    def views(self, media: Any) -> Tensor:
        """Raises ``MediaError`` for another number of channels."""
        values = torch.as_tensor(media, dtype=torch.float32)
        channels, samples = self.numbers.size
        if values.ndim != 2 or len(values) != channels or not values.shape[1]:
            raise MediaError(f"found values of shape {tuple(values.shape)}, expected ({channels}, samples)")
        return F.pad(values[:, :samples], (0, max(samples - values.shape[1], 0)))[None]

    def tokens(self, views: Tensor) -> int:
        return 1 + self.numbers.steps(1)


PREPROCESSORS: dict[Modality, Callable[[ImageBindConfig], ImageBindPreprocessor]] = {
    "image": Pictures,
    "video": Films,
    "audio": Sounds,
    "text": Texts,
    "depth": Maps,
    "thermal": Maps,
    "imu": Motion,
}


def make_preprocessor(config: ImageBindConfig) -> ImageBindPreprocessor:
    """See ``ImageBindConfig.preprocessor``."""
    return PREPROCESSORS[config.modality](config)


def _square(picture: Image.Image, numbers: ImageBindArchitecture) -> Image.Image:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    found = resize(not_narrow(picture), numbers.size[0], InterpolationMode.BICUBIC)
    cropped: Image.Image = center_crop(found, list(numbers.size))
    return cropped


def _crop(pixels: Tensor, side: int, place: int) -> Tensor:
    """The left (upper), middle or right (lower) square of ``(…, H, W)``; rounding as the reference's ``uniform_crop``."""
    height, width = pixels.shape[-2:]
    top, left = math.ceil((height - side) / 2), math.ceil((width - side) / 2)
    if height > width:
        top = (0, top, height - side)[place]
    else:
        left = (0, left, width - side)[place]
    return pixels[..., top : top + side, left : left + side]
