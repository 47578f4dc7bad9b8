"""Models of discrete codes behind the ``CodeGenerator`` contract."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmllm.config.base import BuildContext
from mmllm.config.families import Codes
from mmllm.errors import CheckpointError, brief
from mmllm.generators.base import Artifact, CodeGenerator, Sound
from mmllm.generators.codes import PretrainedCodesConfig
from mmllm.pretrained import is_local


def load_model(config: PretrainedCodesConfig, context: BuildContext) -> Any:
    """The library's model, in float32: with its weights (safetensors only), or always the same random ones without any."""
    name, numbers = config.model(context)
    library = config.families[name].library
    cls = getattr(importlib.import_module(library), name)
    if config.pretrained is None:
        state = torch.get_rng_state()
        torch.manual_seed(0)  # the same weights in every process and after every load
        try:
            model = cls(**numbers) if library == "diffusers" else cls(cls.config_class(**numbers))
            for buffer, value in model.named_buffers():
                if buffer.endswith("codebook.embed"):  # EnCodec's codebooks are zero until they are read
                    value.normal_(0, 0.1)  # about as far apart as its encoder's outputs
            return model
        finally:
            torch.set_rng_state(state)
    reference = context.resolve(config.pretrained)
    options = {"subfolder": config.subfolder} if config.subfolder else {}
    try:
        return cls.from_pretrained(
            reference,
            revision=config.revision,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=is_local(reference),
            **options,
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load the generator {reference}: {brief(error)}") from error


class FrozenCodes(CodeGenerator):
    """A library's model with all parts frozen, always computing in float32: nearest codes are a matter of small
    differences.
    """

    def __init__(self, model: Any, codes: Codes) -> None:
        super().__init__()
        self.model, self.codes = model, codes
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, targets: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.codes_of(targets.to(self.device, torch.float32))

    def generate(
        self,
        codes: Tensor,
        sampling: Any = None,
        on_step: Callable[[int, int], bool] | None = None,
    ) -> list[Artifact]:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            made = self.decoded(codes.to(self.device))
        return made if on_step is None or on_step(1, 1) else []

    @abstractmethod
    def codes_of(self, targets: Tensor) -> Tensor:
        """``encode`` of float32 targets."""

    @abstractmethod
    def decoded(self, codes: Tensor) -> list[Artifact]:
        """The media of codes ``(N, P)``."""


class ImageVQ(FrozenCodes):
    """diffusers' VQModel. ``grid`` are the rows and columns of codes, which go row by row from the top left."""

    suffix: ClassVar[str] = ".png"

    def __init__(self, model: Any, codes: Codes, grid: tuple[int, int], pixel_range: tuple[float, float]) -> None:
        super().__init__(model, codes)
        self.grid, (self.low, self.high) = grid, pixel_range

    def codes_of(self, targets: Tensor) -> Tensor:
        pixels = self.low + (targets + 1) / 2 * (self.high - self.low)
        _, _, (_, _, codes) = self.model.quantize(self.model.encode(pixels).latents)
        found: Tensor = codes.view(len(targets), -1)
        return found

    def decoded(self, codes: Tensor) -> list[Artifact]:
        quantizer, shape = self.model.quantize, (len(codes), *self.grid, self.model.quantize.vq_embed_dim)
        flat = codes.flatten()
        given = flat if self.model.config.lookup_from_codebook else quantizer.get_codebook_entry(flat, shape)
        pixels = self.model.decode(given, force_not_quantize=True, shape=shape).sample
        shares = ((pixels - self.low) / (self.high - self.low)).clamp(0, 1)
        bytes_ = (shares * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        pictures: list[Any] = [Image.fromarray(picture) for picture in bytes_]
        return pictures


class AudioCodec(FrozenCodes):
    """What the sound families share: residual codes ``(N, codebooks, length)``."""

    suffix: ClassVar[str] = ".wav"

    def __init__(self, model: Any, codes: Codes, rate: int) -> None:
        super().__init__(model, codes)
        self.rate = rate

    @abstractmethod
    def residual(self, waves: Tensor) -> Tensor:
        """Codes of waves ``(N, 1, samples)``, of at least as many codebooks as are used."""

    @abstractmethod
    def waves(self, codes: Tensor) -> Tensor:
        """Waves of codes, ``(N, samples)``."""

    def codes_of(self, targets: Tensor) -> Tensor:
        # A codebook's codes are of what those before it left over, so the first ones are the same whatever follows.
        return self.residual(targets)[:, : self.codes.codebooks].transpose(1, 2).flatten(1)

    def decoded(self, codes: Tensor) -> list[Artifact]:
        stacked = codes.view(len(codes), self.codes.length, self.codes.codebooks).transpose(1, 2)
        waves = self.waves(stacked).clamp(-1, 1).cpu().numpy().astype(np.float32)
        return [Sound(wave, self.rate) for wave in waves]


class Encodec(AudioCodec):
    """transformers' EncodecModel without chunks."""

    def residual(self, waves: Tensor) -> Tensor:
        (codes,) = self.model.encode(waves, bandwidth=self.model.config.target_bandwidths[-1]).audio_codes
        found: Tensor = codes
        return found

    def waves(self, codes: Tensor) -> Tensor:
        found: Tensor = self.model.decode(codes[None], [None]).audio_values
        return found[:, 0]


class Dac(AudioCodec):
    """transformers' DacModel, the Descript audio codec."""

    def residual(self, waves: Tensor) -> Tensor:
        found: Tensor = self.model.encode(waves, n_quantizers=self.codes.codebooks).audio_codes
        return found

    def waves(self, codes: Tensor) -> Tensor:
        found: Tensor = self.model.decode(audio_codes=codes).audio_values
        return found
