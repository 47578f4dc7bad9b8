"""Pictures cut into tiles, and the features of all tiles as those of one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from mmllm.config.base import BuildContext, problems_at
from mmllm.config.families import Gridded, Preprocessor
from mmllm.encoders.base import Encoder
from mmllm.encoders.pictures import PicturePreprocessor
from mmllm.encoders.tiled import TiledConfig
from mmllm.errors import ConfigError

NAME = "tiled encoder"
INNER = "encoder."  # before the names of the encoder's own tensors
ROW_END, NOTHING = -1, -2  # in `order`: no feature of any tile


class TiledPreprocessor(PicturePreprocessor):
    """A picture's tiles, prepared by the encoder's own preprocessor ``part``; deterministic, picklable, no weights.

    An item has the encoder's tensors of its T tiles, stacked, under ``encoder.KEY``, and ``order`` (S,) int64: which of its
    tiles' features, T times those of one tile, stands at each place, or ``ROW_END``. Collated: the encoder's batch of all
    tiles, and ``order`` (N, S_max) with numbers in that batch, ``NOTHING`` on the padding.
    """

    def __init__(self, part: Preprocessor, grids: Sequence[tuple[int, int]], overview: bool, row_ends: bool) -> None:
        super().__init__()
        if part.media != self.media:
            raise ConfigError([("encoder", f"takes {part.media}; only pictures can be tiled")], NAME)
        self.part, self.grids, self.overview, self.row_ends = part, tuple(grids), overview, row_ends
        self.side, self.cells = _tile(part)

    def __call__(self, media: Image.Image) -> dict[str, Tensor]:
        height, width = self.side
        rows, cols = best_grid((media.height, media.width), self.grids, self.side)
        large = on_black(media, (rows * height, cols * width))
        boxes = [(c * width, r * height, (c + 1) * width, (r + 1) * height) for r in range(rows) for c in range(cols)]
        tiles = [large.crop(box) for box in boxes]
        if self.overview:
            tiles.insert(0, media.resize((width, height), Image.Resampling.BICUBIC))
        prepared = [self.part(tile) for tile in tiles]
        stacked = {f"{INNER}{key}": torch.stack([one[key] for one in prepared]) for key in prepared[0]}
        return {**stacked, "order": self.order((media.height, media.width), (rows, cols))}

    def order(self, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Which feature stands where, for a picture of ``size`` (height, width) on ``grid`` of tiles."""
        (rows, cols), (down, across) = grid, self.cells
        each = down * across
        first = each if self.overview else 0
        tiles = (first + torch.arange(rows * cols * each)).view(rows, cols, down, across)
        large = tiles.transpose(1, 2).reshape(rows * down, cols * across)
        top, left = margins(size, (rows * down, cols * across))
        large = large[top : large.shape[0] - top, left : large.shape[1] - left]
        if self.row_ends:
            large = torch.cat([large, torch.full((len(large), 1), ROW_END)], dim=1)
        return torch.cat([torch.arange(first), large.flatten()])

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        return len(item["order"])

    def grid(self, item: dict[str, Tensor]) -> tuple[int, ...] | None:
        return None

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        inner = [_own(item) for item in items]
        counts = [len(next(iter(tensors.values()))) for tensors in inner]
        tiles = [
            {key: value[index] for key, value in tensors.items()}
            for tensors, count in zip(inner, counts, strict=True)
            for index in range(count)
        ]
        starts = torch.tensor([0, *counts]).cumsum(0)[:-1] * math.prod(self.cells)
        orders = [
            torch.where(item["order"] < 0, item["order"], item["order"] + start)
            for item, start in zip(items, starts, strict=True)
        ]
        batch = {f"{INNER}{key}": value for key, value in self.part.collate(tiles).items()}
        return {**batch, "order": nn.utils.rnn.pad_sequence(orders, batch_first=True, padding_value=NOTHING)}


class TiledEncoder(Encoder):
    """``encoder`` on every tile."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.output_dim = encoder, encoder.output_dim

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``batch`` from ``TiledPreprocessor.collate``; features (N, S, D), zeros at the ends of rows and behind."""
        features, _ = self.encoder(_own(batch))
        order, flat = batch["order"], features.flatten(0, 1)
        found = flat[order.clamp(min=0).flatten()].view(*order.shape, -1)
        return found.masked_fill((order < 0)[..., None], 0), order != NOTHING


def best_grid(size: tuple[int, int], grids: Sequence[tuple[int, int]], tile: tuple[int, int]) -> tuple[int, int]:
    """The grid of tiles of ``tile`` (height, width) pixels for a picture of ``size`` (height, width).

    LLaVA-NeXT's ``select_best_resolution``: of the pixels that the picture has when it is scaled into the grid, though
    never more than its own, as many as possible; then as few other pixels of the grid as possible; then the first.
    """

    def worth(grid: tuple[int, int]) -> tuple[int, int]:
        height, width = grid[0] * tile[0], grid[1] * tile[1]
        scale = min(width / size[1], height / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - height * width

    return max(grids, key=worth)


def on_black(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture scaled into ``size`` (height, width) with its aspect ratio (bicubic), in the middle of black."""
    height, width = size
    across, down = width / picture.width, height / picture.height
    if across < down:
        inner = (width, min(math.ceil(picture.height * across), height))
    else:
        inner = (min(math.ceil(picture.width * down), width), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(
        picture.convert("RGB").resize(inner, Image.Resampling.BICUBIC),
        ((width - inner[0]) // 2, (height - inner[1]) // 2),
    )
    return canvas


def margins(size: tuple[int, int], cells: tuple[int, int]) -> tuple[int, int]:
    """How many rows above (and as many below) and columns on the left (and right) of ``cells`` (rows, cols) are black when
    a picture of ``size`` (height, width) is scaled into them: LLaVA-NeXT's ``unpad_image``.
    """
    rows, cols = cells
    if size[1] / size[0] > cols / rows:
        return (rows - max(1, int(round(size[0] * cols / size[1], 7)))) // 2, 0
    return 0, (cols - max(1, int(round(size[1] * rows / size[0], 7)))) // 2


def _tile(part: Preprocessor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels (height, width) that the encoder takes, and rows and columns of its features on them."""
    item = part(Image.new("RGB", (64, 48)))
    pixels = item.get("pixels")
    if pixels is None or pixels.ndim != 3:
        problem = "gives every picture a size of its own; tiles need an encoder of one size (no `fit: native`)"
        raise ConfigError([("encoder", problem)], NAME)
    cells = part.grid(item) if isinstance(part, Gridded) else None
    if cells is None or len(cells) != 2:
        problem = "has features on no grid of rows and columns; leave out its class token, pooling, and the like"
        raise ConfigError([("encoder", problem)], NAME)
    return (pixels.shape[1], pixels.shape[2]), (cells[0], cells[1])


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's own tensors, under its own names."""
    return {key.removeprefix(INNER): value for key, value in tensors.items() if key.startswith(INNER)}


def make_preprocessor(config: TiledConfig, context: BuildContext) -> TiledPreprocessor:
    """See ``TiledConfig.preprocessor``."""
    problems: list[tuple[str, str]] = []
    with problems_at("encoder", problems, context):
        part = config.encoder.preprocessor(context)
    if problems:
        raise ConfigError(problems, NAME)
    return TiledPreprocessor(part, config.grids, config.overview, config.row_ends)


def make_encoder(config: TiledConfig, context: BuildContext) -> TiledEncoder:
    """See ``TiledConfig.build``."""
    problems: list[tuple[str, str]] = []
    with problems_at("encoder", problems, context):
        encoder = config.encoder.build(context)
    if problems:
        raise ConfigError(problems, NAME)
    return TiledEncoder(encoder).train(False)
