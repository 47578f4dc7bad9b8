"""What the generators are compared with: diffusers' own pipelines, and training losses written out from their parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.generators.base import Condition
from mmllm.generators.diffusion_module import LatentDiffusion

Predict = Callable[[Tensor, Tensor], Tensor]  # what the denoiser gives for noisy latents at timesteps


def pipeline_of(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(count: int, first: int = 5) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def mean(error: Tensor) -> Tensor:
    return error.pow(2).flatten(1).mean(dim=1)


def diffusion_loss(pipeline: Any, clean: Tensor, draw: torch.Generator, predict: Predict) -> Tensor:
    """Noise, velocity or sample prediction, as the scheduler's config says, with min-SNR weights of 5 (arXiv 2303.09556)."""
    noise = torch.randn(clean.shape, generator=draw)
    steps = torch.randint(0, 1000, (len(clean),), generator=draw)
    kept = pipeline.scheduler.alphas_cumprod[steps]
    a, s = (root.view(-1, *[1] * (clean.ndim - 1)) for root in (kept.sqrt(), (1 - kept).sqrt()))
    found = predict(a * clean + s * noise, steps)
    snr, kind = kept / (1 - kept), pipeline.scheduler.config.prediction_type
    wanted, weight = {
        "epsilon": (noise, snr.clamp(max=5) / snr),
        "v_prediction": (a * noise - s * clean, snr.clamp(max=5) / (snr + 1)),
        "sample": (clean, snr.clamp(max=5)),
    }[kind]
    return mean(found - wanted) * weight


def flow_loss(pipeline: Any, clean: Tensor, draw: torch.Generator, predict: Predict) -> Tensor:
    """The velocity of flow matching at logit-normal times, shifted as the scheduler says (arXiv 2403.03206)."""
    noise = torch.randn(clean.shape, generator=draw)
    places = (torch.randn(len(clean), generator=draw).sigmoid() * 1000).long()
    shift = pipeline.scheduler.config.get("flow_shift") or pipeline.scheduler.config.shift
    linear = 1 - places / 1000
    sigma = shift * linear / (1 + (shift - 1) * linear)
    mix = sigma.view(-1, *[1] * (clean.ndim - 1))
    return mean(predict((1 - mix) * clean + mix * noise, 1000 * sigma) - (noise - clean))


def check_gradients(generator: LatentDiffusion, targets: Tensor, captions: list[str]) -> None:
    """The loss has a gradient to every stream of the condition and to nothing of the generator, which does not wake up."""
    text = generator.encode_text(captions)
    streams = {name: value.clone().requires_grad_() for name, value in text.streams.items()}
    assert not any(value.requires_grad for value in text.streams.values())
    generator.train()
    losses = generator.denoising_loss(Condition(streams, text.masks), targets, torch.Generator().manual_seed(0))
    assert losses.shape == (len(captions),)
    losses.sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in streams.values())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in generator.parameters())
    assert not any(module.training for module in generator.modules())


def check_stopping(generator: LatentDiffusion, caption: str) -> None:
    """Every step is told, and a refusal ends the work."""
    seen: list[tuple[int, int]] = []

    def go_on(done: int, total: int) -> bool:
        seen.append((done, total))
        return done < 2

    assert generator.generate(generator.encode_text([caption]), on_step=go_on) == []
    assert seen == [(1, 3), (2, 3)]


def check_padding(generator: LatentDiffusion, targets: Tensor, captions: list[str], stream: str = "text") -> None:
    """What stands behind a mask never reaches the denoiser; what stands before it does."""
    text = generator.encode_text(captions)
    mask = text.masks[stream]
    assert mask.any()
    assert not mask.all(), "some positions are padding"

    def loss(changed: Tensor) -> Tensor:
        other = Condition({**text.streams, stream: changed}, text.masks)
        return generator.denoising_loss(other, targets, torch.Generator().manual_seed(0))

    value, real = text[stream], mask[..., None]
    plain = loss(value)
    torch.testing.assert_close(loss(torch.where(real, value, value + 3)), plain, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(loss(torch.where(real, value + 3, value)), plain, atol=1e-6)
