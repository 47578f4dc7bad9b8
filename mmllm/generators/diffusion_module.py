"""A diffusers pipeline behind the generator contract."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from logging import LogRecord
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmllm.config.base import BuildContext, suggest
from mmllm.config.families import Shape
from mmllm.errors import CheckpointError, ConfigError
from mmllm.generators.base import Artifact, Condition, Generator, Sampling
from mmllm.generators.diffusion import LatentDiffusionConfig
from mmllm.pretrained import is_local

MIN_SNR = 5.0  # gamma of arXiv 2303.09556


def load_generator(config: LatentDiffusionConfig, context: BuildContext) -> LatentDiffusion:
    """The generator with its weights, or with random ones when ``context.weights`` is false or nothing is named."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.get_logger("diffusers.pipelines.pipeline_utils").addFilter(_concerns_users)
    name = config.pipeline_class(context)
    if config.pretrained is None:
        from mmllm.generators.tiny import tiny_pipeline

        pipeline = tiny_pipeline(name)
    else:
        reference = context.resolve(config.pretrained)
        try:
            pipeline = DiffusionPipeline.from_pretrained(
                reference,
                revision=config.revision,
                dtype=context.dtype,
                use_safetensors=True,
                local_files_only=is_local(reference),
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot load the generator {reference}: {error}") from error
    if config.scheduler is not None:
        pipeline.scheduler = make_scheduler(config.scheduler, pipeline.scheduler.config)
    module, _, cls = config.families[name].module.partition(":")
    sampling = Sampling(config.steps, config.guidance, config.negative, config.seed, config.size())
    generator: LatentDiffusion = getattr(importlib.import_module(module), cls)(
        pipeline, config.condition_shape(context), sampling, config.condition_length
    )
    return generator.to(context.dtype)


def _concerns_users(record: LogRecord) -> bool:
    """Not that a family (AudioLDM, ModelScope) is maintained no longer, at every load: its checkpoints are what they are."""
    return "will not receive bug fixes" not in record.getMessage()


def make_scheduler(name: str, numbers: Any) -> Any:
    """A diffusers scheduler by its class name, with the folder's numbers."""
    import diffusers

    known = [word for word in dir(diffusers) if word.endswith("Scheduler")]
    if name not in known:
        raise ConfigError([("scheduler", f"unknown scheduler {name!r}{suggest(name, known)}")])
    return getattr(diffusers, name).from_config(numbers)


class LatentDiffusion(Generator):
    """A latent-diffusion pipeline with all parts frozen.

    Subclasses say what the pipeline's arguments of the condition are called and how its denoiser is asked. ``denoiser``
    is the name of that part; ``arguments`` maps a stream to the pipeline's argument (its negative is ``negative_`` + that);
    ``vectors`` are the streams that the pipeline takes as ``(N, D)``; ``mask_argument`` is the text's mask, if it has one.
    """

    denoiser: ClassVar[str] = "unet"
    arguments: ClassVar[dict[str, str]] = {"text": "prompt_embeds"}
    vectors: ClassVar[frozenset[str]] = frozenset({"pooled"})
    mask_argument: ClassVar[str | None] = None

    def __init__(
        self, pipeline: Any, condition_shape: dict[str, Shape], sampling: Sampling, condition_length: int | None
    ) -> None:
        super().__init__()
        self.pipeline, self.condition_shape, self.sampling = pipeline, condition_shape, sampling
        self.condition_length = condition_length
        pipeline.set_progress_bar_config(disable=True)
        # Registered under their own names, so that moving this module moves the pipeline's parts.
        self.parts = nn.ModuleDict({n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module)})
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return next(self.parts[self.denoiser].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parts[self.denoiser].parameters()).dtype

    # The condition ----------------------------------------------------------------------------------------------------
    @abstractmethod
    def encode(self, prompts: list[str], negatives: list[str] | None) -> tuple[Condition, Condition]:
        """The pipeline's text condition of ``prompts``, and of ``negatives`` (None: its own unconditional one)."""

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Condition:
        return self.encode(list(captions), None)[0]

    def fingerprint(self) -> str:
        from transformers import PreTrainedModel, PreTrainedTokenizerBase

        total = hashlib.sha256(super().fingerprint().encode())
        for name, part in sorted(self.pipeline.components.items()):
            if isinstance(part, nn.Module):
                # Numbers that no tensor shows, such as the activation. Private ones tell where it was loaded from.
                config: Any = part.config
                numbers = dict(config.to_dict() if isinstance(part, PreTrainedModel) else config)
                numbers = {key: value for key, value in numbers.items() if not key.startswith("_")}
                total.update(f"{name} {json.dumps(numbers, sort_keys=True, default=str)}\n".encode())
            elif isinstance(part, PreTrainedTokenizerBase):
                total.update(f"{name} {_files(part)}\n".encode())
        return total.hexdigest()

    @torch.no_grad()
    def against(self, count: int, negative: str | None = None) -> Condition | None:
        """What classifier-free guidance moves away from, for ``count`` items: the generator's own unconditional
        condition, or that of the text ``negative``. None where the pipeline makes it itself.
        """
        return self.encode([""] * count, None if negative is None else [negative] * count)[1]

    def defaults(self) -> dict[str, float]:
        call = inspect.signature(self.pipeline.__call__).parameters
        names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
        return {name: call[argument].default for name, argument in names.items()} | super().defaults()

    # Training ---------------------------------------------------------------------------------------------------------
    @property
    def autoencoder(self) -> nn.Module:
        """The part that ``encode_targets`` is computed with."""
        return self.parts["vae"]

    @torch.no_grad()
    def encode_targets(self, targets: Tensor) -> Tensor:
        """What the autoencoder says of prepared targets ``(N, …)``, a row each: the parameters of the distribution that
        their latents are drawn from, or the latents themselves where it has none. Draws nothing.
        """
        return self.posterior(targets.to(self.device, self.dtype))

    @abstractmethod
    def posterior(self, targets: Tensor) -> Tensor:
        """See ``encode_targets``; ``targets`` are on the module's device, in its dtype."""

    @abstractmethod
    def latents(self, encoded: Tensor, generator: torch.Generator | None) -> Tensor:
        """Scaled latents as the denoiser meets them, drawn from what ``encode_targets`` said."""

    @abstractmethod
    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The denoiser's output for noised latents at ``timesteps (N,)``."""

    def denoising_loss(self, condition: Condition, targets: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Noise prediction with min-SNR weights (arXiv 2303.09556), or the velocity of flow matching (arXiv 2210.02747)."""
        return self.loss_of_encoded(condition, self.encode_targets(targets), generator)

    def loss_of_encoded(
        self, condition: Condition, encoded: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """``denoising_loss`` of targets of which ``encode_targets`` has said ``encoded``; draws the same numbers."""
        with torch.no_grad():
            clean = self.latents(encoded, generator)
            noise = torch.randn(clean.shape, generator=generator, dtype=torch.float32).to(clean)
            scheduler = self.pipeline.scheduler
            noisy, wanted, timesteps, weights = _noising(scheduler)(scheduler, clean, noise, generator)
        found = self.denoise(noisy, timesteps, condition.to(self.device, self.dtype))
        # Some denoisers predict the variance behind the noise.
        error = (found[:, : wanted.shape[1]].float() - wanted.float()).pow(2).flatten(1).mean(dim=1)
        return error * weights

    # Generation -------------------------------------------------------------------------------------------------------
    def call_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Any]:
        """The condition as arguments of the pipeline's call."""
        given: dict[str, Any] = {}
        for prefix, side in (("", condition), ("negative_", negative)):
            for name, value in side.streams.items() if side is not None else ():
                # A stream that is one vector goes in without its axis of positions.
                given[prefix + self.arguments[name]] = value[:, 0] if name in self.vectors else value
            if side is not None and self.mask_argument is not None:
                given[prefix + self.mask_argument] = side.mask("text").long()
        return given

    def size_arguments(self, size: dict[str, Any]) -> dict[str, Any]:
        """``Sampling.size`` as arguments of the pipeline's call."""
        return size

    @abstractmethod
    def outputs(self, result: Any) -> list[Artifact]:
        """The media in a pipeline's result."""

    @torch.no_grad()
    def generate(
        self,
        condition: Condition,
        sampling: Sampling | None = None,
        on_step: Callable[[int, int], bool] | None = None,
    ) -> list[Artifact]:
        how = sampling or self.sampling
        count = len(condition)
        condition = condition.to(self.device, self.dtype)
        given = self.call_arguments(condition, self.against(count, how.negative))
        if how.steps is not None:
            given["num_inference_steps"] = how.steps
        if how.guidance is not None:
            given["guidance_scale"] = how.guidance
        if how.seed is not None:
            given["generator"] = [torch.Generator("cpu").manual_seed(how.seed + i) for i in range(count)]
        try:
            return self.outputs(self.pipeline(**given, **self.size_arguments(how.size), **self._watch(on_step)))
        except Stopped:
            return []

    def _watch(self, on_step: Callable[[int, int], bool] | None) -> dict[str, Any]:
        """The pipeline's own step callback."""

        def after(pipeline: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None and not on_step(step + 1, pipeline.num_timesteps):
                raise Stopped
            return values

        return {"callback_on_step_end": after}


def _files(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer saves, by file. How the last text was cut and padded is kept there too, and is no part of it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
    files: dict[str, Any] = {}
    for name, text in texts.items():
        value = json.loads(text) if name.endswith(".json") else text
        last_use = ("truncation", "padding") if name == "tokenizer.json" else ()
        files[name] = {key: value[key] for key in value if key not in last_use} if isinstance(value, dict) else value
    return files


class Stopped(Exception):
    """Ends a pipeline's call from within its step callback."""


def drawn(parameters: Tensor, generator: torch.Generator | None) -> Tensor:
    """A sample of an autoencoder's Gaussian with these ``parameters``, means and logarithms of variances side by side."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    sample: Tensor = DiagonalGaussianDistribution(parameters).sample(generator)
    return sample


Noised = tuple[Tensor, Tensor, Tensor, Tensor]  # noisy latents, what is to be predicted, timesteps (N,), weights (N,)


def older_watch(pipeline: Any, on_step: Callable[[int, int], bool] | None) -> dict[str, Any]:
    """The step callback of pipelines from before ``callback_on_step_end``."""

    def after(step: int, *_: Any) -> None:
        if on_step is not None and not on_step(step + 1, len(pipeline.scheduler.timesteps)):
            raise Stopped

    return {"callback": after, "callback_steps": 1}


def _noising(scheduler: Any) -> Callable[..., Noised]:
    """How the models that a scheduler samples are trained."""
    if type(scheduler).__name__ == "CosineDPMSolverMultistepScheduler":
        return _cosine
    flow = type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas")
    return _flow if flow else _diffusion


def _diffusion(scheduler: Any, clean: Tensor, noise: Tensor, generator: torch.Generator | None) -> Noised:
    from diffusers import DDPMScheduler

    process = DDPMScheduler.from_config(scheduler.config)
    steps = torch.randint(0, process.config.num_train_timesteps, (len(clean),), generator=generator).to(clean.device)
    noisy = process.add_noise(clean, noise, steps)
    alphas = process.alphas_cumprod.to(clean.device)[steps]
    snr = alphas / (1 - alphas)
    kind = process.config.prediction_type
    if kind == "v_prediction":
        return noisy, process.get_velocity(clean, noise, steps), steps, snr.clamp(max=MIN_SNR) / (snr + 1)
    if kind == "sample":
        return noisy, clean, steps, snr.clamp(max=MIN_SNR)
    return noisy, noise, steps, snr.clamp(max=MIN_SNR) / snr


def _flow(scheduler: Any, clean: Tensor, noise: Tensor, generator: torch.Generator | None) -> Noised:
    """Timesteps from the logit-normal distribution of SD3 (arXiv 2403.03206), through the scheduler's own shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    shift = scheduler.config.get("flow_shift") or scheduler.config.get("shift") or 1.0
    process = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=scheduler.config.num_train_timesteps, shift=float(shift)
    )
    uniform = torch.randn(len(clean), generator=generator).sigmoid()
    index = (uniform * process.config.num_train_timesteps).long()
    steps, sigmas = process.timesteps[index].to(clean.device), process.sigmas[index].to(clean)
    sigmas = sigmas.view(-1, *[1] * (clean.ndim - 1))
    noisy = (1 - sigmas) * clean + sigmas * noise
    return noisy, noise - clean, steps, torch.ones(len(clean), device=clean.device)


def _cosine(scheduler: Any, clean: Tensor, noise: Tensor, generator: torch.Generator | None) -> Noised:
    """Velocity at angles uniform in a quarter turn, times from 0 to 1: Stable Audio (arXiv 2404.10301)."""
    times = torch.rand(len(clean), generator=generator).to(clean.device)
    angle = (times * torch.pi / 2).view(-1, *[1] * (clean.ndim - 1)).to(clean.dtype)
    noisy, velocity = angle.cos() * clean + angle.sin() * noise, angle.cos() * noise - angle.sin() * clean
    return noisy, velocity, times, torch.ones(len(clean), device=clean.device)
