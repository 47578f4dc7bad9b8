"""The text-to-image families of the ``stable_diffusion`` generator."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmllm.generators.base import Artifact, Condition
from mmllm.generators.diffusion_module import LatentDiffusion, drawn


class ImageDiffusion(LatentDiffusion):
    """What all picture families share."""

    suffix: ClassVar[str] = ".png"
    size_options: ClassVar[tuple[str, ...]] = ("width", "height")

    def posterior(self, targets: Tensor) -> Tensor:
        parameters: Tensor = self.pipeline.vae.encode(targets).latent_dist.parameters
        return parameters

    def latents(self, encoded: Tensor, generator: torch.Generator | None) -> Tensor:
        vae, found = self.pipeline.vae, drawn(encoded, generator)
        return (found - (vae.config.get("shift_factor") or 0.0)) * float(vae.config.scaling_factor)

    def outputs(self, result: Any) -> list[Artifact]:
        return list(result.images)


class StableDiffusion(ImageDiffusion):
    """Stable Diffusion 1 and 2."""

    def encode(self, prompts: list[str], negatives: list[str] | None) -> tuple[Condition, Condition]:
        found, against = self.pipeline.encode_prompt(prompts, self.device, 1, True, negatives)
        return Condition({"text": found}), Condition({"text": against})

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        out: Tensor = self.pipeline.unet(noisy, timesteps, encoder_hidden_states=condition["text"]).sample
        return out


class StableDiffusionXL(ImageDiffusion):
    """Stable Diffusion XL: text positions of two encoders side by side, and the second one's pooled vector."""

    arguments: ClassVar[dict[str, str]] = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}

    def encode(self, prompts: list[str], negatives: list[str] | None) -> tuple[Condition, Condition]:
        found, against, pooled, pooled_against = self.pipeline.encode_prompt(
            prompts, device=self.device, negative_prompt=negatives
        )
        return with_pooled(found, pooled), with_pooled(against, pooled_against)

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        scale = self.pipeline.vae_scale_factor
        size = (noisy.shape[2] * scale, noisy.shape[3] * scale)
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=noisy.dtype, device=noisy.device).expand(len(noisy), -1)
        out: Tensor = self.pipeline.unet(
            noisy,
            timesteps,
            encoder_hidden_states=condition["text"],
            added_cond_kwargs={"text_embeds": condition["pooled"][:, 0], "time_ids": ids},
        ).sample
        return out


class StableDiffusion3(ImageDiffusion):
    """Stable Diffusion 3: a transformer trained by flow matching."""

    denoiser: ClassVar[str] = "transformer"
    arguments: ClassVar[dict[str, str]] = StableDiffusionXL.arguments

    def encode(self, prompts: list[str], negatives: list[str] | None) -> tuple[Condition, Condition]:
        found, against, pooled, pooled_against = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, negative_prompt=negatives, **self._length()
        )
        return with_pooled(found, pooled), with_pooled(against, pooled_against)

    def _length(self) -> dict[str, int]:
        return {} if self.condition_length is None else {"max_sequence_length": self.condition_length}

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        out: Tensor = self.pipeline.transformer(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"][:, 0],
        ).sample
        return out


class Flux(ImageDiffusion):
    """Flux: latents in packs of 2 x 2, guidance distilled into the model."""

    denoiser: ClassVar[str] = "transformer"
    arguments: ClassVar[dict[str, str]] = StableDiffusionXL.arguments

    def encode(self, prompts: list[str], negatives: list[str] | None) -> tuple[Condition, Condition]:
        length = {} if self.condition_length is None else {"max_sequence_length": self.condition_length}
        found, pooled, _ = self.pipeline.encode_prompt(prompts, None, device=self.device, **length)
        condition = with_pooled(found, pooled)
        return condition, condition

    def against(self, count: int, negative: str | None = None) -> Condition | None:
        return None  # guidance is distilled into the model

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        pipeline, (count, channels, height, width) = self.pipeline, noisy.shape
        guidance = None
        if pipeline.transformer.config.guidance_embeds:
            guidance = torch.ones(count, device=noisy.device, dtype=torch.float32)
        out = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy, count, channels, height, width),
            timestep=timesteps.to(noisy.dtype) / 1000,
            guidance=guidance,
            pooled_projections=condition["pooled"][:, 0],
            encoder_hidden_states=condition["text"],
            txt_ids=torch.zeros(condition["text"].shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype),
        ).sample
        scale = pipeline.vae_scale_factor
        found: Tensor = pipeline._unpack_latents(out, height * scale, width * scale, scale)
        return found


class Sana(ImageDiffusion):
    """Sana: a linear transformer on a deep-compression autoencoder, trained by flow matching."""

    denoiser: ClassVar[str] = "transformer"
    mask_argument: ClassVar[str | None] = "prompt_attention_mask"

    def encode(self, prompts: list[str], negatives: list[str] | None) -> tuple[Condition, Condition]:
        found, mask, against, mask_against = self.pipeline.encode_prompt(
            prompts,
            negative_prompt=negatives or [""] * len(prompts),
            device=self.device,
            max_sequence_length=self.condition_length or 300,
            # What the pipeline's call puts in front of every prompt unless told otherwise.
            complex_human_instruction=_default(self.pipeline.__call__, "complex_human_instruction"),
        )
        return Condition({"text": found}, {"text": mask.bool()}), Condition(
            {"text": against}, {"text": mask_against.bool()}
        )

    def call_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        return super().call_arguments(condition, negative) | {"negative_prompt": None, "use_resolution_binning": False}

    def posterior(self, targets: Tensor) -> Tensor:
        found: Tensor = self.pipeline.vae.encode(targets).latent
        return found

    def latents(self, encoded: Tensor, generator: torch.Generator | None) -> Tensor:
        return encoded * float(self.pipeline.vae.config.scaling_factor)

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        transformer = self.pipeline.transformer
        out: Tensor = transformer(
            noisy,
            encoder_hidden_states=condition["text"],
            encoder_attention_mask=condition.mask("text").to(noisy.dtype),
            timestep=timesteps * transformer.config.timestep_scale,
        ).sample
        return out


def _default(function: Callable[..., Any], argument: str) -> Any:
    return inspect.signature(function).parameters[argument].default


def with_pooled(text: Tensor, pooled: Tensor) -> Condition:
    """A condition of positions ``(N, L, D)`` and one vector ``(N, P)``."""
    return Condition({"text": text, "pooled": pooled[:, None]})
