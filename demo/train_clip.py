"""Train the embedded assistant's small CLIP from nothing, on procedural scenes rendered on the fly.

    python demo/train_clip.py --output runs/clip --minutes 40 [--device cuda] [--resume]

Classes and the contrastive loss are open_clip's. Three losses share one vision forward:

* contrastive (CLIP, arXiv 2103.00020): the picture against its one-line summary;
* captioning (CoCa, arXiv 2205.01917): a small decoder reads the *patch tokens* by cross-attention and writes short
  captions, each exact about one part of the scene, so that the patches keep counts, places and contacts;
* grounding: each patch names the shapes whose centres it holds (colour, shape, size, touched walls). Procedural scenes
  know this exactly, and it teaches detail many times faster than captions alone.

Pictures keep their aspect ratio (see ``mmllm/encoders/vit.py``). The output folder holds ``open_clip_config.json`` and
``open_clip_model.safetensors`` in open_clip's own layout, the word list of the text tower and the probe's results;
the state for ``--resume`` is safetensors as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from clip_data import GROUNDING_SIZE, Words, scene_stream
from clip_probe import probe
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmllm.encoders.vit import VitFeatures, vit_features

EMBED_DIM, CONTEXT = 192, 48
VISION = {"image_size": 200, "layers": 6, "width": 192, "head_width": 32, "patch_size": 20, "mlp_ratio": 3.0}
MEAN, STD = 0.5, 0.5  # of every channel, values in 0-1
MAX_PATCHES = 100


class Trainee(nn.Module):
    """The CLIP that is kept, and the two heads that exist for training only."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        from open_clip.model import CLIP
        from open_clip.transformer import MultimodalTransformer

        text = {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "width": 192,
            "heads": 6,
            "layers": 2,
            "mlp_ratio": 2.0,
        }
        self.text_config: dict[str, Any] = text
        self.clip = CLIP(EMBED_DIM, VISION, text)
        self.decoder = MultimodalTransformer(
            width=192, layers=2, heads=6, context_length=CONTEXT, mlp_ratio=2.0, output_dim=vocabulary
        )
        nn.init.normal_(self.decoder.text_projection, std=192**-0.5)
        self.grounding = nn.Linear(192, GROUNDING_SIZE)
        nn.init.constant_(self.grounding.bias, -4.0)  # most patches hold no centre

    def see(self, patches: Tensor, grids: Tensor) -> tuple[VitFeatures, Tensor, Tensor]:
        """uint8 (N, S, 3*p*p) -> features, patch tokens after ln_post (N, S, D), picture embeddings (N, E)."""
        visual = self.clip.visual
        pixels = (patches.float() / 255 - MEAN) / STD
        features = vit_features(visual, pixels, grids, len(visual.transformer.resblocks))
        pooled = visual.ln_post(features.class_token) @ visual.proj
        return features, visual.ln_post(features.tokens), F.normalize(pooled.float(), dim=-1)

    def read(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(M, L) ids -> token features (M, L, D) and text embeddings (M, E) taken at the end token, the largest id."""
        clip, length = self.clip, text.shape[1]
        x = clip.token_embedding(text) + clip.positional_embedding[:length]
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
        pooled = x[torch.arange(len(x), device=x.device), text.argmax(dim=-1)] @ clip.text_projection
        return x, F.normalize(pooled.float(), dim=-1)

    def write(self, words: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
        """Token features (N*K, L, D) of K captions per picture and patch tokens (N, S, D) -> logits (N*K, L, V)."""
        decoder, (count, length, width) = self.decoder, words.shape
        pictures = len(patches)
        causal = decoder.attn_mask[:length, :length]
        bias = torch.zeros(mask.shape, dtype=words.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
        queries = count // pictures * length  # the captions of a picture share its keys: one long row of queries
        bias = bias[:, None, None].expand(-1, 6, queries, -1).reshape(pictures * 6, queries, -1)
        for block, cross in zip(decoder.resblocks, decoder.cross_attn, strict=True):
            words = block(words, attn_mask=causal)
            rows = words.reshape(pictures, queries, width)
            words = cross(rows, k_x=patches, v_x=patches, attn_mask=bias).reshape(count, length, width)
        logits: Tensor = decoder.ln_final(words) @ decoder.text_projection
        return logits


def losses(model: Trainee, batch: dict[str, Tensor], contrast: nn.Module) -> dict[str, Tensor]:
    features, patches, pictures = model.see(batch["patches"], batch["grids"])
    text = batch["text"].flatten(0, 1)  # (N*K, L); the first caption of each picture is its summary
    words, sentences = model.read(text)
    captions = batch["text"].shape[1]
    logits = model.write(words, patches, features.mask)
    grounding = model.grounding(patches).float()
    wrong = F.binary_cross_entropy_with_logits(grounding, batch["grounding"].float(), reduction="none").sum(-1)
    return {
        "contrastive": contrast(pictures, sentences[::captions], model.clip.logit_scale.exp()),
        "caption": F.cross_entropy(logits[:, :-1].float().transpose(1, 2), text[:, 1:], ignore_index=0),
        "grounding": (wrong * features.mask).sum() / features.mask.sum(),
    }


WEIGHTS = {"contrastive": 0.1, "caption": 1.0, "grounding": 1.0}


def optimizer_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only, as in CLIP; not on gains, biases, embeddings of positions and the temperature."""
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and "positional" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "positional" in n]
    return [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def save_state(folder: Path, model: Trainee, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Weights, moments and progress in one safetensors file, renamed into place when complete."""
    state = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{k}": v.contiguous() for k, v in moments.items()}
    temporary = folder / "training_state.part"
    save_file(state, temporary, metadata={"progress": json.dumps(progress)})
    os.replace(temporary, folder / "training_state.safetensors")


def load_state(folder: Path, model: Trainee, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from safetensors import safe_open

    path = folder / "training_state.safetensors"
    state = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    with safe_open(path, framework="pt") as file:
        progress: dict[str, Any] = json.loads(file.metadata()["progress"])
    return progress


def export(folder: Path, model: Trainee) -> None:
    """Write the CLIP in open_clip's own layout, half precision."""
    config = {
        "model_cfg": {"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": model.text_config},
        "preprocess_cfg": {"size": [200, 200], "mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {k: v.detach().half().contiguous() for k, v in model.clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=40.0, help="training time; the learning rate reaches 0 at its end"
    )
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--captions", type=int, default=3, help="captions per picture, the summary included")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nlvr", type=Path, help="folder of the NLVR pack: its dev pictures are probed too")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    np.random.seed(args.seed)

    from open_clip.loss import ClipLoss

    listed = args.output / "words.json"
    words = Words(json.loads(listed.read_text()), CONTEXT) if args.resume else Words.from_scenes(CONTEXT)
    listed.write_text(json.dumps(words.words, indent=0) + "\n")
    model = Trainee(len(words.words)).to(args.device)
    count = sum(p.numel() for p in model.clip.visual.parameters())
    print(f"vision tower {count / 1e6:.2f} M parameters, vocabulary {len(words.words)}", flush=True)
    optimizer = torch.optim.AdamW(optimizer_groups(model, 0.05), lr=args.lr, betas=(0.9, 0.98), fused=True)
    progress: dict[str, Any] = {"step": 0, "pictures": 0, "seconds": 0.0}
    if args.resume:
        progress = load_state(args.output, model, optimizer)
        print(f"resumed at step {progress['step']}, {progress['seconds'] / 60:.1f} minutes in", flush=True)

    stream = scene_stream(args.seed + progress["step"], args.batch, args.captions, words, args.workers)
    contrast, budget = ClipLoss(), 60 * args.minutes
    shown, saved, probed = progress["seconds"], progress["seconds"], progress["seconds"]
    running: dict[str, float] = {}
    before, pictures_before = progress["seconds"], progress["pictures"]
    clock = time.monotonic()
    if args.device == "cpu":  # training through plain matrix products is 1.6 times faster than the fused CPU kernel
        torch.backends.cuda.enable_flash_sdp(False)
    for cpu_batch in stream:
        done = progress["seconds"] / budget
        if done >= 1:
            break
        warm = min(1.0, (progress["step"] + 1) / 200)
        rate = args.lr * warm * (0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * done))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = {k: v.to(args.device, non_blocking=True) for k, v in cpu_batch.items()}
        with torch.autocast(args.device.split(":")[0], torch.bfloat16):
            parts = losses(model, batch, contrast)
        loss = sum(WEIGHTS[k] * v for k, v in parts.items())
        assert isinstance(loss, Tensor)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.clip.logit_scale.clamp_(0, 4.6052)  # at most 100, as in CLIP
        for key, value in parts.items():
            now_at = value.item()
            running[key] = 0.95 * running.get(key, now_at) + 0.05 * now_at
        now = time.monotonic()
        progress["seconds"] += now - clock
        clock = now
        progress["step"] += 1
        progress["pictures"] += args.batch
        if progress["seconds"] - shown >= 15 or progress["step"] == 1:
            pace = (progress["pictures"] - pictures_before) / (progress["seconds"] - before)
            values = "  ".join(f"{k} {v:.4f}" for k, v in running.items())
            left = (budget - progress["seconds"]) / 60
            print(
                f"step {progress['step']}  {values}  lr {rate:.1e}  {pace:.0f} pictures/s  {left:.1f} min left",
                flush=True,
            )
            shown, before, pictures_before = progress["seconds"], progress["seconds"], progress["pictures"]
        if progress["seconds"] - saved >= 180:
            save_state(args.output, model, optimizer, progress)
            saved = progress["seconds"]
        if progress["seconds"] - probed >= 480:
            print(json.dumps(probe(model, words, 40, args.nlvr)), flush=True)
            export(args.output, model)
            probed, clock = progress["seconds"], time.monotonic()  # probing is not training time

    save_state(args.output, model, optimizer, progress)
    export(args.output, model)
    results = {"training": progress, "arguments": {k: str(v) for k, v in vars(args).items()}}
    results["probe"] = probe(model, words, 200, args.nlvr)
    (args.output / "probe.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["probe"], indent=2), flush=True)


if __name__ == "__main__":
    main()
