"""Our generators equal the diffusers pipelines they are made of: tiny random folders, every family."""

from __future__ import annotations

from collections.abc import Callable
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

from .references import check_gradients, check_padding, check_stopping, diffusion_loss, flow_loss, pipeline_of, seeds

FAMILIES = list(StableDiffusionConfig.families)
CAPTIONS = ["a red circle", "two blue stars"]
CONTEXT = BuildContext(dtype=torch.float32)


def side(folder: Path) -> int:
    return 32 if "Sana" in folder.name else 16


def config_of(folder: Path, **more: Any) -> StableDiffusionConfig:
    return StableDiffusionConfig(
        pretrained=str(folder), steps=3, guidance=4.0, width=side(folder), height=side(folder), **more
    )


@pytest.fixture(scope="module")
def generator(folder: Path) -> LatentDiffusion:
    return config_of(folder).build(CONTEXT)  # type: ignore[return-value]


def pixels(pictures: list[Any]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(picture, dtype=np.int16) for picture in pictures])


def own_pictures(folder: Path, **options: Any) -> np.ndarray[Any, Any]:
    extra = {"use_resolution_binning": False} if "Sana" in folder.name else {}
    size = {"width": side(folder), "height": side(folder)}
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "generator": seeds(2), **size, **extra, **options}
    return pixels(pipeline_of(folder)(CAPTIONS, **call).images)


def test_pictures_from_the_text_condition_equal_the_pipelines_own(folder: Path, generator: LatentDiffusion) -> None:
    how = generator.sampling.with_(seed=5)
    found = pixels(generator.generate(generator.encode_text(CAPTIONS), how))
    assert np.array_equal(found, own_pictures(folder))  # measured: 0
    other = generator.generate(generator.encode_text(CAPTIONS[::-1]), how)
    assert not np.array_equal(pixels(other), found), "the condition does something"


def test_pictures_without_guidance_equal_the_pipelines_own(folder: Path, generator: LatentDiffusion) -> None:
    found = generator.generate(generator.encode_text(CAPTIONS), generator.sampling.with_(seed=5, guidance=1.0))
    assert np.array_equal(pixels(found), own_pictures(folder, guidance_scale=1.0))  # measured: 0


@pytest.mark.parametrize("folder", [name for name in FAMILIES if "Flux" not in name], indirect=True)
def test_a_negative_text_is_the_pipelines_negative_prompt(folder: Path, generator: LatentDiffusion) -> None:
    found = generator.generate(generator.encode_text(CAPTIONS), generator.sampling.with_(seed=5, negative="dark"))
    expected = own_pictures(folder, negative_prompt=["dark", "dark"])
    assert np.array_equal(pixels(found), expected)  # measured: 0
    assert not np.array_equal(expected, own_pictures(folder)), "it does something"


def test_the_shape_is_known_from_json_alone(folder: Path, generator: LatentDiffusion) -> None:
    shapes = StableDiffusionConfig(pretrained=str(folder)).condition_shape(BuildContext(weights=False))
    condition = generator.encode_text(CAPTIONS)
    assert {name: tuple(value.shape[1:]) for name, value in condition.streams.items()} == shapes
    # Only Sana's denoiser is told which positions are padding.
    assert bool(condition.masks) == ("Sana" in folder.name)


def test_gradients_reach_the_condition_and_nothing_of_the_generator(folder: Path, generator: LatentDiffusion) -> None:
    target = config_of(folder).target(CONTEXT)
    targets = torch.stack([target(Image.new("RGB", (40, 20), color)) for color in ("red", "blue")])
    check_gradients(generator, targets, CAPTIONS)


def latents_of(pipeline: Any, targets: Tensor, draw: torch.Generator) -> Tensor:
    config = pipeline.vae.config
    if "AutoencoderDC" in type(pipeline.vae).__name__:
        return pipeline.vae.encode(targets).latent * config.scaling_factor  # type: ignore[no-any-return]
    found = pipeline.vae.encode(targets).latent_dist.sample(draw)
    return (found - (config.shift_factor or 0)) * config.scaling_factor  # type: ignore[no-any-return]


def sd_loss(pipeline: Any, condition: Condition, targets: Tensor, draw: torch.Generator) -> Tensor:
    def predict(noisy: Tensor, steps: Tensor) -> Tensor:
        return pipeline.unet(noisy, steps, encoder_hidden_states=condition["text"]).sample  # type: ignore[no-any-return]

    return diffusion_loss(pipeline, latents_of(pipeline, targets, draw), draw, predict)


def sdxl_loss(pipeline: Any, condition: Condition, targets: Tensor, draw: torch.Generator) -> Tensor:
    # Original size, corner of the crop, target size.
    more = {"text_embeds": condition["pooled"][:, 0], "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}

    def predict(noisy: Tensor, steps: Tensor) -> Tensor:
        return pipeline.unet(noisy, steps, condition["text"], added_cond_kwargs=more).sample  # type: ignore[no-any-return]

    return diffusion_loss(pipeline, latents_of(pipeline, targets, draw), draw, predict)


def sd3_loss(pipeline: Any, condition: Condition, targets: Tensor, draw: torch.Generator) -> Tensor:
    def predict(noisy: Tensor, steps: Tensor) -> Tensor:
        return pipeline.transformer(  # type: ignore[no-any-return]
            hidden_states=noisy,
            timestep=steps,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"][:, 0],
        ).sample

    return flow_loss(pipeline, latents_of(pipeline, targets, draw), draw, predict)


def flux_loss(pipeline: Any, condition: Condition, targets: Tensor, draw: torch.Generator) -> Tensor:
    """Flux's transformer sees 2 x 2 latents as one position; their rows and columns are its image ids."""

    def predict(noisy: Tensor, steps: Tensor) -> Tensor:
        count, channels, height, width = noisy.shape
        blocks = noisy.reshape(count, channels, height // 2, 2, width // 2, 2)
        ids = torch.tensor([[0.0, row, column] for row in range(height // 2) for column in range(width // 2)])
        out = pipeline.transformer(
            hidden_states=blocks.permute(0, 2, 4, 1, 3, 5).reshape(count, height * width // 4, channels * 4),
            timestep=steps / 1000,
            guidance=torch.ones(count),
            pooled_projections=condition["pooled"][:, 0],
            encoder_hidden_states=condition["text"],
            txt_ids=torch.zeros(condition["text"].shape[1], 3),
            img_ids=ids,
        ).sample
        whole: Tensor = out.reshape(count, height // 2, width // 2, channels, 2, 2)
        return whole.permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)

    return flow_loss(pipeline, latents_of(pipeline, targets, draw), draw, predict)


def sana_loss(pipeline: Any, condition: Condition, targets: Tensor, draw: torch.Generator) -> Tensor:
    def predict(noisy: Tensor, steps: Tensor) -> Tensor:
        return pipeline.transformer(  # type: ignore[no-any-return]
            noisy,
            encoder_hidden_states=condition["text"],
            encoder_attention_mask=condition.masks["text"],
            timestep=steps * pipeline.transformer.config.timestep_scale,
        ).sample

    return flow_loss(pipeline, latents_of(pipeline, targets, draw), draw, predict)


LOSSES = dict(zip(FAMILIES, (sd_loss, sdxl_loss, sd3_loss, flux_loss, sana_loss), strict=True))


def loss_pair(folder: Path, name: str, generator: LatentDiffusion) -> tuple[Tensor, Tensor]:
    """Our loss and the reference's, from the same random numbers."""
    targets = torch.rand(2, 3, side(folder), side(folder)) * 2 - 1
    condition = generator.encode_text(CAPTIONS)
    found = generator.denoising_loss(condition, targets, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = LOSSES[name](pipeline_of(folder), condition, targets, torch.Generator().manual_seed(0))
    return found, expected


def test_the_denoising_loss_equals_one_made_of_the_pipelines_parts(folder: Path, generator: LatentDiffusion) -> None:
    found, expected = loss_pair(folder, type(generator.pipeline).__name__, generator)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_schedulers_that_predict_something_else_train_it(
    kind: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Stable Diffusion 2.1 predicts the velocity."""
    name = "StableDiffusionPipeline"
    pipeline = pipeline_of(saved(name))
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type=kind)
    pipeline.save_pretrained(tmp_path)
    generator: Any = config_of(tmp_path).build(CONTEXT)
    found, expected = loss_pair(tmp_path, name, generator)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    made = generator.generate(generator.encode_text(CAPTIONS), generator.sampling.with_(seed=5))
    assert np.array_equal(pixels(made), own_pictures(tmp_path))


def test_the_guidance_embedding_is_left_out_where_the_model_has_none(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Flux schnell."""
    from diffusers import FluxTransformer2DModel

    pipeline = pipeline_of(saved("FluxPipeline"))
    numbers = {**pipeline.transformer.config, "guidance_embeds": False}
    pipeline.register_modules(transformer=FluxTransformer2DModel.from_config(numbers).eval())
    pipeline.save_pretrained(tmp_path)
    generator: Any = config_of(tmp_path).build(CONTEXT)
    losses = generator.denoising_loss(generator.encode_text(CAPTIONS), torch.zeros(2, 3, 16, 16))
    assert losses.isfinite().all()
    made = generator.generate(generator.encode_text(CAPTIONS), generator.sampling.with_(seed=5))
    assert np.array_equal(pixels(made), own_pictures(tmp_path))


@pytest.mark.parametrize("folder", ["SanaPipeline"], indirect=True)
def test_padding_never_reaches_the_denoiser(folder: Path, generator: LatentDiffusion) -> None:
    check_padding(generator, torch.rand(2, 3, 32, 32), CAPTIONS)


def test_steps_are_counted_and_a_refusal_stops(generator: LatentDiffusion) -> None:
    check_stopping(generator, CAPTIONS[0])


def test_an_item_depends_on_its_own_seed_only(generator: LatentDiffusion) -> None:
    condition = generator.encode_text([CAPTIONS[0]] * 2)
    how = generator.sampling.with_(seed=7)
    first, second = generator.generate(condition, how)
    alone = generator.generate(condition.at(torch.tensor([0])), how.with_(seed=8))
    assert np.abs(pixels([second]) - pixels(alone)).max() <= 1  # batched kernels round otherwise
    assert not np.array_equal(pixels([first]), pixels([second]))


def test_wrong_folders_and_architectures_are_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(CheckpointError, match="found a DDPMPipeline, expected one of StableDiffusionPipeline"):
        StableDiffusionConfig(pretrained=str(tmp_path)).condition_shape(BuildContext(weights=False))
    sd = str(saved("StableDiffusionPipeline"))
    wrong = StableDiffusionConfig(pretrained=sd, architecture={"condition": {"text": [77, 768]}})
    with pytest.raises(CheckpointError, match=r"its condition is .*16, 32.*says .*77, 768"):
        wrong.condition_shape(BuildContext(weights=False))


def test_sampling_changes_are_merged() -> None:
    how = Sampling(steps=5, size={"width": 64}).with_(steps=None, guidance=2.0, height=32, seed=0)
    assert how == Sampling(5, 2.0, None, 0, {"width": 64, "height": 32})
