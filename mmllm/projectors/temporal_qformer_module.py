"""Video-LLaMA's way from frames to tokens, on BLIP-2's Q-Former."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmllm.config.base import BuildContext
from mmllm.projectors.base import Projector
from mmllm.projectors.qformer_module import QFormerProjector
from mmllm.projectors.qformer_module import make_projector as make_qformer
from mmllm.projectors.temporal_qformer import TemporalQFormerConfig


class TemporalQFormer(Projector):
    """``(N, S, input_dim)``, the features of T frames one after the other, to ``(N, num_outputs, output_dim)``.

    ``DAMO-NLP-SG/Video-LLaMA``, ``video_llama/models/video_llama.py`` (2143b4d), ``encode_videoQformer_visual``: the frame's
    position is added to all that its Q-Former read, and the clip's Q-Former attends to all frames at once. Positions start
    at standard normal values, as there: what they are added to is behind a LayerNorm.
    """

    def __init__(
        self,
        frame: QFormerProjector | None,
        clip: QFormerProjector,
        *,
        width: int,
        norm: int | None,
        frames: int,
        max_frames: int,
    ) -> None:
        """``width`` is that of what positions are added to, ``norm`` that of the features where they are normalised."""
        super().__init__()
        self.norm = nn.Identity() if norm is None else nn.LayerNorm(norm)
        self.frame, self.clip, self.frames = frame, clip, frames
        self.positions = nn.Parameter(torch.randn(max_frames, width))

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        runs, real = in_runs(self.norm(features), mask, self.frames)  # (N, T, C, D), (N, T, C)
        if self.frame is not None:
            present = real.any(dim=2, keepdim=True)
            # A frame without features is read as zeros, and nobody looks at what comes out.
            read = self.frame.read(runs.flatten(0, 1), (real | ~present).flatten(0, 1))
            runs = read.view(*real.shape[:2], *read.shape[1:])
            real = present.expand(-1, -1, runs.shape[2])
        runs = runs + self.positions[: self.frames, None].to(runs.dtype)
        found: tuple[Tensor, Tensor] = self.clip(runs.flatten(1, 2), real.flatten(1, 2))
        return found


def in_runs(features: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The real features of every item of ``(N, S, D)``, the first ones, in ``count`` runs: ``(N, count, C, D)``, zeros behind
    each, and their mask ``(N, count, C)``.

    Runs of an item are equally long; where its features cannot be divided the last ones are shorter, or empty.
    """
    lengths = mask.sum(dim=1)
    each = (lengths + count - 1) // count  # (N,)
    places = torch.arange(-(-mask.shape[1] // count), device=mask.device)
    sources = torch.arange(count, device=mask.device)[None, :, None] * each[:, None, None] + places  # (N, count, C)
    real = (places < each[:, None, None]) & (sources < lengths[:, None, None])
    taken = sources.clamp(max=mask.shape[1] - 1).flatten(1)[..., None].expand(-1, -1, features.shape[2])
    runs = features.gather(1, taken).view(*sources.shape, -1)
    return runs.masked_fill(~real[..., None], 0), real


def make_projector(
    config: TemporalQFormerConfig, context: BuildContext, input_dim: int, output_dim: int
) -> TemporalQFormer:
    """See ``TemporalQFormerConfig.build``."""
    frame, width = None, input_dim
    if config.frame is not None:
        width = config.frame.hidden_dim
        frame = make_qformer(config.frame, context, input_dim, width)
        frame.language_projection = nn.Identity()  # type: ignore[assignment]  # the clip's Q-Former reads what it read
    module = TemporalQFormer(
        frame,
        make_qformer(config.clip, context, width, output_dim),
        width=width,
        norm=input_dim if config.norm else None,
        frames=config.frames or 1,
        max_frames=config.max_frames,
    )
    return module.to(context.dtype)
