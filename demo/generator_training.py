"""What the trainings of the embedded assistant's generators share: budgets, checkpoints, the loops of their parts.

An autoencoder is trained on pictures, a denoiser on the latents of media with their captions; the denoiser predicts the velocity
(arXiv 2202.00512). What is kept of it is the average of its weights over the last steps.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from caption_encoder import clip_states, tokens
from PIL import Image
from safetensors.torch import load_file, save_file
from small_weights import rewrite, rounded, stored
from torch import Tensor

# Standard deviation, of states with a standard deviation of one: an output projector is never exact.
NOISE_ON_TEXT = 0.15
DROPPED = 0.1  # captions left out, for classifier-free guidance
EMA = 0.998
BATCH = 64
VAE_BATCH = 12


def arguments(description: str | None, minutes: float) -> argparse.Namespace:
    """The command line of such a training; ``minutes`` is the budget when none is given. Sets threads and seed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the finished pipeline and its checkpoints"
    )
    parser.add_argument("--minutes", type=float, default=minutes, help="processor time of autoencoder and denoiser")
    parser.add_argument("--text-steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    return given


def build_scheduler() -> Any:
    """A cosine-like schedule that ends in pure noise (arXiv 2305.08891), sampled by DDIM."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
    )


class Clock:
    """A part's budget in processor time, and its learning rate: warm-up over 2 %, then a cosine to 2 % of the peak."""

    def __init__(self, minutes: float, used: float = 0.0) -> None:
        self.budget, self.used, self.begin = 60 * minutes, used, time.process_time()

    @property
    def seconds(self) -> float:
        return self.used + time.process_time() - self.begin

    @property
    def done(self) -> float:
        return min(1.0, self.seconds / self.budget)

    def factor(self) -> float:
        done = self.done
        return done / 0.02 + 0.01 if done < 0.02 else 0.02 + 0.49 * (1 + math.cos(math.pi * (done - 0.02) / 0.98))


def set_rate(steppers: list[torch.optim.Optimizer], factor: float) -> None:
    """Every group's rate as a share of the one it was made with."""
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = factor * group.setdefault("peak", group["lr"])


def save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Beside the old file, then in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    save_file({k: v.contiguous() for k, v in tensors.items()}, new, metadata={"state": json.dumps(state)})
    new.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["state"]))


def export(pipeline: Any, output: Path, state: dict[str, Any]) -> None:
    """A diffusers folder of small weights, with the state of the training beside it."""
    pipeline.save_pretrained(output)
    shrink(output)
    (output / "training.json").write_text(json.dumps(state) + "\n")


def shrink(folder: Path) -> None:
    """The weights of a saved pipeline in place: the denoiser's matrices in eight bits, the rest in half precision."""
    parts = [name for name in json.loads((folder / "model_index.json").read_text()) if not name.startswith("_")]
    for part in parts:
        for file in (folder / part).glob("*.safetensors"):
            rewrite(file, file, (lambda tensor: stored(rounded(tensor))) if part == "unet" else torch.Tensor.half)


def train_part(
    model: Any, path: Path, minutes: float, resume: bool, lr: float, loss_of: Callable[[int], Tensor]
) -> dict[str, Any]:
    """Train ``model`` in place for ``minutes`` of processor time on ``loss_of`` the step, from the checkpoint ``path`` if there
    is one. Returns what `save` is to keep beside the weights.
    """
    state: dict[str, Any] = {"step": 0, "seconds": 0.0}
    if resume and path.exists():
        model.load_state_dict(load_file(path))
        state = load_state(path)
    clock, saved, shown = Clock(minutes, state["seconds"]), time.monotonic(), list[float]()
    stepper = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    while clock.done < 1:
        set_rate([stepper], clock.factor())
        loss = loss_of(state["step"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
        stepper.zero_grad()
        state["step"] += 1
        shown.append(loss.item())
        if state["step"] % 100 == 0:
            print(
                f"{path.stem} step {state['step']} loss {sum(shown[-100:]) / len(shown[-100:]):.4f} {clock.done:.1%}",
                flush=True,
            )
        if time.monotonic() - saved > 120:
            save(path, model.state_dict(), state | {"seconds": clock.seconds})
            saved = time.monotonic()
    model.eval()
    return state | {"seconds": clock.seconds}


# --- the autoencoder --------------------------------------------------------------------------------------------------


def pixels(pictures: list[Image.Image]) -> Tensor:
    """Pictures of one size as ``(N, 3, H, W)`` float32 in [-1, 1]."""
    stacked = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
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
    divergence = posterior.kl().float().mean() / batch[0, 0].numel()
    return (error.abs().mean() + error.square().mean()) / 2 + 1e-4 * divergence


def train_vae(
    vae: Any,
    sample: Callable[[random.Random], Image.Image],
    typical: Callable[[], list[Image.Image]],
    path: Path,
    minutes: float,
    seed: int,
    resume: bool,
) -> Any:
    """Train ``vae`` in place on pictures from ``sample`` for ``minutes`` of processor time, from the checkpoint ``path`` if
    there is one; a finished one is not trained on, whatever the minutes. Its scaling factor makes the latents of ``typical``
    pictures have a standard deviation of one.
    """
    if resume and finished(vae, path):
        return vae

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"vae-{seed}-{step}")
        return vae_loss(vae, pixels([sample(rng) for _ in range(VAE_BATCH)]))

    state = train_part(vae, path, minutes, resume, 3e-3, loss_of)
    scale(vae, pixels(typical()), path, state)
    return vae


@torch.no_grad()
def scale(vae: Any, batch: Tensor, path: Path, state: dict[str, Any]) -> None:
    """Give ``vae`` the scaling factor that makes the latents of ``batch`` have a standard deviation of one, and save it."""
    spread = vae.encode(batch).latent_dist.mode().std()
    vae.register_to_config(scaling_factor=round(1 / spread.item(), 4))
    save(path, vae.state_dict(), state | {"scaling_factor": vae.config.scaling_factor})


def finished(vae: Any, path: Path) -> bool:
    """Whether the autoencoder in ``path`` has its scaling factor; it is then loaded. A denoiser may know its latents."""
    if not path.exists() or "scaling_factor" not in (state := load_state(path)):
        return False
    vae.load_state_dict(load_file(path))
    vae.register_to_config(scaling_factor=state["scaling_factor"])
    vae.eval()
    return True


# --- the denoiser -----------------------------------------------------------------------------------------------------


class Bank(Protocol):
    """Latents with the conditions of their captions; some of it is new in every round."""

    clean: Tensor  # (N, ...), scaled to a standard deviation of one

    def renew(self, number: int) -> None: ...

    def condition(self, chosen: Tensor) -> Tensor:
        """The text condition ``(B, L, D)`` of these entries."""
        ...


class CaptionedBank:
    """Latents of media with their captions; a third is new in every round, so that encoding costs little.

    ``draw`` makes captions and media, given a round and how many; ``encode`` their latents ``(N, ...)``, scaled to a standard
    deviation of one.
    """

    def __init__(
        self,
        size: int,
        draw: Callable[[int, int], tuple[list[str], list[Any]]],
        encode: Callable[[list[Any]], Tensor],
        tokenizer: Any,
        encoder: Any,
    ) -> None:
        self.size, self.draw, self.encode = size, draw, encode
        self.tokenizer, self.encoder = tokenizer, encoder
        self.clean, self.ids = torch.empty(0), torch.empty(0, dtype=torch.long)

    @torch.no_grad()
    def renew(self, number: int) -> None:
        old = len(self.clean) > 0
        captions, media = self.draw(number, self.size // 3 if old else self.size)
        clean = torch.cat([self.encode(media[k : k + 64]) for k in range(0, len(media), 64)])
        ids = tokens(self.tokenizer, captions)
        self.clean = torch.cat([clean, self.clean])[: self.size] if old else clean
        self.ids = torch.cat([ids, self.ids])[: self.size] if old else ids

    @torch.no_grad()
    def condition(self, chosen: Tensor) -> Tensor:
        return clip_states(self.encoder, self.ids[chosen])


def denoiser_loss(denoise: Callable[..., Tensor], scheduler: Any, clean: Tensor, text: Tensor) -> Tensor:
    """Velocity prediction; ``denoise`` takes noisy latents, time steps and condition.

    All steps count the same. Min-SNR weights (arXiv 2303.09556) vanish towards pure noise, and there it is decided what
    is where: in small pictures of few shapes that is nearly all there is to learn.
    """
    noise, steps = torch.randn_like(clean), torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),))
    noisy, wanted = scheduler.add_noise(clean, noise, steps), scheduler.get_velocity(clean, noise, steps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = denoise(noisy, steps, text)
    return (found.float() - wanted).square().mean()


def optimizers(model: Any, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the attention blocks, AdamW for convolutions and the rest."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "transformer_blocks" in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    if not matrices:
        return [adam]
    return [torch.optim.Muon(matrices, lr=2.5 * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), adam]


def train_denoiser(
    denoiser: Any,
    denoise: Callable[..., Tensor],
    bank: Bank,
    nothing: Tensor,
    path: Path,
    minutes: float,
    resume: bool,
    export: Callable[[dict[str, Tensor], dict[str, Any]], None],
    batch: int = BATCH,
) -> None:
    """Train ``denoiser`` on what ``bank`` holds for ``minutes`` of processor time, from the checkpoint ``path`` if there is
    one; ``nothing (1, L, D)`` is the condition of no caption. ``export`` gets the averaged weights now and then.
    """
    scheduler, steppers = build_scheduler(), optimizers(denoiser, 1.2e-3)
    average = {name: value.clone() for name, value in denoiser.state_dict().items()}
    state: dict[str, Any] = {"step": 0, "round": 0, "seconds": 0.0}
    if resume and path.exists():
        tensors = load_file(path)
        denoiser.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        average = {k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")}
        load_optimizers(denoiser, steppers, tensors)
        state = load_state(path)
    clock, saved, shown = Clock(minutes, state["seconds"]), time.monotonic(), list[float]()
    while clock.done < 1 or state["step"] == 0:
        bank.renew(state["round"])
        torch.manual_seed(state["round"])
        for chosen in torch.randperm(len(bank.clean))[: len(bank.clean) // batch * batch].view(-1, batch):
            if clock.done >= 1 and state["step"]:
                break
            text = torch.where(torch.rand(batch, 1, 1) < DROPPED, nothing, bank.condition(chosen))
            text = text + NOISE_ON_TEXT * torch.rand(batch, 1, 1) * torch.randn_like(text)
            set_rate(steppers, clock.factor())
            loss = denoiser_loss(denoise, scheduler, bank.clean[chosen], text)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            for stepper in steppers:
                stepper.step()
                stepper.zero_grad()
            state["step"] += 1
            keep = min(EMA, (1 + state["step"]) / (10 + state["step"]))
            for name, value in denoiser.state_dict().items():
                average[name].lerp_(value, 1 - keep)
            shown.append(loss.item())
            if state["step"] % 50 == 0:
                left = (1 - clock.done) * clock.budget / 60
                mean, rate = sum(shown[-50:]) / len(shown[-50:]), batch * state["step"] / clock.seconds
                print(f"denoiser step {state['step']} loss {mean:.4f} {rate:.0f} a second, {left:.1f} min", flush=True)
        state["round"] += 1
        if time.monotonic() - saved > 150 or clock.done >= 1:
            state["seconds"] = clock.seconds
            save(path, checkpoint(denoiser, average, steppers), state)
            export(average, state)
            saved = time.monotonic()


def checkpoint(model: Any, average: dict[str, Tensor], steppers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"average.{k}": v for k, v in average.items()}
    for name, parameter in model.named_parameters():
        for stepper in steppers:
            for key, value in stepper.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value).clone()
    return tensors


def load_optimizers(model: Any, steppers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    owner = {id(p): stepper for stepper in steppers for group in stepper.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if found:
            owner[id(parameter)].state[parameter] = found
