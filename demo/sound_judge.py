"""A classifier that says what is heard in two seconds of sound, to score what the assistant lets be heard.

    python demo/sound_judge.py --fsdd runs/embedded/sets/fsdd --output runs/embedded/judge.safetensors

It is trained on true sounds only: recordings of people who speak digits, and the sounds of `sounds`; never on anything that a
generator made. Convolutions over a log-mel spectrogram, then one query per fact (`caption_encoder.Questions`). Its accuracy
on true sounds that it was not trained on, printed at the end, is the most that a generator can reach.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from caption_encoder import Questions
from generator_training import set_rate
from safetensors.torch import load_file, save_file
from sound_wishes import CLASSES, FACTS, SAMPLES, SoundWish, Voices, classes, facts, perform, sample_wish
from sounds import SAMPLE_RATE
from torch import Tensor, nn

BINS, HOP, WIDTH = 64, 256, 128


class Judge(nn.Module):
    """Log-mel spectrograms ``(N, frames, BINS)`` -> for every fact the logits of its classes."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((BINS, 5, 1), (WIDTH, 5, 2), (WIDTH, 3, 1), (WIDTH, 3, 2), (WIDTH, 3, 1))
        self.layers = nn.ModuleList(nn.Conv1d(n, WIDTH, size, stride, size // 2) for n, size, stride in sizes)
        self.norms = nn.ModuleList(nn.GroupNorm(8, WIDTH) for _ in sizes)
        self.places = nn.Parameter(0.02 * torch.randn(SAMPLES // HOP // 4, WIDTH))
        self.questions = Questions(WIDTH, CLASSES)

    def forward(self, mels: Tensor) -> Tensor:
        hidden = (mels.transpose(1, 2) + 5) / 3
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden = nn.functional.gelu(norm(layer(hidden)))
        return hidden.transpose(1, 2) + self.places


def spectrograms(waves: Sequence[np.ndarray]) -> Tensor:
    """Sounds at 16 kHz, cut or filled up to SAMPLES, as ``(N, frames, BINS)``."""
    from mmllm.generators.targets import MelTarget

    mel = MelTarget(SAMPLE_RATE, HOP, SAMPLES // HOP, BINS)
    return torch.cat([mel(np.asarray(wave, dtype=np.float32)) for wave in waves])


def train(voices: Voices, steps: int, seed: int) -> Judge:
    torch.manual_seed(seed)
    rng, judge, batch = random.Random(f"judge-{seed}"), Judge(), 64
    stepper = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    mels, wanted = torch.empty(0), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if step % 25 == 0:  # some of the sounds are new
            drawn = [sample_wish(rng) for _ in range(batch * (40 if step == 0 else 5))]
            new = spectrograms([perform(wish, rng, voices) for wish in drawn])
            known = torch.tensor([classes(wish) for wish in drawn])
            mels, wanted = torch.cat([new, mels])[:8000], torch.cat([known, wanted])[:8000]
        chosen = torch.randint(len(mels), (batch,))
        # Microphones and rooms differ: another tilt of the spectrum, another noise floor.
        tilt = 0.6 * torch.randn(batch, 1, 1) * torch.linspace(-1, 1, BINS)
        floor = -11.5 + 4.0 * torch.rand(batch, 1, 1)
        heard = torch.logaddexp(mels[chosen] + tilt + 0.2 * torch.randn(batch, SAMPLES // HOP, BINS), floor)
        set_rate([stepper], min(1.0, step / 50) * (1 - step / steps) + 0.01)
        loss, right = judge.questions(judge(heard), wanted[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        stepper.step()
        stepper.zero_grad()
        if step % 100 == 99:
            print(
                f"judge step {step + 1}/{steps} loss {loss.item():.4f} all facts right {right.item():.1%}", flush=True
            )
    return judge.eval()


@torch.no_grad()
def heard_in(judge: Judge, waves: Sequence[np.ndarray]) -> list[dict[str, str]]:
    """What is heard in each sound, in the form of `sound_wishes.facts`."""
    found = []
    for start in range(0, len(waves), 64):
        logits = judge.questions.answers(judge(spectrograms(waves[start : start + 64])))
        chosen = torch.stack([fact.argmax(-1) for fact in logits], dim=1).tolist()
        found += [{name: values[k] for (name, values), k in zip(FACTS, row, strict=True)} for row in chosen]
    return found


def asked_for(wish: SoundWish) -> dict[str, str]:
    """What is to be heard, in the form of `sound_wishes.facts`.

    Loudness is in it only where the wish says "quiet": a caption that says nothing may be played at any.
    """
    return {name: value for name, value in facts(wish).items() if name != "loudness" or value == "quiet"}


def right(wish: SoundWish, heard: dict[str, str]) -> dict[str, bool]:
    """Which facts of the wish are heard: ``digits`` all in order, or the ``kind`` of sound, and ``all``."""
    known = asked_for(wish)
    everything = all(heard[name] == value for name, value in known.items())
    if wish.sound is None:
        spoken = all(heard[name] == value for name, value in known.items() if name.startswith("digit"))
        return {"one digit" if len(wish.digits) == 1 else "several digits": spoken, "all": everything}
    return {"kind": known["kind"] == heard["kind"], "facts of a sound": everything, "all": everything}


def in_words(heard: dict[str, str]) -> str:
    """What was heard: "digits four two", "kind beeps, count three"."""
    digits = [value for name, value in heard.items() if name.startswith("digit") and value]
    others = [f"{name} {value}" for name, value in heard.items() if not name.startswith("digit") and value]
    return ", ".join([f"digits {' '.join(digits)}"] * bool(digits) + others) or "nothing"


def load(path: Path) -> Judge:
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdd", type=Path, required=True, help="folder written by training/prepare_fsdd.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    judge = train(Voices(arguments.fsdd), arguments.steps, arguments.seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), arguments.output)
    print("on true sounds:", on_true_sounds(judge, Voices(arguments.fsdd, "validation"), 600), flush=True)


def on_true_sounds(judge: Judge, voices: Voices, count: int) -> dict[str, Any]:
    """The judge's own score, on recordings that it was not trained on."""
    from evaluate_drawing import summary

    rng = random.Random("true sounds")
    wanted = [sample_wish(rng) for _ in range(count)]
    heard = heard_in(judge, [perform(wish, rng, voices) for wish in wanted])
    return summary([right(w, h) for w, h in zip(wanted, heard, strict=True)])


if __name__ == "__main__":
    main()
