"""Train the embedded assistant's picture generator from nothing: a latent-diffusion model in diffusers' layout.

    python demo/train_image_generator.py --output runs/embedded/draw --minutes 90 --seed 0

Three parts, one after the other, saved as an ordinary ``StableDiffusionPipeline`` folder: the autoencoder, the text encoder
(`caption_encoder`), and the denoiser, a U-Net on the autoencoder's 16 x 16 latents trained to predict the velocity
(arXiv 2202.00512). Wishes for the test (`drawings.held_out`) are never drawn here.
`--resume` goes on from the newest checkpoint.
"""

from __future__ import annotations

import random
from typing import Any

from caption_encoder import nothing, text_part
from drawings import (
    BACKGROUNDS,
    MOST_ITEMS,
    PLACES,
    RELATIONS,
    SIDE,
    Wish,
    caption,
    place_items,
    training_round,
    wishes,
)
from generator_training import (
    CaptionedBank,
    arguments,
    build_scheduler,
    export,
    pixels,
    train_denoiser,
    train_vae,
)
from PIL import Image
from scene_model import COLORS, SHAPES, Item, Scene, render
from torch import Tensor

LENGTH = 32  # text positions
TEXT_WIDTH, TEXT_LAYERS = 160, 3
LATENT_CHANNELS = 4
WIDTHS = (64, 128)  # of the denoiser at 16 x 16 and 8 x 8; only the latter reads the text
VAE_SHARE = 0.2  # of the minutes
BANK = 6144  # drawings kept encoded at a time


# --- the autoencoder --------------------------------------------------------------------------------------------------


def build_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )


def crowded(rng: random.Random) -> Scene:
    """Shapes in most cells of the grid: more to learn from than in a drawing, and nothing else."""
    background = rng.choice(tuple(BACKGROUNDS))
    colors = [name for name in COLORS if name != background]
    items = []
    for cell in rng.sample(range(9), rng.choice((3, 6, 8, 9))):
        color, size = rng.choice(colors), rng.choice((11, 12))
        row, column = divmod(cell, 3)
        x, y = (round((2 * k + 1) * SIDE / 6 - size / 2) + rng.randint(-4, 4) for k in (column, row))
        items.append(Item(rng.choice(SHAPES), color, size, x, y, COLORS[color]))
    return Scene("canvas", SIDE, SIDE, BACKGROUNDS[background], ((0, 0, SIDE, SIDE),), tuple(items))


def typical() -> list[Image.Image]:
    rng = random.Random("scale")
    return [render(place_items(wishes(rng, False), rng)) for _ in range(128)]


# --- captions ---------------------------------------------------------------------------------------------------------

CLASSES = (*3 * (MOST_ITEMS, len(COLORS), len(SHAPES), len(PLACES) + 1), len(RELATIONS) + 1, len(BACKGROUNDS))


def facts(wish: Wish) -> tuple[int, ...]:
    """Classes of everything a caption says: count, colour, shape and place of each group, relation, background."""
    found: list[int] = []
    for group in wish.groups:
        place = PLACES.index(group.place) + 1 if group.place else 0
        found += [group.count - 1, list(COLORS).index(group.color), SHAPES.index(group.shape), place]
    found += [-1] * (12 - len(found))
    return (
        *found,
        RELATIONS.index(wish.relation) + 1 if wish.relation else 0,
        list(BACKGROUNDS).index(wish.background),
    )


def captioned(rng: random.Random) -> tuple[str, tuple[int, ...]]:
    wish = wishes(rng, test=False)
    return caption(wish), facts(wish)


# --- the denoiser -----------------------------------------------------------------------------------------------------


def build_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=tuple(width // 32 for width in WIDTHS),  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


# --- the run ----------------------------------------------------------------------------------------------------------


def main() -> None:
    from diffusers import StableDiffusionPipeline

    given = arguments(__doc__, minutes=90.0)
    work, seed, resume = given.output / "training", given.seed, given.resume
    shape = (LENGTH, TEXT_WIDTH, TEXT_LAYERS)
    tokenizer, encoder = text_part(work / "text", captioned, CLASSES, shape, given.text_steps, seed, resume)
    minutes = VAE_SHARE * given.minutes
    vae = train_vae(
        build_vae(), lambda rng: render(crowded(rng)), typical, work / "vae.safetensors", minutes, seed, resume
    )
    unet = build_unet()

    def draw(number: int, count: int) -> tuple[list[str], list[Image.Image]]:
        drawn = training_round(seed, number, count)
        return [caption(wish) for wish, _ in drawn], [render(scene) for _, scene in drawn]

    def encode(pictures: list[Image.Image]) -> Tensor:
        latents: Tensor = vae.encode(pixels(pictures)).latent_dist.mode() * vae.config.scaling_factor
        return latents

    def save(weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        averaged = build_unet()
        averaged.load_state_dict(weights)
        parts = (vae, encoder, tokenizer, averaged, build_scheduler(), None, None)
        export(StableDiffusionPipeline(*parts, requires_safety_checker=False), given.output, state)

    train_denoiser(
        unet,
        lambda noisy, steps, text: unet(noisy, steps, encoder_hidden_states=text).sample,
        CaptionedBank(BANK, draw, encode, tokenizer, encoder),
        nothing(tokenizer, encoder),
        work / "unet.safetensors",
        given.minutes - minutes,
        resume,
        save,
    )
    print("saved", given.output, flush=True)


if __name__ == "__main__":
    main()
