"""An encoder of pictures on the frames of clips, and what becomes of the features of many frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmllm.config.base import BuildContext, problems_at
from mmllm.config.families import Gridded, Preprocessor
from mmllm.encoders.base import Encoder
from mmllm.encoders.frames import FramesConfig
from mmllm.errors import ConfigError, MediaError

NAME = "frames encoder"
FRAMES_PER_CALL = 64  # bounds the memory of long clips: 8 clips of 100 frames are 800 pictures


class FramesPreprocessor:
    """Every frame as the encoder of pictures wants it: its tensors, stacked, ``(T, …)``. Deterministic, picklable, no weights.

    Collated: its batches of at most ``FRAMES_PER_CALL`` frames each, frame by frame and clip by clip, the g-th under
    ``g.KEY``; ``counts (N, T)`` int64, the features of every frame, and with a stride ``grids (N, 2)`` int64, the rows and
    columns that they lie on before it.
    """

    media = "video"

    def __init__(self, picture: Preprocessor, config: FramesConfig) -> None:
        if picture.media != "image":
            raise ConfigError([("encoder", f"takes {picture.media}, expected an encoder of pictures")], NAME)
        self.picture, self.frames, self.stride, self.pooling = (
            picture,
            config.frames,
            config.spatial_stride,
            config.pooling,
        )
        self.decode_options: dict[str, Any] = {"frames": config.frames}
        if config.spread != "ends":
            self.decode_options["spread"] = config.spread

    def __call__(self, media: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Raises ``MediaError`` for another number of frames, or frames that are not seen as equally many features where they
        are to be averaged; ``ConfigError`` for a stride over features that lie on no rows and columns.
        """
        if len(media) != self.frames:
            raise MediaError(f"found {len(media)} frames, expected {self.frames}")
        seen = [self.picture(frame) for frame in media]
        item = {key: torch.stack([one[key] for one in seen]) for key in seen[0]}
        counts = self.counts(item)
        if self.pooling != "none" and len(set(counts)) > 1:
            raise MediaError(
                f"the frames have {min(counts)} to {max(counts)} features, which cannot be averaged over time"
            )
        return item

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        counts = self.counts(item)
        return {"none": sum(counts), "mean": counts[0], "spatio_temporal": self.frames + counts[0]}[self.pooling]

    def counts(self, item: Mapping[str, Tensor]) -> list[int]:
        """How many features every frame has, behind the stride."""
        if self.stride == 1:
            return [self.picture.num_tokens(frame) for frame in self._frames(item)]
        rows, cols = self._grid(item)
        return [(rows // self.stride) * (cols // self.stride)] * self.frames

    def grid(self, item: dict[str, Tensor]) -> tuple[int, ...] | None:
        """Rows and columns of features that are averaged over time, and how many such grids are behind each other of those
        that are not.
        """
        found = self.picture.grid(self._frames(item)[0]) if isinstance(self.picture, Gridded) else None
        if found is None or len(found) != 2 or self.pooling == "spatio_temporal":
            return None
        places = (found[0] // self.stride, found[1] // self.stride)
        return places if self.pooling == "mean" else (self.frames, *places)

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        frames = [frame for item in items for frame in self._frames(item)]
        batch = {
            f"{start // FRAMES_PER_CALL}.{key}": value
            for start in range(0, len(frames), FRAMES_PER_CALL)
            for key, value in self.picture.collate(frames[start : start + FRAMES_PER_CALL]).items()
        }
        batch["counts"] = torch.tensor([self.counts(item) for item in items])
        if self.stride > 1:
            batch["grids"] = torch.tensor([self._grid(item) for item in items])
        return batch

    def _frames(self, item: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        return [{key: value[index] for key, value in item.items()} for index in range(self.frames)]

    def _grid(self, item: Mapping[str, Tensor]) -> tuple[int, int]:
        """Rows and columns of the frames' features; they are of one size, so what holds for one does for all."""
        found = self.picture.grid(self._frames(item)[0]) if isinstance(self.picture, Gridded) else None
        if found is None or len(found) != 2 or min(found) < self.stride:
            told = "no rows and columns (a class token is on none)" if found is None else " x ".join(map(str, found))
            raise ConfigError(
                [("spatial_stride", f"{self.stride}, but the features lie on {told}; leave it out")], NAME
            )
        return found[0], found[1]


class FramesEncoder(Encoder):
    """The encoder of pictures, and the pooling of its features."""

    def __init__(self, encoder: Encoder, stride: int, pooling: str) -> None:
        super().__init__()
        self.encoder, self.stride, self.pooling, self.output_dim = encoder, stride, pooling, encoder.output_dim

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``batch`` from ``FramesPreprocessor.collate``; features (N, S, D) and their mask."""
        counts = batch["counts"]
        calls = [self.encoder(_of(call, batch)) for call in range(-(-counts.numel() // FRAMES_PER_CALL))]
        width = max(features.shape[1] for features, _ in calls)
        features = torch.cat([F.pad(part, (0, 0, 0, width - part.shape[1])) for part, _ in calls])
        if self.stride > 1:
            features = average_squares(features, batch["grids"].repeat_interleave(counts.shape[1], dim=0), self.stride)
        length = int(counts.max())
        features = features[:, :length].reshape(*counts.shape, length, -1)  # (N, T, S, D)
        mask = torch.arange(length, device=counts.device) < counts[..., None]  # (N, T, S)
        features = features.masked_fill(~mask[..., None], 0)
        if self.pooling == "none":
            return left_aligned(features.flatten(1, 2), mask.flatten(1, 2))
        over_time = features.mean(dim=1, dtype=torch.float32).to(features.dtype)
        if self.pooling == "mean":
            return over_time, mask[:, 0]
        over_places = (features.sum(dim=2, dtype=torch.float32) / counts[..., None]).to(features.dtype)
        found = torch.cat([over_places, over_time], dim=1)
        return found, torch.cat([mask.new_ones(mask.shape[:2]), mask[:, 0]], dim=1)


def _of(call: int, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What one call of the encoder of pictures gets."""
    prefix = f"{call}."
    return {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}


def average_squares(features: Tensor, grids: Tensor, side: int) -> Tensor:
    """Features ``(M, S, D)`` on ``grids (M, 2)``, row by row, averaged over squares of ``side`` x ``side``: ``(M, S', D)``,
    zeros behind the fewer ones of smaller grids. What does not fill a square at the right and at the bottom is left out.
    """
    smaller = (grids // side).prod(dim=1)
    found = features.new_zeros(len(features), int(smaller.max()), features.shape[2])
    for rows, cols in torch.unique(grids.cpu(), dim=0).tolist():
        where = ((grids[:, 0] == rows) & (grids[:, 1] == cols)).nonzero().flatten()
        table = features[where, : rows * cols].transpose(1, 2).reshape(len(where), -1, rows, cols)
        part = F.avg_pool2d(table, side).flatten(2).transpose(1, 2)
        found = found.index_copy(0, where, F.pad(part, (0, 0, 0, found.shape[1] - part.shape[1])))
    return found


def left_aligned(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The real features of every item of ``(N, S, D)`` in their order, without what lies between them, and their mask."""
    if bool(mask.all()):
        return features, mask
    order = (~mask).byte().argsort(dim=1, stable=True)[:, : int(mask.sum(dim=1).max())]
    found = features.gather(1, order[..., None].expand(-1, -1, features.shape[2]))
    return found, mask.gather(1, order)


def make_preprocessor(config: FramesConfig, context: BuildContext) -> FramesPreprocessor:
    """See ``FramesConfig.preprocessor``."""
    problems: list[tuple[str, str]] = []
    with problems_at("encoder", problems, context):
        picture = config.encoder.preprocessor(context)
    if problems:
        raise ConfigError(problems, NAME)
    return FramesPreprocessor(picture, config)


def make_encoder(config: FramesConfig, context: BuildContext) -> FramesEncoder:
    """See ``FramesConfig.build``."""
    problems: list[tuple[str, str]] = []
    with problems_at("encoder", problems, context):
        encoder = config.encoder.build(context)
    if problems:
        raise ConfigError(problems, NAME)
    return FramesEncoder(encoder, config.spatial_stride, config.pooling).train(False)
