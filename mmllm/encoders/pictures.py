"""What encoders of pictures share: tensors of one size, where features lie on the picture, and ways to make it a square."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor


class PicturePreprocessor(ABC):
    """Pictures (RGB ``PIL.Image``) to float32 tensors. Deterministic, picklable, no weights."""

    media = "image"

    def __init__(self) -> None:
        self.decode_options: dict[str, Any] = {}

    @abstractmethod
    def __call__(self, media: Image.Image) -> dict[str, Tensor]: ...

    @abstractmethod
    def num_tokens(self, item: dict[str, Tensor]) -> int: ...

    @abstractmethod
    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]: ...

    @abstractmethod
    def grid(self, item: dict[str, Tensor]) -> tuple[int, ...] | None:
        """``(rows, cols)`` of this picture's features, row by row; None where they are not such a grid."""


class SquarePreprocessor(PicturePreprocessor):
    """One size for all pictures: ``pixels`` (3, H, W), collated (N, 3, H, W); always ``tokens`` features.

    ``shape`` is their grid, if they lie on one.
    """

    def __init__(
        self, transform: Callable[[Image.Image], Tensor], tokens: int, shape: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.transform, self.tokens, self.shape = transform, tokens, shape

    def __call__(self, media: Image.Image) -> dict[str, Tensor]:
        return {"pixels": self.transform(media)}

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        return self.tokens

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"pixels": torch.stack([item["pixels"] for item in items])}

    def grid(self, item: dict[str, Tensor]) -> tuple[int, ...] | None:
        return self.shape


def grid_of(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """``(rows, cols)`` of ``tokens`` patches of equal height and width on ``size`` (height, width); None if they have none."""
    rows = max(1, round(math.sqrt(tokens * size[0] / size[1])))
    return (rows, tokens // rows) if tokens % rows == 0 else None


def not_narrow(picture: Image.Image, most: int = 64) -> Image.Image:
    """The middle of a picture that is longer than ``most`` times its width: for what resizes to the shorter side and crops
    the centre, so that what is cropped away need not be enlarged.
    """
    width, height = picture.size
    longest = most * min(width, height)
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return picture.crop((left, top, width - left, height - top)) if left or top else picture


def square_transform(
    fit: Literal["crop", "pad", "squash"],
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
) -> Callable[[Image.Image], Tensor]:
    """open_clip's transform to ``(3, *size)``: the centre, the whole picture on the mean colour, or distorted.

    ``interpolation`` is bicubic or bilinear; ``mean`` and ``std`` are for values in 0-1.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2

    modes = {"crop": "shortest", "pad": "longest", "squash": "squash"}
    fill = tuple(round(255 * value) for value in mean) if fit == "pad" else 0
    settings = PreprocessCfg(
        size=size,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=interpolation,
        resize_mode=modes[fit],
        fill_color=fill,
    )
    transform: Callable[[Image.Image], Tensor] = image_transform_v2(settings, is_train=False)
    return transform
