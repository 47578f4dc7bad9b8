"""Video transformers (transformers' own modules underneath), and what their processors make of frames."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmllm.config.base import BuildContext
from mmllm.encoders.base import Encoder
from mmllm.encoders.pictures import not_narrow
from mmllm.encoders.pruning import drop_unused, unused_parameters
from mmllm.encoders.video_transformer import VideoTransformerConfig
from mmllm.encoders.vision_transformer_module import REFUSALS, load_model, pair, read_numbers, resized
from mmllm.errors import CheckpointError, ConfigError, MediaError, brief
from mmllm.pretrained import find, is_local

PROCESSOR_FILES = ["video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"]
NARROWEST = 16  # frames are many, and narrow ones grow to that many times the square before they are cropped


@dataclass(frozen=True)
class Family:
    """How transformers calls the same things in a family: config fields, the model's input, its processor; and what the model
    is called with.
    """

    size: str
    frames: str
    pixels: str
    processor: str
    options: dict[str, bool]


FAMILIES = {
    "videomae": Family("image_size", "num_frames", "pixel_values", "VideoMAEVideoProcessor", {}),
    "vjepa2": Family(
        "crop_size", "frames_per_clip", "pixel_values_videos", "VJEPA2VideoProcessor", {"skip_predictor": True}
    ),
}


@dataclass(frozen=True)
class Shape:
    """``frames`` frames of ``size`` (height, width) pixels as ``times`` x ``rows`` x ``cols`` tubelets."""

    frames: int
    size: tuple[int, int]
    times: int
    rows: int
    cols: int


class ClipPreprocessor:
    """A clip's frames as transformers' processor prepares them: ``pixels`` (T, 3, H, W), collated (N, T, 3, H, W)."""

    media = "video"

    def __init__(self, processor: Any, shape: Shape, spread: str) -> None:
        self.processor, self.shape = processor, shape
        self.decode_options: dict[str, Any] = {"frames": shape.frames}
        if spread != "ends":
            self.decode_options["spread"] = spread

    def __call__(self, media: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Raises ``MediaError`` for another number of frames."""
        if len(media) != self.shape.frames:
            raise MediaError(f"found {len(media)} frames, expected {self.shape.frames}")
        return {"pixels": _pixels(self.processor, media)}

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        return self.shape.times * self.shape.rows * self.shape.cols

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"pixels": torch.stack([item["pixels"] for item in items])}


class VideoEncoder(Encoder):
    """transformers' model without the blocks after the selected one."""

    def __init__(self, model: Any, family: Family, unused: frozenset[str], width: int) -> None:
        super().__init__()
        drop_unused(model, unused)
        self.model, self.family, self.output_dim = model, family, width

    def train(self, mode: bool = True) -> VideoEncoder:
        """As ``nn.Module.train``, but the model underneath stays without the noise of its pretraining."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``batch`` from the preprocessor's ``collate``; features (N, S, D), those of one time behind another's."""
        pixels = {self.family.pixels: batch["pixels"].to(self.model.dtype)}
        features: Tensor = self.model(**pixels, **self.family.options).last_hidden_state
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)


def make_preprocessor(config: VideoTransformerConfig, context: BuildContext) -> ClipPreprocessor:
    """See ``VideoTransformerConfig.preprocessor``."""
    processor, numbers = _read(config, context)
    return ClipPreprocessor(processor, _shape(config, numbers), config.spread)


def make_encoder(config: VideoTransformerConfig, context: BuildContext) -> VideoEncoder:
    """See ``VideoTransformerConfig.build``."""
    from transformers import AutoModel

    _, numbers = _read(config, context)
    family, unused = FAMILIES[config.model_type], _unused(config, numbers)
    if config.pretrained is None or not context.weights:
        model = AutoModel.from_config(numbers, dtype=context.dtype or torch.float32)
    else:
        model = load_model(config, context, numbers, unused)
    return VideoEncoder(model, family, unused, int(numbers.hidden_size)).to(context.dtype).train(False)


def read_shape(config: VideoTransformerConfig, context: BuildContext) -> Shape:
    """Frames, pixels and tubelets. Raises ``ConfigError`` or ``CheckpointError``."""
    return _shape(config, _read(config, context)[1])


def _shape(config: VideoTransformerConfig, numbers: Any) -> Shape:
    family = FAMILIES[config.model_type]
    frames, size = getattr(numbers, family.frames), pair(getattr(numbers, family.size))
    if frames % numbers.tubelet_size:
        problem = f"found {frames}, expected a multiple of the {numbers.tubelet_size} frames of a tubelet"
        raise ConfigError([("frames", problem)], _name(config))
    rows, cols = (pixels // patch for pixels, patch in zip(size, pair(numbers.patch_size), strict=True))
    return Shape(frames, size, frames // numbers.tubelet_size, rows, cols)


def _read(config: VideoTransformerConfig, context: BuildContext) -> tuple[Any, Any]:
    """The processor, and transformers' config with the frames, pixels and blocks that there are here."""
    given = config
    if config.architecture is not None:
        declared = {"model_type": config.model_type, **config.architecture}
        given = config.model_copy(update={"architecture": declared})
    known = {name: {"model_type": config.model_type, **numbers} for name, numbers in config.known.items()}
    numbers = read_numbers(given, context, known)
    if numbers.model_type != config.model_type:
        where = "architecture.model_type" if config.pretrained is None else "pretrained"
        raise ConfigError([(where, f"found a {numbers.model_type}, expected a {config.model_type}")], _name(config))
    blocks = numbers.num_hidden_layers + 1 + config.select_layer
    if blocks < 1:
        problem = f"found {config.select_layer}, expected -{numbers.num_hidden_layers} to -1"
        raise ConfigError([("select_layer", problem)], _name(config))
    family = FAMILIES[config.model_type]
    processor, size = _processor(config, context, numbers)
    numbers.num_hidden_layers = blocks
    setattr(numbers, family.size, size)
    setattr(numbers, family.frames, config.frames or getattr(numbers, family.frames))
    return processor, numbers


def _unused(config: VideoTransformerConfig, numbers: Any) -> frozenset[str]:
    """Names of the parameters that have no part in the features, from a run of one block without memory: blocks are alike."""
    from transformers import AutoModel

    one, family, shape = deepcopy(numbers), FAMILIES[config.model_type], _shape(config, numbers)
    one.num_hidden_layers = 1
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(one, dtype=torch.float32).eval()
        blank = {family.pixels: torch.zeros(1, shape.frames, 3, *shape.size, device="meta")}
        with torch.enable_grad():
            out = model(**blank, **family.options, output_hidden_states=True)
            return unused_parameters(model, out.last_hidden_state if config.normed else out.hidden_states[-1])
    except REFUSALS as error:
        problem = f"transformers refuses it: {brief(error, 200)}"
        raise ConfigError([("architecture", problem)], _name(config)) from error


def _processor(config: VideoTransformerConfig, context: BuildContext, numbers: Any) -> tuple[Any, int]:
    """The checkpoint's video or image processor, or the family's own for the model's size; and the square that it gives."""
    import transformers

    family, found = FAMILIES[config.model_type], None
    side = config.image_size or pair(getattr(numbers, family.size))[0]
    if config.pretrained is not None:
        reference = context.resolve(config.pretrained)
        here = Path(reference).is_dir() or (context.weights and not is_local(reference))
        if here and find(reference, config.revision, PROCESSOR_FILES) is not None:
            try:
                found = transformers.AutoVideoProcessor.from_pretrained(reference, revision=config.revision)
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(f"cannot read the processor of {reference}: {brief(error)}") from error
    processor = getattr(transformers, family.processor)() if found is None else found
    blank = [Image.new("RGB", (60, 40))]
    own = tuple(_pixels(processor, blank).shape[-2:])
    wanted = (side, side) if found is None or config.image_size is not None else own
    if own != wanted:
        processor = resized(processor, wanted[0], own)
        own = tuple(_pixels(processor, blank).shape[-2:])
    if own != wanted or own[0] != own[1]:
        problem = f"the processor gives frames of {own[0]} x {own[1]} pixels, expected a square; set it"
        raise ConfigError([("image_size", problem)], _name(config))
    return processor, own[0]


def _pixels(processor: Any, frames: Sequence[Image.Image]) -> Tensor:
    """``(T, 3, H, W)`` float32 of frames of one size."""
    stacked = np.stack([np.asarray(not_narrow(frame.convert("RGB"), NARROWEST)) for frame in frames])
    found = processor(
        videos=[torch.from_numpy(stacked).permute(0, 3, 1, 2)], do_sample_frames=False, return_tensors="pt"
    )
    pixels: Tensor = next(value for name, value in found.items() if name.startswith("pixel_values"))[0]
    return pixels


def _name(config: VideoTransformerConfig) -> str:
    return f"{config.kind} encoder"
