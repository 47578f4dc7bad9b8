"""The ``audio_diffusion`` generator: text-to-audio latent diffusion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from mmllm.config.base import BuildContext
from mmllm.config.families import Shape
from mmllm.errors import MmllmError
from mmllm.generators.diffusion import Family, LatentDiffusionConfig, Read

if TYPE_CHECKING:
    from mmllm.generators.targets import MelTarget, WaveTarget

MODULE = "mmllm.generators.audio_module"
T5_POSITIONS = 64  # of AudioLDM 2, whose own text condition is as long as the longest caption of a batch


def _audioldm(read: Read, length: int | None) -> dict[str, Shape]:
    return {"text": (1, int(read("text_encoder/config.json")["projection_dim"]))}


def _audioldm2(read: Read, length: int | None) -> dict[str, Shape]:
    language = read("language_model/config.json")
    # The language model continues the text by this many states (`generate_language_model`).
    states = int(language.get("max_new_tokens") or 8)
    return {
        "text": (length or T5_POSITIONS, int(read("text_encoder_2/config.json")["d_model"])),
        "generated": (states, int(language["n_embd"])),
    }


def _stable_audio(read: Read, length: int | None) -> dict[str, Shape]:
    positions = int(read("tokenizer/tokenizer_config.json")["model_max_length"])
    return {"text": (length or positions, int(read("text_encoder/config.json")["d_model"]))}


def _mel_seconds(read: Read) -> dict[str, Any]:
    vocoder, unet, vae = (read(f"{part}/config.json") for part in ("vocoder", "unet", "vae"))
    frames = int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    return {"audio_length_in_s": frames * math.prod(vocoder["upsample_rates"]) / int(vocoder["sampling_rate"])}


def _wave_seconds(read: Read) -> dict[str, Any]:
    vae = read("vae/config.json")
    samples = int(read("transformer/config.json")["sample_size"]) * math.prod(vae["downsampling_ratios"])
    return {"audio_end_in_s": samples / int(vae["sampling_rate"])}


class AudioDiffusionConfig(LatentDiffusionConfig):
    """Sounds: AudioLDM (its condition is one CLAP vector), AudioLDM 2, Stable Audio.

    ``seconds`` is the length of what is made; the pipeline's own when not given.
    """

    media: ClassVar[str] = "audio"
    families: ClassVar[Mapping[str, Family]] = {
        "AudioLDMPipeline": Family(f"{MODULE}:AudioLDM", _audioldm, _mel_seconds),
        "AudioLDM2Pipeline": Family(f"{MODULE}:AudioLDM2", _audioldm2, _mel_seconds),
        "StableAudioPipeline": Family(f"{MODULE}:StableAudio", _stable_audio, _wave_seconds),
    }
    suggested: ClassVar[Mapping[str, Any]] = {
        "audio": {
            "pretrained": "cvssp/audioldm-l-full",
            "architecture": {"pipeline": "AudioLDMPipeline", "condition": {"text": [1, 512]}},
        }
    }
    kind: Literal["audio_diffusion"] = "audio_diffusion"
    seconds: Annotated[float, Field(gt=0)] | None = None

    def tiny(self) -> Self:
        return super().tiny().model_copy(update={"seconds": None})

    def size(self) -> dict[str, Any]:
        return {} if self.seconds is None else {"seconds": self.seconds}

    def target(self, context: BuildContext) -> MelTarget | WaveTarget:
        from mmllm.generators.targets import MelTarget, WaveTarget

        read = self._reader(context)
        if read is None:
            raise MmllmError(f"{self.kind} {self.pretrained}: how its targets are read is not known offline")
        own = self.full_size(context)
        seconds = self.seconds or own.get("audio_length_in_s") or own["audio_end_in_s"]
        if self.pipeline_class(context) == "StableAudioPipeline":
            vae, length = read("vae/config.json"), int(read("transformer/config.json")["sample_size"])
            samples = length * math.prod(vae["downsampling_ratios"])  # the latents always cover the whole length
            return WaveTarget(int(vae["sampling_rate"]), samples, int(vae["audio_channels"]))
        vocoder, vae = read("vocoder/config.json"), read("vae/config.json")
        hop, reduction = math.prod(vocoder["upsample_rates"]), 2 ** (len(vae["block_out_channels"]) - 1)
        rate = int(vocoder["sampling_rate"])
        frames = math.ceil(int(seconds * rate / hop) / reduction) * reduction
        return MelTarget(rate, hop, frames, int(vocoder["model_in_dim"]))
