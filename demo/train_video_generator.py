"""Train the embedded assistant's clip generator from nothing: text-to-video latent diffusion in diffusers' layout.

    python demo/train_video_generator.py --output runs/embedded/clips --minutes 104 --seed 0

Three parts, one after the other, saved as an ordinary ``TextToVideoSDPipeline`` folder: the text encoder (`caption_encoder`),
an autoencoder of single frames, and the denoiser, a 3-D U-Net on the 8 x 8 latents of all frames at once. Motions for the
test (`moving.held_out`) are never shown here. `--resume` goes on from the newest checkpoint.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from caption_encoder import nothing, text_part
from drawings import BACKGROUNDS
from generator_training import (
    CaptionedBank,
    arguments,
    build_scheduler,
    export,
    pixels,
    train_denoiser,
    train_vae,
)
from moving import FRAMES, MOVES, PACES, SIDE, Motion, animate, caption, motions, picture
from PIL import Image
from scene_model import COLORS, SHAPES
from torch import Tensor

LENGTH = 20  # text positions
TEXT_WIDTH, TEXT_LAYERS = 128, 2
LATENT_CHANNELS = 8
WIDTHS = (32, 72)  # of the denoiser at 8 x 8 and 4 x 4
VAE_SHARE = 0.12  # of the minutes
BATCH = 32
BANK = 3072  # clips kept encoded at a time
CLASSES = (len(SHAPES), len(COLORS), len(MOVES), len(PACES), len(BACKGROUNDS))


def build_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )


def build_unet() -> Any:
    """Only the middle block reads the text; its attention and that over time cost most of a step on a CPU."""
    from diffusers import UNet3DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    unet = UNet3DConditionModel(
        sample_size=SIDE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "UpBlock3D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    # Sequences of eight frames: plain matrix products take two thirds of the fused kernel's time.
    unet.set_attn_processor(AttnProcessor())
    return unet.eval()  # no dropout: a network of this size does not learn by heart


def crowded(rng: random.Random) -> Image.Image:
    """Up to four shapes of all sizes: more to learn from than in a frame, and nothing else."""
    background = rng.choice(tuple(BACKGROUNDS))
    colors = [name for name in COLORS if name != background]
    shapes = []
    if rng.random() < 0.3:
        size = rng.uniform(12, 29)
        x, y = (rng.uniform(size / 2, SIDE - size / 2) for _ in range(2))
        shapes.append((rng.choice(SHAPES), rng.choice(colors), x, y, size))
    else:
        for cell in rng.sample(range(4), rng.choice((2, 3, 4))):
            x, y = (SIDE * (0.25 + 0.5 * k) + rng.uniform(-4, 4) for k in divmod(cell, 2))
            shapes.append((rng.choice(SHAPES), rng.choice(colors), x, y, rng.uniform(12, 25)))
    return picture(shapes, background)


def typical() -> list[Image.Image]:
    rng = random.Random("scale")
    return [frame for _ in range(24) for frame in animate(motions(rng, test=False), rng)]


def facts(motion: Motion) -> tuple[int, ...]:
    """Classes of everything a caption says."""
    return (
        SHAPES.index(motion.shape),
        list(COLORS).index(motion.color),
        MOVES.index(motion.move),
        PACES.index(motion.pace),
        list(BACKGROUNDS).index(motion.background),
    )


def captioned(rng: random.Random) -> tuple[str, tuple[int, ...]]:
    motion = motions(rng, test=False)
    return caption(motion), facts(motion)


def animated(seed: int, number: int, count: int) -> tuple[list[str], list[Tensor]]:
    """Captions of the training side, and the frames of a clip for each, ``(FRAMES, 3, SIDE, SIDE)``."""
    rng = random.Random(f"clips-{seed}-{number}")
    chosen = [motions(rng, test=False) for _ in range(count)]
    return [caption(motion) for motion in chosen], [pixels(animate(motion, rng)) for motion in chosen]


def main() -> None:
    import torch
    from diffusers import TextToVideoSDPipeline

    given = arguments(__doc__, minutes=104.0)
    work, seed, resume = given.output / "training", given.seed, given.resume
    shape = (LENGTH, TEXT_WIDTH, TEXT_LAYERS)
    tokenizer, encoder = text_part(work / "text", captioned, CLASSES, shape, given.text_steps, seed, resume)
    minutes = VAE_SHARE * given.minutes
    vae = train_vae(build_vae(), crowded, typical, work / "vae.safetensors", minutes, seed, resume)
    unet = build_unet()

    def encode(clips: list[Tensor]) -> Tensor:
        """``(N, LATENT_CHANNELS, FRAMES, 8, 8)``."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = vae.encode(torch.cat(clips)).latent_dist.mode() * vae.config.scaling_factor
        together: Tensor = latents.float().unflatten(0, (len(clips), FRAMES)).transpose(1, 2).contiguous()
        return together

    def save(weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        averaged = build_unet()
        averaged.load_state_dict(weights)
        export(TextToVideoSDPipeline(vae, encoder, tokenizer, averaged, build_scheduler()), given.output, state)

    train_denoiser(
        unet,
        lambda noisy, steps, text: unet(noisy, steps, encoder_hidden_states=text).sample,
        CaptionedBank(BANK, partial(animated, seed), encode, tokenizer, encoder),
        nothing(tokenizer, encoder),
        work / "unet.safetensors",
        given.minutes - minutes,
        resume,
        save,
        BATCH,
    )
    print("saved", given.output, flush=True)


if __name__ == "__main__":
    main()
