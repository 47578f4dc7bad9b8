"""The families of the ``audio_diffusion`` generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.generators.base import Artifact, Condition, Sound
from mmllm.generators.diffusion_module import LatentDiffusion, drawn, older_watch


class AudioDiffusion(LatentDiffusion):
    """What the sound families share. Their pipelines have the older kind of callback."""

    suffix: ClassVar[str] = ".wav"
    size_options: ClassVar[tuple[str, ...]] = ("seconds",)
    length_argument: ClassVar[str] = "audio_length_in_s"

    def rate(self) -> int:
        """Samples per second of what it makes."""
        return int(self.pipeline.vocoder.config.sampling_rate)

    def size_arguments(self, size: dict[str, Any]) -> dict[str, Any]:
        return {self.length_argument: size["seconds"]} if "seconds" in size else {}

    def outputs(self, result: Any) -> list[Artifact]:
        waves = np.asarray(result.audios, dtype=np.float32)
        if waves.ndim == 3:  # (N, channels, T)
            waves = waves.mean(axis=1)
        return [Sound(np.clip(wave, -1, 1), self.rate()) for wave in waves]

    def _watch(self, on_step: Callable[[int, int], bool] | None) -> dict[str, Any]:
        return older_watch(self.pipeline, on_step)


class MelDiffusion(AudioDiffusion):
    """Families whose autoencoder reads log-mel spectrograms."""

    def posterior(self, targets: Tensor) -> Tensor:
        parameters: Tensor = self.pipeline.vae.encode(targets).latent_dist.parameters
        return parameters

    def latents(self, encoded: Tensor, generator: torch.Generator | None) -> Tensor:
        return drawn(encoded, generator) * float(self.pipeline.vae.config.scaling_factor)


class AudioLDM(MelDiffusion):
    """AudioLDM: one CLAP vector, given to the U-Net as a class embedding."""

    vectors: ClassVar[frozenset[str]] = frozenset({"text"})

    def encode(self, prompts: list[str], negatives: list[str] | None) -> tuple[Condition, Condition]:
        both = self.pipeline._encode_prompt(prompts, self.device, 1, True, negatives)
        against, found = both[:, None].chunk(2)
        return Condition({"text": found}), Condition({"text": against})

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        out: Tensor = self.pipeline.unet(
            noisy, timesteps, encoder_hidden_states=None, class_labels=condition["text"][:, 0]
        ).sample
        return out


class AudioLDM2(MelDiffusion):
    """AudioLDM 2: the positions of a T5, and the states by which a language model goes on after CLAP and T5."""

    arguments: ClassVar[dict[str, str]] = {"text": "prompt_embeds", "generated": "generated_prompt_embeds"}
    mask_argument: ClassVar[str | None] = "attention_mask"

    def encode(self, prompts: list[str], negatives: list[str] | None) -> tuple[Condition, Condition]:
        text, mask, generated = self.pipeline.encode_prompt(prompts, self.device, 1, True, negative_prompt=negatives)
        # As long as the longest caption here; a condition has one length.
        missing = self.condition_shape["text"][0] - text.shape[1]
        text, mask = F.pad(text, (0, 0, 0, missing)), F.pad(mask, (0, missing)).bool()
        sides = zip(text.chunk(2), mask.chunk(2), generated.chunk(2), strict=True)
        against, found = (Condition({"text": t, "generated": g}, {"text": m}) for t, m, g in sides)
        return found, against

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        out: Tensor = self.pipeline.unet(
            noisy,
            timesteps,
            encoder_hidden_states=condition["generated"],
            encoder_hidden_states_1=condition["text"],
            encoder_attention_mask_1=condition.mask("text").long(),
        ).sample
        return out


class StableAudio(AudioDiffusion):
    """Stable Audio: T5 positions and a duration into a transformer over the latents of a wave autoencoder."""

    denoiser: ClassVar[str] = "transformer"
    mask_argument: ClassVar[str | None] = "attention_mask"
    length_argument: ClassVar[str] = "audio_end_in_s"

    def rate(self) -> int:
        return int(self.pipeline.vae.config.sampling_rate)

    def encode(self, prompts: list[str], negatives: list[str] | None) -> tuple[Condition, Condition]:
        sides = []
        for texts in (prompts, negatives or [""] * len(prompts)):
            tokens = self.pipeline.tokenizer(
                texts,
                padding="max_length",
                max_length=self.condition_shape["text"][0],
                truncation=True,
                return_tensors="pt",
            ).to(self.device)
            states = self.pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
            sides.append(Condition({"text": states}, {"text": tokens.attention_mask.bool()}))
        return sides[0], sides[1]

    def against(self, count: int, negative: str | None = None) -> Condition | None:
        # Without a negative text the pipeline's unconditional side is zero, durations included.
        return None if negative is None else super().against(count, negative)

    def posterior(self, targets: Tensor) -> Tensor:
        parameters: Tensor = self.pipeline.vae.encode(targets).latent_dist.parameters
        return parameters

    def latents(self, encoded: Tensor, generator: torch.Generator | None) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution

        found: Tensor = OobleckDiagonalGaussianDistribution(encoded).sample(generator)
        return found

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        pipeline, count = self.pipeline, len(noisy)
        text = pipeline.projection_model(text_hidden_states=condition["text"]).text_hidden_states
        text = text * condition.mask("text")[..., None].to(text.dtype)
        seconds = self.sampling.size.get("seconds", noisy.shape[2] * pipeline.vae.hop_length / self.rate())
        start, end = pipeline.encode_duration(0.0, float(seconds), noisy.device, False, count)
        rotary = get_1d_rotary_pos_embed(
            pipeline.rotary_embed_dim, noisy.shape[2] + 1, use_real=True, repeat_interleave_real=False
        )
        out: Tensor = pipeline.transformer(
            noisy,
            timesteps,
            encoder_hidden_states=torch.cat([text, start, end], dim=1),
            global_hidden_states=torch.cat([start, end], dim=2),
            rotary_embedding=rotary,
        ).sample
        return out
