"""Train the embedded assistant's sound generator from nothing: a latent-diffusion model in diffusers' layout.

    python demo/train_sound_generator.py --output runs/embedded/sing --fsdd runs/embedded/sets/fsdd --minutes 165 --seed 0

Five parts saved as an ordinary ``AudioLDMPipeline`` folder (arXiv 2301.12503): the vocoder, which turns log-mel spectrograms
into waves (HiFi-GAN's generator, arXiv 2010.05646, trained without its discriminators on mel spectra of several resolutions),
an autoencoder of spectrograms, CLAP's text encoder, whose one vector is the whole condition, and the
denoiser, a U-Net on the autoencoder's 16 x 8 latents (`generator_training`). `--only` trains one of the first ones, as far as
those before them are there; `--resume` goes on from the newest checkpoints.
"""

from __future__ import annotations

import argparse
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from caption_encoder import build_clap_encoder, build_roberta_tokenizer, clap_states, tokens, train_text_encoder
from generator_training import build_scheduler, export, finished, save, scale, train_denoiser, train_part
from sound_wishes import CLASSES, SAMPLES, Voices, caption, classes, perform, wishes
from sounds import SAMPLE_RATE
from torch import Tensor, nn

BINS, HOP = 64, 256
FRAMES = SAMPLES // HOP
LENGTH = 16  # text positions
TEXT_WIDTH, TEXT_LAYERS = 96, 2
LATENT_CHANNELS = 8
WIDTHS = (64, 128)  # of the denoiser at 16 x 8 and 8 x 4
SHARES = {"vocoder": 0.12, "vae": 0.1, "unet": 0.78}  # of the minutes
BATCH = 32  # of the denoiser
BANK = 3072  # sounds kept at a time
SEGMENT = 32  # frames that the vocoder is trained on at a time
MEL_BANDS = {256: 20, 512: 40, 1024: 80, 2048: 160}  # by window, of the vocoder's loss
QUIET, LOUD = -11.5, 1.5  # natural logarithms between which spectrograms lie


# --- sounds -----------------------------------------------------------------------------------------------------------


class Sounds:
    """Waves ``(N, SAMPLES)`` and their spectrograms ``(N, 1, FRAMES, BINS)``, with their captions; a third is new in every
    round, so that making them costs little.
    """

    def __init__(self, voices: Voices, seed: int) -> None:
        from mmllm.generators.targets import MelTarget

        self.voices, self.seed, self.mel = voices, seed, MelTarget(SAMPLE_RATE, HOP, FRAMES, BINS)
        self.waves, self.mels, self.captions = torch.empty(0), torch.empty(0), list[str]()
        self.round, self.order = -1, torch.empty(0, dtype=torch.long)

    def chosen(self, step: int, batch: int) -> Tensor:
        """The numbers of the sounds of a batch; every round goes over all of the bank."""
        number, place = divmod(step, BANK // batch)
        if number != self.round:
            self.renew(number)
            self.round, self.order = number, torch.randperm(BANK)
        return self.order[place * batch : (place + 1) * batch]

    def renew(self, number: int) -> int:
        """Make new ones; returns how many, the first of the bank."""
        rng, old = random.Random(f"sounds-{self.seed}-{number}"), len(self.waves) > 0
        wanted = [wishes(rng, test=False) for _ in range(BANK // 3 if old else BANK)]
        made = [perform(wish, rng, self.voices) for wish in wanted]
        waves, mels = torch.from_numpy(np.stack(made)), torch.stack([self.mel(wave) for wave in made])
        self.waves = torch.cat([waves, self.waves])[:BANK] if old else waves
        self.mels = torch.cat([mels, self.mels])[:BANK] if old else mels
        self.captions = ([caption(wish) for wish in wanted] + self.captions)[:BANK]
        return len(wanted)


# --- the vocoder ------------------------------------------------------------------------------------------------------


def build_vocoder() -> Any:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=BINS,
            sampling_rate=SAMPLE_RATE,
            upsample_initial_channel=128,
            upsample_rates=[8, 8, 4],
            upsample_kernel_sizes=[16, 16, 8],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3], [1, 3]],
            normalize_before=True,
        )
    )
    vocoder.mean.fill_((QUIET + LOUD) / 2)
    vocoder.scale.fill_((LOUD - QUIET) / 4)
    for module in vocoder.modules():  # transformers starts convolutions at 0.02, which is silence after three of them
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
    return vocoder


def mel_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference of the log-mel spectra of waves ``(N, T)``, a mean of several resolutions (arXiv 2306.06546).

    Of single frequencies (arXiv 1910.11480) most of the distance between two noises is chance, and hides what can be learned:
    after 100 seconds 24 % of spoken digits were heard rightly, with mel bands 46 % (one run each).
    """
    distances = []
    for window, bank in mel_banks().items():
        hann = torch.hann_window(window)
        ours, true = (
            (torch.stft(wave, window, window // 4, window=hann, return_complex=True).abs().transpose(1, 2) @ bank)
            .clamp(min=1e-4)
            .log()
            for wave in (found, wanted)
        )
        distances.append((ours - true).abs().mean())
    return torch.stack(distances).mean()


@cache
def mel_banks() -> dict[int, Tensor]:
    """For each window, in samples, its triangular filters ``(window // 2 + 1, bands)``."""
    from transformers.audio_utils import mel_filter_bank

    return {
        window: torch.from_numpy(
            mel_filter_bank(window // 2 + 1, bands, 0, SAMPLE_RATE / 2, SAMPLE_RATE, "slaney", "slaney")
        ).float()
        for window, bands in MEL_BANDS.items()
    }


def train_vocoder(arguments: argparse.Namespace, sounds: Sounds, work: Path) -> Any:
    vocoder = build_vocoder()

    def loss_of(step: int) -> Tensor:
        chosen = sounds.chosen(step, 8)
        mels, waves = sounds.mels[chosen, 0], sounds.waves[chosen].unflatten(1, (FRAMES, HOP))
        # Where something is heard, mostly: much of many sounds is silence.
        power = nn.functional.avg_pool1d(mels.mean(-1), SEGMENT, 1)
        starts = torch.multinomial((power > power.amax(1, keepdim=True) - 4).float() + 0.02, 1)
        frames, rows = starts + torch.arange(SEGMENT), torch.arange(len(chosen))[:, None]
        seen = mels[rows, frames]
        # A denoiser's spectrograms are never exact.
        seen = seen + 0.1 * torch.rand(len(chosen), 1, 1) * torch.randn_like(seen)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = vocoder(seen)
        return mel_distance(found.float(), waves[rows, frames].flatten(1))

    minutes = SHARES["vocoder"] * arguments.minutes
    path = work / "vocoder.safetensors"
    save(path, vocoder.state_dict(), train_part(vocoder, path, minutes, arguments.resume, 2e-3, loss_of))
    return vocoder


# --- the autoencoder --------------------------------------------------------------------------------------------------


def build_vae() -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=FRAMES,
        mid_block_add_attention=False,
    )
    nn.init.constant_(vae.decoder.conv_out.bias, (QUIET + LOUD) / 2)
    return vae


def train_vae(arguments: argparse.Namespace, sounds: Sounds, work: Path) -> Any:
    """Mean absolute and squared error of the reconstruction, and a little of the Kullback-Leibler distance to N(0, 1).

    What is heard counts four times: most of a spectrogram is silence.
    """
    vae, path = build_vae(), work / "vae.safetensors"
    if arguments.resume and finished(vae, path):
        return vae

    def loss_of(step: int) -> Tensor:
        chosen = sounds.chosen(step, 12)
        mels = sounds.mels[chosen]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(mels).latent_dist
            found = vae.decode(posterior.sample()).sample
        heard = (mels > mels.amax((2, 3), keepdim=True) - 6).float()
        error = (found.float() - mels) * (1 + heard)
        return (error.abs().mean() + 0.3 * error.square().mean()) + 2e-3 * posterior.kl().float().mean() / (
            FRAMES * BINS
        )

    state = train_part(vae, path, SHARES["vae"] * arguments.minutes, arguments.resume, 3e-3, loss_of)
    scale(vae, sounds.mels[:128], path, state)
    return vae


# --- captions ---------------------------------------------------------------------------------------------------------


def captioned(rng: random.Random) -> tuple[str, tuple[int, ...]]:
    wish = wishes(rng, test=False)
    return caption(wish), classes(wish)


def train_text(arguments: argparse.Namespace, sounds: Sounds, work: Path) -> tuple[Any, Any]:
    rng, folder = random.Random(f"words-{arguments.seed}"), work / "text"
    if arguments.resume and (folder / "encoder" / "model.safetensors").exists():
        from transformers import ClapTextModelWithProjection, RobertaTokenizer

        read = ClapTextModelWithProjection.from_pretrained(folder / "encoder")
        return RobertaTokenizer.from_pretrained(folder / "tokenizer"), read
    torch.manual_seed(arguments.seed)
    tokenizer = build_roberta_tokenizer([captioned(rng)[0] for _ in range(4000)], LENGTH)
    encoder = build_clap_encoder(tokenizer, TEXT_WIDTH, TEXT_LAYERS)
    steps = arguments.text_steps
    understood = train_text_encoder(tokenizer, encoder, captioned, CLASSES, steps, arguments.seed, read=clap_states)
    print(f"captions understood {understood:.1%}, {len(tokenizer)} words", flush=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "encoder")
    return tokenizer, encoder


# --- the denoiser -----------------------------------------------------------------------------------------------------


def build_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=FRAMES // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTHS,  # without states to read, the blocks read their own
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=TEXT_WIDTH,
        class_embeddings_concat=True,
        resnet_time_scale_shift="scale_shift",  # the condition is heard nowhere else
        attention_head_dim=tuple(width // 32 for width in WIDTHS),  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


class Spectrograms:
    """Latents of sounds with their captions, as `generator_training.Bank` has them."""

    def __init__(self, sounds: Sounds, vae: Any, tokenizer: Any, encoder: Any) -> None:
        self.sounds, self.vae, self.tokenizer, self.encoder = sounds, vae, tokenizer, encoder
        self.clean, self.states = torch.empty(0, LATENT_CHANNELS, FRAMES // 8, BINS // 8), torch.empty(0, 1, TEXT_WIDTH)

    @torch.no_grad()
    def renew(self, number: int) -> None:
        unread = len(self.sounds.waves) > 0 and len(self.clean) == 0  # made for the autoencoder
        count = BANK if unread else self.sounds.renew(number)
        modes = [self.vae.encode(part).latent_dist.mode() for part in self.sounds.mels[:count].split(64)]
        clean = torch.cat(modes) * self.vae.config.scaling_factor
        states = clap_states(self.encoder, tokens(self.tokenizer, self.sounds.captions[:count]))
        self.clean, self.states = torch.cat([clean, self.clean])[:BANK], torch.cat([states, self.states])[:BANK]

    def condition(self, chosen: Tensor) -> Tensor:
        return self.states[chosen]


# --- the run ----------------------------------------------------------------------------------------------------------


def main() -> None:
    from diffusers import AudioLDMPipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline and its checkpoints")
    parser.add_argument("--fsdd", type=Path, required=True, help="folder written by training/prepare_fsdd.py")
    parser.add_argument("--minutes", type=float, default=165.0, help="processor time of all parts but the text encoder")
    parser.add_argument("--text-steps", type=int, default=600)
    parser.add_argument(
        "--only", choices=("vocoder", "text", "vae"), default="", help="of the parts before the denoiser"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    work, sounds = arguments.output / "training", Sounds(Voices(arguments.fsdd), arguments.seed)
    if arguments.only:
        {"vocoder": train_vocoder, "text": train_text, "vae": train_vae}[arguments.only](arguments, sounds, work)
        return
    vocoder = train_vocoder(arguments, sounds, work)
    tokenizer, encoder = train_text(arguments, sounds, work)
    encoder.requires_grad_(False).eval()
    vae, unet = train_vae(arguments, sounds, work), build_unet()
    with torch.no_grad():
        nothing = clap_states(encoder, tokens(tokenizer, [""]))

    def put(weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        averaged = build_unet()
        averaged.load_state_dict(weights)
        parts = (vae, encoder, tokenizer, averaged, build_scheduler(), vocoder)
        export(AudioLDMPipeline(*parts), arguments.output, state)

    train_denoiser(
        unet,
        lambda noisy, steps, text: unet(noisy, steps, None, class_labels=text[:, 0] / TEXT_WIDTH**0.5).sample,
        Spectrograms(sounds, vae, tokenizer, encoder),
        nothing,
        work / "unet.safetensors",
        SHARES["unet"] * arguments.minutes,
        arguments.resume,
        put,
        BATCH,
    )
    print("saved", arguments.output, flush=True)


if __name__ == "__main__":
    main()
