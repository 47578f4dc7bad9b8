"""CLAP's audio tower (transformers' own module underneath)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.encoders.base import Encoder
from mmllm.encoders.clap import SOUND, ClapArchitecture, ClapConfig
from mmllm.encoders.clap_preprocess import read_numbers
from mmllm.errors import CheckpointError
from mmllm.pretrained import load_into, read_tensors, weight_files

WINDOWS_PER_CALL = 16  # bounds the memory of a long recording
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}


class ClapEncoder(Encoder):
    """transformers' ``ClapAudioModel``, with ``embedding`` and its projection.

    Parts of ``fusion`` are there only when it is used: without, they would never see a gradient.
    """

    def __init__(
        self, numbers: ClapArchitecture, output: Literal["sequence", "pooled", "embedding"], fusion: bool
    ) -> None:
        from transformers import ClapAudioConfig, ClapAudioModel, ClapAudioModelWithProjection

        super().__init__()
        given = numbers.model_dump(exclude=SOUND) | {"hidden_size": numbers.width, "enable_fusion": fusion}
        reference = ClapAudioModelWithProjection if output == "embedding" else ClapAudioModel
        self.model: Any = reference(ClapAudioConfig(**given, **PLAIN))
        self.output = output
        self.output_dim = numbers.projection_dim if output == "embedding" else numbers.width
        self.depths = numbers.depths

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``batch`` from ``ClapPreprocessor.collate``; features (N, S, D), zero on the padding, and their mask."""
        mels = batch["mels"].to(next(self.model.parameters()).dtype)
        parts = zip(torch.split(mels, WINDOWS_PER_CALL), torch.split(batch["longer"], WINDOWS_PER_CALL), strict=True)
        flat = torch.cat([self._read(*part) for part in parts]).flatten(0, 1)  # (W*P, D)
        mask = batch["mask"]
        return flat[batch["index"]].masked_fill(~mask[..., None], 0), mask

    def _read(self, mels: Tensor, longer: Tensor) -> Tensor:
        """Windows ``(W, C, T, F)`` to their features ``(W, P, D)``."""
        seen = self.model(input_features=mels, is_longer=longer[:, None])
        if self.output == "embedding":
            return F.normalize(seen.audio_embeds, dim=-1)[:, None]
        if self.output == "pooled":
            pooled: Tensor = seen.pooler_output[:, None]
            return pooled
        features: Tensor = seen.last_hidden_state  # (W, D, frequencies, steps)
        return features.permute(0, 3, 2, 1).flatten(1, 2)

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy the tensors of a checkpoint under transformers' names. Raises ``CheckpointError`` where they do not fit."""
        tower = {name.partition("audio_encoder.")[2]: v for name, v in tensors.items() if "audio_encoder." in name}
        names = [name.split(".") for name in tower if name.startswith("layers.") and ".blocks." in name]
        found = tuple(
            len({block for _, stage, _, block, *_ in names if int(stage) == i}) for i in range(len(self.depths))
        )
        if found != self.depths or any(int(stage) >= len(self.depths) for _, stage, *_ in names):
            raise CheckpointError(f"{source} has stages of {found} blocks, expected {self.depths}; correct the numbers")
        start = "audio_model." if self.output == "embedding" else ""
        projection = {
            "audio_projection." + name.partition("audio_projection.")[2]: value
            for name, value in tensors.items()
            if "audio_projection." in name
        }
        if start and not projection:
            raise CheckpointError(f"{source} has no `audio_projection`; an embedding needs that of a whole ClapModel")
        load_into(self.model, {f"{start}audio_encoder.{n}": v for n, v in tower.items()} | projection, source)


def make_encoder(config: ClapConfig, context: BuildContext) -> ClapEncoder:
    """See ``ClapConfig.build``."""
    encoder = ClapEncoder(read_numbers(config, context), config.output, config.long == "fusion")
    if config.pretrained is not None and context.weights:
        reference = context.resolve(config.pretrained)
        encoder.load(read_tensors(weight_files(reference, config.revision, ["model.safetensors"]), [""]), reference)
    return encoder.to(context.dtype).train(False)
