"""Train the embedded assistant's audio encoder, a small Whisper encoder, from nothing.

    python demo/train_audio_encoder.py --fsdd data/fsdd --esc10 data/esc10 --output runs/audio --steps 5000 [--resume]

Data: spoken digits and environmental sounds (folders written by training/prepare_fsdd.py and prepare_esc10.py) and
procedural sounds (sounds.py). A window is 5 seconds: one clip followed by silence, as the assistant will hear it, or
several clips one after the other, which is cheaper per clip. Two linear heads are read off the last hidden states: one
names what sounds in each 20 ms frame, one reads the facts of a clip (its label, how many beeps, which came first, ...)
from the mean of its frames. So the frozen features hold these facts inside the clip, where a projector finds them. The
heads are kept only in the checkpoint.

Every step draws its data from (seed, step), so a resumed run continues as the uninterrupted one would have.
Writes to --output: checkpoint.safetensors, log.jsonl, scores.json and whisper/, the encoder in transformers' layout, fp16.
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
import soundfile
import soxr
import sounds
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE = sounds.SAMPLE_RATE
SECONDS = 5
WINDOW = SECONDS * RATE
FRAME = 320  # samples per encoder frame: mel hop 160, then a convolution of stride 2
FRAMES = WINDOW // FRAME
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CATEGORIES = ("dog bark", "rain", "sea waves", "baby cry", "clock tick", "person sneeze", "helicopter", "chainsaw",
              "rooster", "fire crackling")  # fmt: skip
EVENTS = DIGITS + CATEGORIES + sounds.EVENTS
HEADS = {
    "label": DIGITS + CATEGORIES + sounds.KINDS,
    "count": sounds.NUMBERS,
    "pitch": tuple(sounds.PITCHES),
    "direction": ("rising", "falling"),
    "duration": tuple(sounds.DURATIONS),
    "loudness": tuple(sounds.PEAKS),
    "speed": ("slow", "fast"),
    "order-first": sounds.PARTS,
    "order-second": sounds.PARTS,
}
UNKNOWN = -100  # cross_entropy's ignore_index
Clips = list[tuple[np.ndarray, str]]  # (float32 samples at 16 kHz, label)


class Encoder(nn.Module):
    """Whisper's encoder and the two linear heads that teach it."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        from transformers import WhisperConfig, WhisperModel

        # The decoder is an empty stub: zero layers, eight words. Nothing here decodes with it, but the file stays one
        # that transformers' WhisperModel loads.
        self.config = WhisperConfig(
            d_model=160, encoder_layers=4, encoder_attention_heads=5, encoder_ffn_dim=480, num_mel_bins=80,
            max_source_positions=FRAMES, dropout=0.1, decoder_layers=0, decoder_attention_heads=5, decoder_ffn_dim=160,
            max_target_positions=8, vocab_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, attn_implementation=attention,
        )  # fmt: skip
        self.whisper = WhisperModel(self.config)
        self.event_head = nn.Linear(160, len(EVENTS))
        self.fact_head = nn.Linear(160, sum(len(values) for values in HEADS.values()))

    def features(self, mels: Tensor) -> Tensor:
        """(N, 80, 2 * FRAMES) log-mels -> (N, FRAMES, 160)."""
        return self.whisper.encoder(mels).last_hidden_state

    def facts(self, pooled: Tensor) -> dict[str, Tensor]:
        """(S, 160) mean features of S clips -> {head: (S, classes) logits}."""
        logits = self.fact_head(pooled).split([len(values) for values in HEADS.values()], dim=-1)
        return dict(zip(HEADS, logits, strict=True))


class LogMel(nn.Module):
    """WhisperFeatureExtractor's log-mel spectrogram, batched. Source of the formula: openai/whisper, audio.py."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import WhisperFeatureExtractor

        self.extractor = WhisperFeatureExtractor(feature_size=80, sampling_rate=RATE, hop_length=160, chunk_length=SECONDS)
        self.register_buffer("filters", torch.tensor(self.extractor.mel_filters, dtype=torch.float32))  # (201, 80)
        self.register_buffer("hann", torch.hann_window(400))

    def forward(self, waves: Tensor, tilt: Tensor | None = None) -> Tensor:
        """(N, T) float32 samples -> (N, 80, T / 160). `tilt` (N, 80, 1) is added to log10 of the power: an equaliser."""
        spectrum = torch.stft(waves, 400, 160, window=self.hann, return_complex=True)[..., :-1].abs() ** 2
        mels = (self.filters.T @ spectrum).clamp(min=1e-10).log10()
        if tilt is not None:
            mels = mels + tilt
        return (torch.maximum(mels, mels.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


def read_clips(path: Path) -> Clips:
    """The sounds of a messages JSONL file of one-question dialogues, at 16 kHz, with their answers."""
    clips = []
    for line in path.read_text().splitlines():
        question, answer = (turn["content"] for turn in json.loads(line)["messages"])
        media = next(part["path"] for part in question if part["type"] == "audio")
        wave, rate = soundfile.read(path.parent / media, dtype="float32", always_2d=True)
        clips.append((soxr.resample(wave.mean(axis=1), rate, RATE).astype(np.float32), answer[0]["text"]))
    return clips


# --- windows -----------------------------------------------------------------------------------------------------------


class Window:
    """Five seconds of sound under construction, with what is true of them."""

    def __init__(self) -> None:
        self.samples = np.zeros(WINDOW, np.float32)
        self.end = 0
        self.events = np.full((2, FRAMES), UNKNOWN)  # the event of each frame, and of the clip mixed into it
        self.segments: list[tuple[int, int, dict[str, str], str, float]] = []  # frames, facts, second label, share

    def add(self, wave: np.ndarray, events: list[tuple[int, int, str]], facts: dict[str, str]) -> bool:
        """Append a clip whose `events` are (first sample, end sample, name); False where it does not fit."""
        start = -(-self.end // FRAME) * FRAME
        if start + len(wave) > WINDOW:
            return False
        self.samples[start : start + len(wave)] = wave
        self.end = start + len(wave)
        for first, end, name in events:
            self.events[:, (start + first) // FRAME : -(-(start + end) // FRAME)] = EVENTS.index(name)
        self.segments.append((start // FRAME, -(-self.end // FRAME), facts, facts["label"], 1.0))
        return True

    def noise(self, rng: np.random.Generator, decibels: float) -> None:
        """Add noise of a random colour under all that sounds, `decibels` below its mean power."""
        n = self.end
        colour = np.convolve(rng.standard_normal(n), np.ones(int(rng.integers(1, 12))), mode="same").astype(np.float32)
        power = np.mean(self.samples[:n] ** 2) / np.mean(colour**2)
        self.samples[:n] += colour * np.sqrt(power * 10 ** (-decibels / 10)).astype(np.float32)


def gain(rng: np.random.Generator, low: float, high: float) -> np.float32:
    return np.float32(10 ** (rng.uniform(low, high) / 20))


def stretch(wave: np.ndarray, factor: float) -> np.ndarray:
    """Play faster (factor > 1) or slower: speed and pitch change together. Linear interpolation."""
    positions = np.arange(0, len(wave) - 1, factor, dtype=np.float32)
    return np.interp(positions, np.arange(len(wave)), wave).astype(np.float32)


def digit_window(rng: np.random.Generator, clips: Clips) -> Window:
    """One digit, or up to eight one after the other."""
    window = Window()
    for _ in range(1 if rng.random() < 0.35 else 8):
        wave, word = clips[rng.integers(len(clips))]
        wave = stretch(wave, rng.uniform(0.85, 1.18)) * gain(rng, -14, 6)
        before, after = rng.integers(0, 6400, size=2) * (rng.random(2) < 0.4)
        padded = np.pad(wave, (before, after))[: WINDOW - FRAME]
        if not window.add(padded, [(before, before + len(wave), word)], {"label": word}):
            break
    if rng.random() < 0.5:
        window.noise(rng, rng.uniform(5, 40))
    return window


def crop(rng: np.random.Generator, wave: np.ndarray, length: int) -> np.ndarray:
    """A random part that is not (nearly) silent: these clips are padded with zeros after short events."""
    for _ in range(5):
        start = rng.integers(max(1, len(wave) - length + 1))
        part = wave[start : start + length]
        if np.mean(part**2) > 0.2 * np.mean(wave**2):
            break
    return part


def scene_clip(rng: np.random.Generator, clips: Clips, length: int) -> tuple[np.ndarray, str]:
    """One environmental sound, changed in speed, rotated in time, cut to at most `length` samples, at unit power."""
    wave, label = clips[rng.integers(len(clips))]
    wave = stretch(wave, rng.uniform(0.8, 1.25))
    if rng.random() < 0.5:
        wave = np.roll(wave, rng.integers(len(wave)))
    wave = crop(rng, wave, length)
    return wave / np.sqrt(np.mean(wave**2) + 1e-9), label


def scene_window(rng: np.random.Generator, clips: Clips) -> Window:
    """One environmental sound, two mixed with labels in proportion (between-class learning, Tokozume et al., ICLR
    2018), or two one after the other."""
    window = Window()
    draw = rng.random()
    if draw < 0.25:
        for _ in range(2):
            wave, label = scene_clip(rng, clips, WINDOW // 2)
            window.add(wave * gain(rng, -40, -12), [(0, len(wave), label)], {"label": label})
    else:
        wave, label = scene_clip(rng, clips, int(rng.uniform(0.5, 1.0) * WINDOW))
        other, second, share = np.zeros_like(wave), label, 1.0
        if draw < 0.65:
            other, second = scene_clip(rng, clips, len(wave))
            other = np.pad(other, (0, len(wave) - len(other)))
            share = rng.uniform(0.5, 1.0)
        mixed = (share * wave + (1 - share) * other) / math.hypot(share, 1 - share)
        window.add(mixed.astype(np.float32) * gain(rng, -40, -12), [(0, len(mixed), label)], {"label": label})
        window.events[1, window.events[0] != UNKNOWN] = EVENTS.index(second)
        window.segments = [(first, end, facts, second, share) for first, end, facts, _, _ in window.segments]
    if rng.random() < 0.3:
        window.noise(rng, rng.uniform(10, 40))
    np.clip(window.samples, -1, 1, out=window.samples)
    return window


def sound_facts(sound: sounds.Sound) -> dict[str, str]:
    """{head: answer} for a procedural sound."""
    named = {"which-sound": "label", "count-beeps": "count", "count-hits": "count"}
    return {"label": sound.kind} | {named.get(name, name): answer for name, answer in sounds.facts(sound).items()}


def procedural_window(rng: np.random.Generator) -> Window:
    """One procedural sound, or up to four one after the other."""
    window = Window()
    for _ in range(1 if rng.random() < 0.6 else 4):
        sound = sounds.sample_sound(rng)
        wave, events = sounds.render(sound, rng)
        if not window.add(wave, events, sound_facts(sound)):
            break
    return window


def masked(rng: np.random.Generator, mels: Tensor, frequencies: int, times: int) -> None:
    """SpecAugment (Park et al., 2019) in place on (80, T): two bands and two stretches, filled with the mean."""
    mean = mels.mean()
    for size, axis in ((frequencies, 0), (times, 1)):
        for _ in range(2):
            width = int(rng.integers(0, size + 1))
            start = int(rng.integers(0, mels.shape[axis] - width + 1))
            mels.narrow(axis, start, width).fill_(mean)


# --- one step ----------------------------------------------------------------------------------------------------------


def make_batch(
    rng: np.random.Generator, digits: Clips, scenes: Clips, size: int, log_mel: LogMel, device: torch.device
) -> tuple[Tensor, list[Window]]:
    """(N, 80, T) augmented log-mels on the device and their windows: 35 % digits, 35 % scenes, 30 % procedural."""
    makers = (
        lambda: digit_window(rng, digits),
        lambda: scene_window(rng, scenes),
        lambda: procedural_window(rng),
    )
    sources = rng.choice(3, size=size, p=(0.35, 0.35, 0.3))
    windows = [makers[source]() for source in sources]
    # An equaliser of up to about 6 dB (0.6 in log10 of the power) for recordings; procedural sounds need none.
    bins = np.linspace(-1, 1, 80)
    tilt = [
        (rng.uniform(-0.4, 0.4) * bins + rng.uniform(0, 0.3) * np.sin(3 * bins + rng.uniform(0, 6.3))) * (source < 2)
        for source in sources
    ]
    waves = torch.from_numpy(np.stack([window.samples for window in windows])).to(device)
    mels = log_mel(waves, torch.tensor(np.stack(tilt), dtype=torch.float32, device=device)[:, :, None])
    for mel, source in zip(mels, sources, strict=True):
        if source < 2:
            masked(rng, mel, (8, 14)[source], (0, 60)[source])
    return mels, windows


def pool(features: Tensor, spans: list[tuple[int, int, int]]) -> Tensor:
    """Mean of features (N, FRAMES, D) over each (row, first frame, end frame): (S, D)."""
    rows, first, end = torch.tensor(spans, device=features.device).T
    frames = torch.arange(FRAMES, device=features.device)
    inside = ((frames >= first[:, None]) & (frames < end[:, None])).float()
    return torch.einsum("sf,sfd->sd", inside / inside.sum(1, keepdim=True), features[rows])


def training_loss(encoder: Encoder, mels: Tensor, windows: list[Window]) -> dict[str, Tensor]:
    """{"events": cross-entropy over frames, "label": over clips, "facts": sum over the other heads}, label-mixed."""
    with torch.autocast(mels.device.type, torch.bfloat16):
        features = encoder.features(mels)
    features = features.float()
    device = features.device

    shares = torch.tensor([window.segments[0][4] for window in windows], device=device, dtype=torch.float32)
    events = torch.tensor(np.stack([window.events for window in windows]), device=device)  # (N, 2, FRAMES)
    logits = encoder.event_head(features).transpose(1, 2)  # (N, classes, FRAMES)
    first, second = (F.cross_entropy(logits, events[:, i], reduction="none") for i in (0, 1))
    per_frame = shares[:, None] * first + (1 - shares[:, None]) * second
    event_loss = per_frame.sum() / (events[:, 0] != UNKNOWN).sum().clamp(min=1)

    segments = [(row, *segment) for row, window in enumerate(windows) for segment in window.segments]
    facts = encoder.facts(pool(features, [segment[:3] for segment in segments]))
    # A window of eight digits weighs more than one of a single scene, but not eight times as much.
    weights = torch.tensor([len(windows[s[0]].segments) ** -0.5 for s in segments], device=device)
    share = torch.tensor([segment[5] for segment in segments], device=device, dtype=torch.float32)
    label, other = (
        F.cross_entropy(facts["label"], torch.tensor([HEADS["label"].index(name) for name in names], device=device),
                        reduction="none", label_smoothing=0.05)
        for names in ([s[3]["label"] for s in segments], [s[4] for s in segments])
    )  # fmt: skip
    label_loss = (weights * (share * label + (1 - share) * other)).sum() / weights.sum()

    fact_loss = torch.zeros((), device=device)
    for head, values in HEADS.items():
        known = [i for i, segment in enumerate(segments) if head in segment[3]]
        if head != "label" and known:
            target = torch.tensor([values.index(segments[i][3][head]) for i in known], device=device)
            fact_loss = fact_loss + F.cross_entropy(facts[head][known], target, reduction="sum") / len(windows)
    return {"events": event_loss, "label": label_loss, "facts": fact_loss}


# --- probe -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_facts(encoder: Encoder, log_mel: LogMel, waves: list[np.ndarray], device: torch.device) -> list[dict[str, str]]:
    """{head: answer} of each clip, from the mean of its frames over all its windows, float32, no augmentation."""
    encoder.eval()
    pieces = [(i, wave[at : at + WINDOW]) for i, wave in enumerate(waves) for at in range(0, len(wave), WINDOW)]
    sums, counts = torch.zeros(len(waves), 160, device=device), torch.zeros(len(waves), device=device)
    for at in range(0, len(pieces), 32):
        part = pieces[at : at + 32]
        padded = np.stack([np.pad(wave, (0, WINDOW - len(wave))) for _, wave in part])
        features = encoder.features(log_mel(torch.from_numpy(padded).to(device)))
        for (i, wave), feature in zip(part, features, strict=True):
            frames = -(-len(wave) // FRAME)
            sums[i] += feature[:frames].sum(0)
            counts[i] += frames
    logits = encoder.facts(sums / counts[:, None])
    encoder.train()
    answers = {head: [HEADS[head][k] for k in values.argmax(1).tolist()] for head, values in logits.items()}
    return [{head: values[i] for head, values in answers.items()} for i in range(len(waves))]


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


# --- run ---------------------------------------------------------------------------------------------------------------


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

    encoder.train()
    began = saved = time.monotonic()
    first, averages = done, Counter[str]()
    for step in range(done, arguments.steps):
        torch.manual_seed(arguments.seed * 1_000_000 + step)  # dropout
        rng = np.random.default_rng((arguments.seed, step))
        mels, windows = make_batch(rng, *train_sets, arguments.batch, log_mel, device)
        losses = training_loss(encoder, mels, windows)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.lr, arguments.warmup, arguments.steps)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        averages.update({name: float(loss.detach()) / arguments.log_every for name, loss in losses.items()})
        done = step + 1
        if done % arguments.log_every == 0:
            rate = (done - first) / (time.monotonic() - began)
            shown = " ".join(f"{name} {value:.3f}" for name, value in averages.items())
            print(f"step {done}/{arguments.steps} {shown} | {rate:.2f} steps/s, {(arguments.steps - done) / rate / 60:.1f} min left", flush=True)
            averages.clear()
        last = done == arguments.steps
        if last or done % arguments.probe_every == 0:
            scores = probe(encoder, log_mel, held_out, 3000 if last else 330, device)
            print("  " + ", ".join(f"{name} {s['accuracy']:.3f}/{s['n']}" for name, s in scores.items()), flush=True)
            with (output / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": done, "scores": scores}) + "\n")
        if last or time.monotonic() - saved > 180:
            save_checkpoint(output / "checkpoint.safetensors", encoder, optimizer, done)
            export(encoder, log_mel, output / "whisper")
            saved = time.monotonic()
    (output / "scores.json").write_text(json.dumps({"seed": arguments.seed, "steps": done, "scores": scores}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdd", type=Path, required=True, help="folder written by training/prepare_fsdd.py")
    parser.add_argument("--esc10", type=Path, required=True, help="folder written by training/prepare_esc10.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint, the log and whisper/")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=16, help="windows of 5 seconds per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--probe-every", type=int, default=500)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
