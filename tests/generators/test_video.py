"""Clip generators equal the diffusers pipelines they are made of: tiny random folders, every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.config.base import BuildContext
from mmllm.generators.base import Clip, Condition
from mmllm.generators.diffusion_module import LatentDiffusion
from mmllm.generators.tiny import tiny_pipeline
from mmllm.generators.video import VideoDiffusionConfig

CAPTIONS = ["a circle moves left", "a star"]
CONTEXT = BuildContext(dtype=torch.float32)
SIZE: dict[str, Any] = {"width": 16, "height": 16, "num_frames": 5}


@pytest.fixture(scope="module", params=list(VideoDiffusionConfig.families))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    tiny_pipeline(request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def generator(folder: Path) -> LatentDiffusion:
    built = VideoDiffusionConfig(pretrained=str(folder), steps=2, guidance=3.0, **SIZE).build(CONTEXT)
    assert built is not None
    return built


def pipeline_of(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_clips_from_the_text_condition_equal_the_pipelines_own(folder: Path, generator: LatentDiffusion) -> None:
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    made = pipeline_of(folder)(CAPTIONS, num_inference_steps=2, guidance_scale=3.0, generator=seeds, **SIZE).frames
    expected = (np.asarray(made) * 255).round()
    found = generator.generate(generator.encode_text(CAPTIONS), generator.sampling.with_(seed=5))
    for clip, frames in zip(found, expected, strict=True):
        assert isinstance(clip, Clip)
        assert clip.frames_per_second == 8.0
        assert np.array_equal(np.stack([np.asarray(frame) for frame in clip.frames]), frames)  # measured: 0


def test_gradients_reach_the_condition_alone(folder: Path, generator: LatentDiffusion) -> None:
    config = VideoDiffusionConfig(pretrained=str(folder), **SIZE)
    frames = [Image.new("RGB", (20, 10), (20 * i, 0, 0)) for i in range(9)]
    target = config.target(CONTEXT)(frames)
    assert target.shape == (3, 5, 16, 16)
    assert (target[0, :, 0, 0] * 127.5 + 127.5).round().tolist() == [0, 40, 80, 120, 160]
    text = generator.encode_text(CAPTIONS)
    assert {k: tuple(v.shape[1:]) for k, v in text.streams.items()} == config.condition_shape(
        BuildContext(weights=False)
    )
    streams = {name: value.clone().requires_grad_() for name, value in text.streams.items()}
    losses = generator.denoising_loss(Condition(streams), torch.stack([target] * 2), torch.Generator().manual_seed(0))
    losses.sum().backward()
    assert losses.shape == (2,)
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in streams.values())
    assert not any(parameter.requires_grad for parameter in generator.parameters())


def test_the_denoising_loss_equals_one_made_of_the_pipelines_parts(folder: Path, generator: LatentDiffusion) -> None:
    from diffusers import DDPMScheduler

    pipeline, draw = pipeline_of(folder), torch.Generator().manual_seed(0)
    condition, targets = generator.encode_text(CAPTIONS), torch.rand(2, 3, 5, 16, 16) * 2 - 1
    vae = pipeline.vae
    if "Wan" in folder.name:
        mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        clean = (vae.encode(targets).latent_dist.sample(draw) - mean) / std
        noise = torch.randn(clean.shape, generator=draw)
        index = (torch.randn(2, generator=draw).sigmoid() * 1000).long()
        steps, sigma = pipeline.scheduler.timesteps[index], pipeline.scheduler.sigmas[index].view(2, 1, 1, 1, 1)
        noisy, wanted, weight = (1 - sigma) * clean + sigma * noise, noise - clean, torch.ones(2)
        found = pipeline.transformer(noisy, steps, condition["text"]).sample
    else:
        flat = vae.encode(targets.permute(0, 2, 1, 3, 4).reshape(10, 3, 16, 16)).latent_dist.sample(draw)
        clean = flat.view(2, 5, 4, 8, 8).permute(0, 2, 1, 3, 4) * vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=draw)
        process = DDPMScheduler.from_config(pipeline.scheduler.config)
        steps = torch.randint(0, 1000, (2,), generator=draw)
        found = pipeline.unet(process.add_noise(clean, noise, steps), steps, condition["text"]).sample
        snr = process.alphas_cumprod[steps] / (1 - process.alphas_cumprod[steps])
        wanted, weight = noise, snr.clamp(max=5.0) / snr
    expected = (found - wanted).pow(2).mean(dim=(1, 2, 3, 4)) * weight
    ours = generator.denoising_loss(condition, targets, torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_clip_is_saved_with_all_its_frames(tmp_path: Path) -> None:
    Clip([Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(4)], 10.0).save(tmp_path / "clip.gif")
    with Image.open(tmp_path / "clip.gif") as saved:
        assert (saved.n_frames, saved.info["duration"]) == (4, 100)  # type: ignore[attr-defined]
