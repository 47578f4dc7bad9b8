"""The families of the ``video_diffusion`` generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmllm.generators.base import Artifact, Clip, Condition
from mmllm.generators.diffusion_module import LatentDiffusion, drawn, older_watch


class VideoDiffusion(LatentDiffusion):
    """What the clip families share."""

    suffix: ClassVar[str] = ".gif"
    size_options: ClassVar[tuple[str, ...]] = ("width", "height", "num_frames", "frames_per_second")

    def size_arguments(self, size: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in size.items() if name != "frames_per_second"}

    def outputs(self, result: Any) -> list[Artifact]:
        speed = float(self.sampling.size["frames_per_second"])
        clips: list[Artifact] = []
        for frames in np.asarray(result.frames):  # (N, frames, H, W, 3) in [0, 1]
            pictures = [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in frames]
            clips.append(Clip(pictures, speed))
        return clips


class TextToVideo(VideoDiffusion):
    """ModelScope's text-to-video and ZeroScope: frames go through Stable Diffusion's autoencoder one by one."""

    def encode(self, prompts: list[str], negatives: list[str] | None) -> tuple[Condition, Condition]:
        found, against = self.pipeline.encode_prompt(prompts, self.device, 1, True, negatives)
        return Condition({"text": found}), Condition({"text": against})

    def posterior(self, targets: Tensor) -> Tensor:
        """``(N, frames, …)``."""
        flat: Tensor = self.pipeline.vae.encode(targets.transpose(1, 2).flatten(0, 1)).latent_dist.parameters
        return flat.reshape(targets.shape[0], targets.shape[2], *flat.shape[1:])

    def latents(self, encoded: Tensor, generator: torch.Generator | None) -> Tensor:
        flat = drawn(encoded.flatten(0, 1), generator)
        found = flat.reshape(*encoded.shape[:2], *flat.shape[1:]).transpose(1, 2)
        return found * float(self.pipeline.vae.config.scaling_factor)

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        out: Tensor = self.pipeline.unet(noisy, timesteps, encoder_hidden_states=condition["text"]).sample
        return out

    def _watch(self, on_step: Callable[[int, int], bool] | None) -> dict[str, Any]:
        return older_watch(self.pipeline, on_step)


class Wan(VideoDiffusion):
    """Wan 2.1: a transformer over the latents of a causal video autoencoder, trained by flow matching."""

    denoiser: ClassVar[str] = "transformer"

    def encode(self, prompts: list[str], negatives: list[str] | None) -> tuple[Condition, Condition]:
        found, against = self.pipeline.encode_prompt(
            prompts,
            negatives or [""] * len(prompts),
            max_sequence_length=self.condition_shape["text"][0],
            device=self.device,
        )
        return Condition({"text": found}), Condition({"text": against})

    def posterior(self, targets: Tensor) -> Tensor:
        parameters: Tensor = self.pipeline.vae.encode(targets).latent_dist.parameters
        return parameters

    def latents(self, encoded: Tensor, generator: torch.Generator | None) -> Tensor:
        vae = self.pipeline.vae
        mean, spread = (
            torch.tensor(values, device=encoded.device, dtype=self.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (drawn(encoded, generator) - mean) / spread

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        out: Tensor = self.pipeline.transformer(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=condition["text"]
        ).sample
        return out
