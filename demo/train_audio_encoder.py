"""Train the embedded assistant's audio encoder, a small Whisper encoder, from nothing.

    python demo/train_audio_encoder.py --fsdd data/fsdd --esc10 data/esc10 --output runs/audio [--resume]

Data: spoken digits and environmental sounds (folders written by training/prepare_fsdd.py and prepare_esc10.py) and
procedural sounds (sounds.py). Most steps see short windows that a clip fills, from which the features are learnt
several times faster; the others see 5 seconds, a clip followed by silence, as the assistant will hear it. Two linear
heads are read off the last hidden states: one names what sounds in each 20 ms frame, one reads the facts of a clip (its
label, how many beeps, which came first, ...) from the mean of its frames. So the frozen features hold these facts
inside the clip, where a projector finds them. The heads are kept only in the checkpoint.

Every step draws its data from (seed, step), so a resumed run continues as the uninterrupted one would have.
Writes to --output: checkpoint.safetensors, log.jsonl, scores.json, and whisper/, the encoder in fp16 for transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import sounds
import torch
from audio_model import Encoder, LogMel, read_facts, training_loss
from audio_windows import (
    FRAME,
    WINDOW,
    Clips,
    Window,
    digit_window,
    procedural_window,
    read_clips,
    scene_window,
    sound_facts,
)
from torch import Tensor

SHORT = 0.85  # share of the steps on short windows
PROBE, FINAL_PROBE = 220, 2000  # procedural sounds in the probes during and after training
CHECKPOINT_SECONDS = 180


def masked(rng: np.random.Generator, mels: Tensor, frequencies: int, times: int) -> None:
    """SpecAugment (Park et al., 2019) in place on (80, T): two bands and two stretches, filled with the mean."""
    mean = mels.mean()
    for size, axis in ((frequencies, 0), (times, 1)):
        for _ in range(2):
            width = int(rng.integers(0, size + 1))
            start = int(rng.integers(0, mels.shape[axis] - width + 1))
            mels.narrow(axis, start, width).fill_(mean)


def make_batches(
    rng: np.random.Generator,
    digits: Clips,
    scenes: Clips,
    batch: int,
    short: bool,
    log_mel: LogMel,
    device: torch.device,
) -> list[tuple[Tensor, list[Window]]]:
    """Augmented log-mels (N, 80, T) on the device and their windows, of digits, of scenes and of procedural sounds.

    `batch` full windows in all (5/16, 1/2, 3/16), or as many frames of short ones, where T differs between the three."""
    makers = (
        lambda: digit_window(rng, digits, short),
        lambda: scene_window(rng, scenes, short),
        lambda: procedural_window(rng),
    )
    batches = []
    for maker, share, bands, stretches in zip(makers, (1.5, 0.875, 0.5) if short else (0.3125, 0.5, 0.1875),
                                              (8, 14, 0), (0, 40, 0), strict=True):  # fmt: skip
        windows = [maker() for _ in range(round(share * batch))]
        length = -(-max(window.end for window in windows) // FRAME) * FRAME if short else WINDOW
        for window in windows:
            window.events = window.events[:, : length // FRAME]
        waves = torch.from_numpy(np.stack([window.samples[:length] for window in windows])).to(device)
        tilt = np.zeros((len(windows), 80, 1), np.float32)
        if bands:  # an equaliser of up to about 6 dB, 0.6 in log10 of the power; procedural sounds need none
            bins, draws = np.linspace(-1, 1, 80), rng.uniform((-0.4, 0, 0), (0.4, 0.3, 6.3), (len(windows), 3))
            tilt[:, :, 0] = [slope * bins + wave * np.sin(3 * bins + phase) for slope, wave, phase in draws]
        mels = log_mel(waves, torch.from_numpy(tilt).to(device))
        for mel in mels:
            masked(rng, mel, bands, stretches)
        batches.append((mels, windows))
    return batches


def probe(
    encoder: Encoder, log_mel: LogMel, held_out: dict[str, Clips], procedural: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """{what: {"accuracy", "n"}} on held-out clips and on `procedural` fresh sounds, per fact."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    truths = []
    waves = []
    for name, clips in held_out.items():
        waves += [wave for wave, _ in clips]
        truths += [{name: ("label", label)} for _, label in clips]
    for seed in range(procedural):
        rng = np.random.default_rng((1_000_003, seed))  # no training step draws from such a seed
        sound = sounds.sample_sound(rng)
        waves.append(sounds.synthesize(sound, rng))
        truths.append({f"procedural {head}": (head, value) for head, value in sound_facts(sound).items()})
    for answers, truth in zip(read_facts(encoder, log_mel, waves, device), truths, strict=True):
        for name, (head, value) in truth.items():
            total[name] += 1
            right[name] += answers[head] == value
    return {name: {"accuracy": right[name] / total[name], "n": total[name]} for name in total}


def save_checkpoint(path: Path, encoder: Encoder, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights and AdamW moments in one safetensors file, replaced atomically."""
    tensors = {f"model.{name}": value for name, value in encoder.state_dict().items()}
    for name, parameter in encoder.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    temporary = path.with_suffix(".tmp")
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"step": str(step)})
    os.replace(temporary, path)


def load_checkpoint(path: Path, encoder: Encoder, optimizer: torch.optim.Optimizer) -> int:
    """Load what `save_checkpoint` wrote; returns the number of steps done."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        step = int(file.metadata()["step"])
    encoder.load_state_dict({n.removeprefix("model."): v for n, v in tensors.items() if n.startswith("model.")})
    for name, parameter in encoder.named_parameters():
        state = {key: tensors.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if state["step"] is not None:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }
    return step


def export(encoder: Encoder, log_mel: LogMel, folder: Path) -> None:
    """The encoder in transformers' layout, fp16: config.json, model.safetensors, preprocessor_config.json."""
    state = {name: value.half() for name, value in encoder.whisper.state_dict().items()}
    encoder.whisper.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    log_mel.extractor.save_pretrained(folder)


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    # On the CPU plain attention in bf16 is faster than the fused kernel at this size (89 against 62 windows a second).
    encoder = Encoder("eager" if device.type == "cpu" else "sdpa").to(device)
    log_mel = LogMel().to(device)
    decayed = [p for p in encoder.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in encoder.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.98))
    done = 0
    if arguments.init:
        load_checkpoint(arguments.init, encoder, optimizer)
    if arguments.resume and (output / "checkpoint.safetensors").exists():
        done = load_checkpoint(output / "checkpoint.safetensors", encoder, optimizer)
    train_sets = [read_clips(folder / "train.jsonl") for folder in (arguments.fsdd, arguments.esc10)]
    held_out = {
        name: read_clips(folder / "validation.jsonl")
        for name, folder in (("digits", arguments.fsdd), ("esc10", arguments.esc10))
        if (folder / "validation.jsonl").exists()
    }
    parameters = sum(p.numel() for p in encoder.whisper.encoder.parameters())
    sizes = [len(clips) for clips in train_sets]
    print(f"{parameters:,} encoder parameters; {sizes[0]} digits, {sizes[1]} scenes; steps {done}-{arguments.steps}")

    if done >= arguments.steps:  # interrupted after the last step
        scores = probe(encoder, log_mel, held_out, FINAL_PROBE, device)
        export(encoder, log_mel, output / "whisper")
    encoder.train()
    began = saved = time.monotonic()
    first, averages = done, Counter[str]()
    for step in range(done, arguments.steps):
        torch.manual_seed(arguments.seed * 1_000_000 + step)  # dropout
        rng = np.random.default_rng((arguments.seed, step))
        short = bool(rng.random() < SHORT)
        batches = make_batches(rng, *train_sets, arguments.batch, short, log_mel, device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.lr, arguments.warmup, arguments.steps)
        optimizer.zero_grad()
        for name, (mels, windows) in zip(("digits", "scenes", "sounds"), batches, strict=True):
            losses = training_loss(encoder, mels, windows)
            sum(losses.values()).backward()
            averages.update({f"{name} {part}": float(v.detach()) / arguments.log_every for part, v in losses.items()})
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % arguments.log_every == 0:
            rate = (done - first) / (time.monotonic() - began)
            shown = ", ".join(f"{name} {value:.2f}" for name, value in averages.items() if value)
            left = (arguments.steps - done) / rate / 60
            print(f"step {done}/{arguments.steps} {shown} | {rate:.2f} steps/s, {left:.1f} min left", flush=True)
            averages.clear()
        last = done == arguments.steps
        if last or done % arguments.probe_every == 0:
            scores = probe(encoder, log_mel, held_out, FINAL_PROBE if last else PROBE, device)
            print("  " + ", ".join(f"{name} {s['accuracy']:.3f}/{s['n']}" for name, s in scores.items()), flush=True)
            with (output / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": done, "scores": scores}) + "\n")
        if last or time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(output / "checkpoint.safetensors", encoder, optimizer, done)
            export(encoder, log_mel, output / "whisper")
            saved = time.monotonic()
    (output / "scores.json").write_text(json.dumps({"seed": arguments.seed, "steps": done, "scores": scores}, indent=2))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdd", type=Path, required=True, help="folder written by training/prepare_fsdd.py")
    parser.add_argument("--esc10", type=Path, required=True, help="folder written by training/prepare_esc10.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint, the log and whisper/")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch", type=int, default=16, help="windows of 5 seconds per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--probe-every", type=int, default=500)
    parser.add_argument("--init", type=Path, help="checkpoint.safetensors of another run to start from")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output")
    return parser.parse_args(words)


if __name__ == "__main__":
    train(parse())
