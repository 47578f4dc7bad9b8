"""Our generators equal the diffusers pipelines they are made of: tiny random folders, every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmllm.config.base import BuildContext
from mmllm.errors import CheckpointError
from mmllm.generators.base import Condition, Sampling
from mmllm.generators.diffusion_module import LatentDiffusion
from mmllm.generators.image import StableDiffusionConfig
from mmllm.generators.tiny import tiny_pipeline

FAMILIES = list(StableDiffusionConfig.families)
CAPTIONS = ["a red circle", "two blue stars"]
CONTEXT = BuildContext(dtype=torch.float32)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    tiny_pipeline(request.param).save_pretrained(path)
    return path


def side(folder: Path) -> int:
    return 32 if "Sana" in folder.name else 16


@pytest.fixture(scope="module")
def generator(folder: Path) -> LatentDiffusion:
    size = side(folder)
    built = StableDiffusionConfig(pretrained=str(folder), steps=3, guidance=4.0, width=size, height=size).build(CONTEXT)
    assert built is not None
    return built


def pixels(pictures: list[Any]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(picture, dtype=np.int16) for picture in pictures])


def test_pictures_from_the_text_condition_equal_the_pipelines_own(folder: Path, generator: LatentDiffusion) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    extra = {"use_resolution_binning": False} if "Sana" in folder.name else {}
    size = side(folder)
    expected = pipeline(
        CAPTIONS,
        width=size,
        height=size,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        **extra,
    ).images
    found = generator.generate(generator.encode_text(CAPTIONS), generator.sampling.with_(seed=5))
    assert np.array_equal(pixels(found), pixels(expected))  # measured: 0
    other = generator.generate(generator.encode_text(CAPTIONS[::-1]), generator.sampling.with_(seed=5))
    assert not np.array_equal(pixels(other), pixels(found)), "the condition does something"


def test_the_shape_is_known_from_json_alone(folder: Path, generator: LatentDiffusion) -> None:
    shapes = StableDiffusionConfig(pretrained=str(folder)).condition_shape(BuildContext(weights=False))
    condition = generator.encode_text(CAPTIONS)
    assert {name: tuple(value.shape[1:]) for name, value in condition.streams.items()} == shapes
    assert not any(value.requires_grad for value in condition.streams.values())


def test_gradients_reach_the_condition_and_nothing_of_the_generator(folder: Path, generator: LatentDiffusion) -> None:
    target = StableDiffusionConfig(pretrained=str(folder), width=side(folder), height=side(folder)).target(CONTEXT)
    targets = torch.stack([target(Image.new("RGB", (40, 20), color)) for color in ("red", "blue")])
    text = generator.encode_text(CAPTIONS)
    streams = {name: value.clone().requires_grad_() for name, value in text.streams.items()}
    generator.train()
    losses = generator.denoising_loss(Condition(streams, text.masks), targets, torch.Generator().manual_seed(0))
    assert losses.shape == (2,)
    losses.sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in streams.values())
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    assert not any(module.training for module in generator.modules())


def reference_loss(pipeline: Any, folder: Path, condition: Condition, targets: Tensor) -> Tensor:
    """The training loss of diffusers' own example scripts for these families, from the same random numbers."""
    from diffusers import DDPMScheduler

    draw = torch.Generator().manual_seed(0)
    clean = pipeline.vae.encode(targets).latent_dist.sample(draw) * pipeline.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=draw)
    process = DDPMScheduler.from_config(pipeline.scheduler.config)
    steps = torch.randint(0, 1000, (2,), generator=draw)
    more = {}
    if "XL" in folder.name:
        ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)
        more = {"added_cond_kwargs": {"text_embeds": condition["pooled"][:, 0], "time_ids": ids}}
    noisy = process.add_noise(clean, noise, steps)
    found = pipeline.unet(noisy, steps, encoder_hidden_states=condition["text"], **more).sample
    snr = process.alphas_cumprod[steps] / (1 - process.alphas_cumprod[steps])
    weights = torch.minimum(snr, torch.tensor(5.0)) / snr
    losses: Tensor = (found - noise).pow(2).mean(dim=(1, 2, 3)) * weights
    return losses


@pytest.mark.parametrize("folder", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"], indirect=True)
def test_the_denoising_loss_equals_one_made_of_the_pipelines_parts(folder: Path, generator: LatentDiffusion) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    condition, targets = generator.encode_text(CAPTIONS), torch.rand(2, 3, 16, 16) * 2 - 1
    found = generator.denoising_loss(condition, targets, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, reference_loss(pipeline, folder, condition, targets), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("folder", ["StableDiffusion3Pipeline"], indirect=True)
def test_the_flow_loss_equals_one_made_of_the_pipelines_parts(folder: Path, generator: LatentDiffusion) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    condition, targets = generator.encode_text(CAPTIONS), torch.rand(2, 3, 16, 16) * 2 - 1
    found = generator.denoising_loss(condition, targets, torch.Generator().manual_seed(0))

    draw, vae = torch.Generator().manual_seed(0), pipeline.vae
    clean = (vae.encode(targets).latent_dist.sample(draw) - vae.config.shift_factor) * vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=draw)
    index = (torch.randn(2, generator=draw).sigmoid() * 1000).long()
    steps, sigma = pipeline.scheduler.timesteps[index], pipeline.scheduler.sigmas[index].view(2, 1, 1, 1)
    velocity = pipeline.transformer(
        hidden_states=(1 - sigma) * clean + sigma * noise,
        timestep=steps,
        encoder_hidden_states=condition["text"],
        pooled_projections=condition["pooled"][:, 0],
    ).sample
    expected = (velocity - (noise - clean)).pow(2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_steps_are_counted_and_a_refusal_stops(generator: LatentDiffusion) -> None:
    seen: list[tuple[int, int]] = []
    condition = generator.encode_text(CAPTIONS[:1])

    def go_on(done: int, total: int) -> bool:
        seen.append((done, total))
        return done < 2

    assert generator.generate(condition, on_step=go_on) == []
    assert seen == [(1, 3), (2, 3)]


def test_an_item_depends_on_its_own_seed_only(generator: LatentDiffusion) -> None:
    condition = generator.encode_text([CAPTIONS[0]] * 2)
    how = generator.sampling.with_(seed=7)
    first, second = generator.generate(condition, how)
    alone = generator.generate(condition.at(torch.tensor([0])), how.with_(seed=8))
    assert np.abs(pixels([second]) - pixels(alone)).max() <= 1  # batched kernels round otherwise
    assert not np.array_equal(pixels([first]), pixels([second]))


def test_wrong_folders_and_architectures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(CheckpointError, match="found a DDPMPipeline, expected one of StableDiffusionPipeline"):
        StableDiffusionConfig(pretrained=str(tmp_path)).condition_shape(BuildContext(weights=False))
    tiny_pipeline("StableDiffusionPipeline").save_pretrained(tmp_path / "sd")
    wrong = StableDiffusionConfig(pretrained=str(tmp_path / "sd"), architecture={"condition": {"text": [77, 768]}})
    with pytest.raises(CheckpointError, match=r"its condition is .*16, 32.*says .*77, 768"):
        wrong.condition_shape(BuildContext(weights=False))


def test_sampling_changes_are_merged() -> None:
    how = Sampling(steps=5, size={"width": 64}).with_(steps=None, guidance=2.0, height=32, seed=0)
    assert how == Sampling(5, 2.0, None, 0, {"width": 64, "height": 32})
