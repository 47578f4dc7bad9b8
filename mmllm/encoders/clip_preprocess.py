"""Pictures to tensors for the ``clip`` encoder at the picture's own aspect ratio."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from mmllm.encoders.pictures import PicturePreprocessor
from mmllm.encoders.vit import fit_grid, patchify, resize_to_grid


class NativePreprocessor(PicturePreprocessor):
    """The picture's own aspect ratio: ``patches`` (S, 3*p*p) and ``grid`` (2,) rows and cols.

    Collated ``patches`` (N, S_max, 3*p*p), zeros on the padding, and ``grids`` (N, 2).
    """

    def __init__(
        self, patch: int, patches: tuple[int, int], extra: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.patch, self.extra = patch, extra
        self.min_patches, self.max_patches = patches
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, media: Image.Image) -> dict[str, Tensor]:
        from torchvision.transforms.functional import normalize, to_tensor

        rows, cols = fit_grid(*media.size, self.patch, self.max_patches, self.min_patches)
        pixels = normalize(to_tensor(resize_to_grid(media.convert("RGB"), rows, cols, self.patch)), self.mean, self.std)
        return {"patches": patchify(pixels, self.patch), "grid": torch.tensor([rows, cols])}

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        return self.extra + len(item["patches"])

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        patches = nn.utils.rnn.pad_sequence([item["patches"] for item in items], batch_first=True)
        return {"patches": patches, "grids": torch.stack([item["grid"] for item in items])}

    def grid(self, item: dict[str, Tensor]) -> tuple[int, ...] | None:
        return None if self.extra else (int(item["grid"][0]), int(item["grid"][1]))
