"""Train the embedded assistant's picture generator from nothing: a latent-diffusion model in diffusers' layout.

    python demo/train_image_generator.py --output runs/embedded/draw --minutes 90 --seed 0

Three parts, one after the other, saved as an ordinary ``StableDiffusionPipeline`` folder: the autoencoder, the text encoder
(`caption_encoder`), and the denoiser, a U-Net on the autoencoder's 16 x 16 latents trained to predict the velocity
(arXiv 2202.00512). Wishes for the test (`drawings.held_out`) are never drawn here.
`--resume` goes on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from caption_encoder import build_text_encoder, build_tokenizer, tokens, train_text_encoder
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
from generator_training import Clock, build_scheduler, halve, load_state, save, set_rate, train_denoiser
from safetensors.torch import load_file
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


def pixels(scenes: list[Scene]) -> Tensor:
    """Pictures as ``(N, 3, SIDE, SIDE)`` float32 in [-1, 1]."""
    stacked = np.stack([np.asarray(render(scene), dtype=np.float32) for scene in scenes])
    return torch.from_numpy(stacked / 127.5 - 1).permute(0, 3, 1, 2)


def vae_loss(vae: Any, batch: Tensor) -> Tensor:
    """Mean absolute and squared error of the reconstruction, and a little of the Kullback-Leibler distance to N(0, 1).

    Pixels of shapes count five times: most of a picture is background, which is learned at once.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = vae.encode(batch).latent_dist
        found = vae.decode(posterior.sample()).sample
    shapes = (batch != batch[:, :, :1, :1]).any(dim=1, keepdim=True)
    error = (found.float() - batch) * torch.where(shapes, 5.0, 1.0).sqrt()
    return (error.abs().mean() + error.square().mean()) / 2 + 1e-4 * posterior.kl().float().mean() / (SIDE * SIDE)


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


class Drawings:
    """Latents of drawings with their captions; a third of it is new in every round, so that encoding costs little."""

    def __init__(self, vae: Any, tokenizer: Any, encoder: Any, seed: int) -> None:
        self.vae, self.tokenizer, self.encoder, self.seed = vae, tokenizer, encoder, seed
        self.clean, self.ids = torch.empty(0), torch.empty(0, dtype=torch.long)

    @torch.no_grad()
    def renew(self, number: int) -> None:
        old = len(self.clean) > 0
        drawn = training_round(self.seed, number, BANK // 3 if old else BANK)
        scenes = [scene for _, scene in drawn]
        modes = [self.vae.encode(pixels(scenes[k : k + 64])).latent_dist.mode() for k in range(0, len(scenes), 64)]
        clean = torch.cat(modes) * self.vae.config.scaling_factor
        ids = tokens(self.tokenizer, [caption(wish) for wish, _ in drawn])
        self.clean = torch.cat([clean, self.clean])[:BANK] if old else clean
        self.ids = torch.cat([ids, self.ids])[:BANK] if old else ids

    @torch.no_grad()
    def condition(self, chosen: Tensor) -> Tensor:
        states: Tensor = self.encoder(self.ids[chosen]).last_hidden_state
        return states


# --- the run ----------------------------------------------------------------------------------------------------------


def train_vae(arguments: argparse.Namespace, work: Path) -> Any:
    vae, path = build_vae(), work / "vae.safetensors"
    state: dict[str, Any] = {"step": 0, "seconds": 0.0}
    if arguments.resume and path.exists():
        vae.load_state_dict(load_file(path))
        state = load_state(path)
    clock, saved = Clock(arguments.minutes * VAE_SHARE, state["seconds"]), time.monotonic()
    stepper = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    shown: list[float] = []
    while clock.done < 1:
        rng = random.Random(f"vae-{arguments.seed}-{state['step']}")
        batch = pixels([crowded(rng) for _ in range(12)])
        set_rate([stepper], clock.factor())
        loss = vae_loss(vae, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        stepper.step()
        stepper.zero_grad()
        state["step"] += 1
        shown.append(loss.item())
        if state["step"] % 100 == 0:
            print(f"vae step {state['step']} loss {sum(shown[-100:]) / 100:.4f} {clock.done:.1%}", flush=True)
        if time.monotonic() - saved > 120:
            save(path, vae.state_dict(), state | {"seconds": clock.seconds})
            saved = time.monotonic()
    vae.eval()
    with torch.no_grad():
        rng = random.Random("scale")
        spread = vae.encode(pixels([place_items(wishes(rng, False), rng) for _ in range(128)])).latent_dist.mode().std()
    vae.register_to_config(scaling_factor=round(1 / spread.item(), 4))
    save(path, vae.state_dict(), state | {"seconds": clock.seconds, "scaling_factor": vae.config.scaling_factor})
    return vae


def train_text(arguments: argparse.Namespace, work: Path) -> tuple[Any, Any]:
    rng, folder = random.Random(f"words-{arguments.seed}"), work / "text"
    if arguments.resume and (folder / "encoder" / "model.safetensors").exists():
        from transformers import CLIPTextModel, CLIPTokenizer

        return CLIPTokenizer.from_pretrained(folder / "tokenizer"), CLIPTextModel.from_pretrained(folder / "encoder")
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer([captioned(rng)[0] for _ in range(4000)], LENGTH)
    encoder = build_text_encoder(tokenizer, TEXT_WIDTH, TEXT_LAYERS)
    understood = train_text_encoder(tokenizer, encoder, captioned, CLASSES, arguments.text_steps, arguments.seed)
    print(f"captions understood {understood:.1%}, {len(tokenizer)} words", flush=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "encoder")
    return tokenizer, encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the finished pipeline and its checkpoints"
    )
    parser.add_argument("--minutes", type=float, default=90.0, help="processor time of autoencoder and denoiser")
    parser.add_argument("--text-steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    work = arguments.output / "training"
    tokenizer, encoder = train_text(arguments, work)
    encoder.requires_grad_(False).eval()
    vae, unet = train_vae(arguments, work), build_unet()
    with torch.no_grad():
        nothing = encoder(tokens(tokenizer, [""])).last_hidden_state
    train_denoiser(
        unet,
        lambda noisy, steps, text: unet(noisy, steps, encoder_hidden_states=text).sample,
        Drawings(vae, tokenizer, encoder, arguments.seed),
        nothing,
        work / "unet.safetensors",
        (1 - VAE_SHARE) * arguments.minutes,
        arguments.resume,
        lambda weights, state: export(arguments.output, vae, tokenizer, encoder, weights, state),
    )
    print("saved", arguments.output, flush=True)


def export(
    output: Path, vae: Any, tokenizer: Any, encoder: Any, weights: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """The averaged denoiser and the other parts as a diffusers folder in half precision."""
    from diffusers import StableDiffusionPipeline

    unet = build_unet()
    unet.load_state_dict(weights)
    pipeline = StableDiffusionPipeline(
        vae, encoder, tokenizer, unet, build_scheduler(), None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(output)
    halve(output)
    (output / "training.json").write_text(json.dumps(state) + "\n")


if __name__ == "__main__":
    main()
