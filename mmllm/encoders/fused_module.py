"""Several encoders side by side, and one sequence of features from all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.config.base import BuildContext, problems_at
from mmllm.config.families import Gridded, Preprocessor
from mmllm.encoders.base import Encoder
from mmllm.encoders.fused import FusedConfig
from mmllm.errors import ConfigError

NAME = "fused encoder"


class FusedPreprocessor:
    """Everything that the encoders' own preprocessors make of one medium; deterministic, picklable, no weights.

    An item and a batch have each encoder's tensors under ``NAME.KEY``. Collated also: ``counts`` (N, P) int64, the features
    of every item from each of the P encoders; for interpolation ``grids`` (N, P, 2) int64, the rows and columns that they
    lie on (a sound: one row).
    """

    def __init__(self, parts: Mapping[str, Preprocessor], along: str, lengths: str) -> None:
        first = next(iter(parts.values()))
        self.media, self.decode_options = first.media, first.decode_options
        for name, part in list(parts.items())[1:]:
            if part.media != self.media:
                problem = f"takes {part.media}, but the first encoder takes {self.media}; they must take the same"
                raise ConfigError([(f"encoders.{name}", problem)], NAME)
            if part.decode_options != self.decode_options:
                problem = f"reads {part.decode_options}, but the first encoder {self.decode_options}; they must agree"
                raise ConfigError([(f"encoders.{name}", problem)], NAME)
        self.parts, self.along, self.lengths = dict(parts), along, lengths

    def __call__(self, media: Any) -> dict[str, Tensor]:
        """Raises ``MediaError`` where an encoder does, ``ConfigError`` where features cannot be interpolated."""
        item = {f"{name}.{key}": value for name, part in self.parts.items() for key, value in part(media).items()}
        if self.along == "channels" and self.lengths == "interpolate":
            self.grids(item)
        return item

    def counts(self, item: Mapping[str, Tensor]) -> list[int]:
        """How many features each encoder has for this item."""
        return [part.num_tokens(_own(name, item)) for name, part in self.parts.items()]

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        counts = self.counts(item)
        if self.along == "sequence":
            return sum(counts)
        return counts[0] if self.lengths == "interpolate" else max(counts)

    def grid(self, item: dict[str, Tensor]) -> tuple[int, ...] | None:
        """The first encoder's, to which the others are fitted; None where features are joined in another way."""
        name, first = next(iter(self.parts.items()))
        fitted = self.along == "channels" and self.lengths == "interpolate" and isinstance(first, Gridded)
        return first.grid(_own(name, item)) if fitted else None  # type: ignore[attr-defined]

    def members(self, item: dict[str, Tensor]) -> dict[str, int] | None:
        """See ``Membered``."""
        return dict(zip(self.parts, self.counts(item), strict=True)) if self.along == "sequence" else None

    def grids(self, item: Mapping[str, Tensor]) -> list[tuple[int, int]]:
        """Rows and columns of each encoder's features. Raises ``ConfigError`` where they differ and are no such grid."""
        counts = self.counts(item)
        if len(set(counts)) == 1:
            return [(1, count) for count in counts]
        found = {
            name: part.grid(_own(name, item)) if isinstance(part, Gridded) else None
            for name, part in self.parts.items()
        }
        told = "; ".join(
            f"{name}: {count} on {found[name] or 'no grid'}" for name, count in zip(found, counts, strict=True)
        )
        grids = [grid for grid in found.values() if grid is not None]
        if len(grids) < len(found) or {len(grid) for grid in grids} not in ({1}, {2}):
            problem = f"features cannot be interpolated ({told}); choose `pad`, `along: sequence` or other encoders"
            raise ConfigError([("lengths", problem)], NAME)
        return [(grid[0], grid[1]) if len(grid) == 2 else (1, grid[0]) for grid in grids]

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {
            f"{name}.{key}": value
            for name, part in self.parts.items()
            for key, value in part.collate([_own(name, item) for item in items]).items()
        }
        batch["counts"] = torch.tensor([self.counts(item) for item in items])
        if self.along == "channels" and self.lengths == "interpolate":
            batch["grids"] = torch.tensor([self.grids(item) for item in items])
        return batch


def _own(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one encoder, under its own names."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


class FusedEncoder(Encoder):
    """The encoders under their names."""

    def __init__(self, encoders: Mapping[str, Encoder], along: str, lengths: str, widths: str) -> None:
        super().__init__()
        found = [encoder.output_dim for encoder in encoders.values()]
        if along == "sequence" and widths == "equal" and len(set(found)) > 1:
            problem = (
                f"the features have widths {found}; `sequence` needs equal ones or `widths: pad`; or choose `channels`"
            )
            raise ConfigError([("along", problem)], NAME)
        self.encoders, self.along, self.lengths = nn.ModuleDict(encoders), along, lengths
        self.output_dim = sum(found) if along == "channels" else max(found)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``batch`` from ``FusedPreprocessor.collate``; features (N, S, D), zero on the padding, and their mask."""
        seen = [encoder(_own(name, batch)) for name, encoder in self.encoders.items()]
        if self.along == "sequence":
            wide = [(F.pad(part, (0, self.output_dim - part.shape[2])), own) for part, own in seen]
            return one_behind_another(wide, batch["counts"])
        if self.lengths == "interpolate":
            grids, mask = batch["grids"], seen[0][1]
            fitted = [to_grid(part, grids[:, i], grids[:, 0], mask.shape[1]) for i, (part, _) in enumerate(seen)]
        else:
            mask = _prefix(batch["counts"].amax(dim=1))
            fitted = [_zeros_behind(part, own, mask.shape[1]) for part, own in seen]
        return torch.cat(fitted, dim=-1).masked_fill(~mask[..., None], 0), mask


def to_grid(features: Tensor, own: Tensor, wanted: Tensor, length: int) -> Tensor:
    """Features ``(N, S, D)`` on grids ``own (N, 2)`` resampled to ``wanted (N, 2)``: ``(N, length, D)``, zeros behind.

    Bilinear with antialiasing, ``align_corners=False``, in float32; items whose grids are the wanted ones stay as they are.
    """
    found = features.new_zeros(len(features), length, features.shape[2])
    pairs = torch.cat([own, wanted], dim=1).cpu()
    for pair in torch.unique(pairs, dim=0):
        where = (pairs == pair).all(dim=1).nonzero().flatten().to(features.device)
        rows, cols, new_rows, new_cols = pair.tolist()
        part = features[where, : rows * cols]
        if (rows, cols) != (new_rows, new_cols):
            table = part.float().transpose(1, 2).reshape(len(part), -1, rows, cols)
            size = (new_rows, new_cols)
            resampled = F.interpolate(table, size, mode="bilinear", align_corners=False, antialias=True)
            part = resampled.flatten(2).transpose(1, 2).to(features.dtype)
        found = found.index_copy(0, where, F.pad(part, (0, 0, 0, length - part.shape[1])))
    return found


def one_behind_another(seen: Sequence[tuple[Tensor, Tensor]], counts: Tensor) -> tuple[Tensor, Tensor]:
    """The real features of each item, those of the first encoder first: ``(N, S, D)``, zeros behind, and their mask.

    ``counts (N, P)`` are the numbers of real features.
    """
    mask = _prefix(counts.sum(dim=1))
    found = seen[0][0].new_zeros(*mask.shape, seen[0][0].shape[2])
    starts = counts.cumsum(dim=1) - counts
    for index, (features, own) in enumerate(seen):
        items, places = own.nonzero(as_tuple=True)
        target = (items, starts[items, index] + places)
        found = found.index_put(target, features[items, places].to(found.dtype))
    return found, mask


def _prefix(counts: Tensor) -> Tensor:
    """A mask (N, S), true on the first ``counts (N,)`` of each item."""
    return torch.arange(int(counts.max()), device=counts.device)[None] < counts[:, None]


def _zeros_behind(features: Tensor, mask: Tensor, length: int) -> Tensor:
    return F.pad(features.masked_fill(~mask[..., None], 0), (0, 0, 0, length - features.shape[1]))


def make_preprocessor(config: FusedConfig, context: BuildContext) -> FusedPreprocessor:
    """See ``FusedConfig.preprocessor``."""
    problems: list[tuple[str, str]] = []
    parts = {}
    for name, encoder in config.encoders.items():
        with problems_at(f"encoders.{name}", problems, context):
            parts[name] = encoder.preprocessor(context)
    if problems:
        raise ConfigError(problems, NAME)
    return FusedPreprocessor(parts, config.along, config.lengths)


def make_encoder(config: FusedConfig, context: BuildContext) -> FusedEncoder:
    """See ``FusedConfig.build``."""
    problems: list[tuple[str, str]] = []
    encoders = {}
    for name, encoder in config.encoders.items():
        with problems_at(f"encoders.{name}", problems, context):
            encoders[name] = encoder.build(context)
    if problems:
        raise ConfigError(problems, NAME)
    return FusedEncoder(encoders, config.along, config.lengths, config.widths).train(False)
