"""Train the embedded assistant's language model and its tokenizer from nothing.

    python demo/train_llm.py --output runs/embedded/llm --minutes 30 --seed 0

The text is made on the fly: scenes and sounds put into words with questions about them (`text_worlds`), and small talk
(`dialogues`). The assistant's words count fully in the loss, the user's and the system's a little. Progress goes to
stdout; `--resume` continues from the newest checkpoint in the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import dialogues
import drawing_talk
import moving_talk
import sound_talk
import text_worlds
import torch
from llm_parts import Encoder, Sample, build_model, build_tokenizer, embed
from real_wordings import WordedScenes, Written, read_written
from safetensors.torch import load_file, save_file

MUON_FACTOR = 2.5  # its rate over AdamW's
EASY_SHARE = 0.25  # of the run, in which drills and thinned-out scenes give way to whole scenes
CHUNK_SAMPLES = 400  # samples made, tokenised and sorted by length at a time
MAX_LENGTH = 768


def make_sample(rng: random.Random, worded: WordedScenes | None, ease: float = 0.0) -> list[dict[str, str]]:
    """One training dialogue; `rng` alone decides which. `ease` goes from 1 to 0 in the first part of training.

    At first there are drills only: mixed with scenes, what they teach drowns for thousands of steps.
    """
    if rng.random() < 0.05 + 2 * ease**2:
        return text_worlds.drill_dialogue(rng, ease)
    roll = rng.random()
    if roll < 0.55:
        return text_worlds.scene_dialogue(rng, ease, worded)
    if roll < 0.68:
        return text_worlds.joint_dialogue(rng, ease)
    if roll < 0.75:
        return text_worlds.sound_dialogue(rng)
    if roll < 0.78:
        return dialogues.to_messages(dialogues.sums(rng), rng)
    if roll < 0.82:
        return text_worlds.question_without_media(rng, worded.written.sentences if worded else [])
    if roll < 0.87:
        return drawing_talk.in_words(drawing_talk.drawing_turns(rng), rng)
    if roll < 0.89:
        turns = rng.choice((sound_talk.sound_turns, moving_talk.moving_turns))(rng)
        return drawing_talk.in_words(turns, rng)
    return dialogues.to_messages(dialogues.small_talk(rng), rng)


def batches(
    seed: int, chunk: int, encoder: Encoder, written: Written | None, tokens: int, ease: float
) -> list[list[Sample]]:
    """The batches of chunk number `chunk`: samples of like length, about `tokens` tokens each, in random order."""
    rng = random.Random(f"{seed}-{chunk}")
    worded = WordedScenes(written, rng) if written else None
    samples = [encoder(make_sample(rng, worded, ease)) for _ in range(CHUNK_SAMPLES)]
    samples = sorted((s for s in samples if len(s.ids) <= MAX_LENGTH), key=lambda s: (len(s.ids), rng.random()))
    result: list[list[Sample]] = []
    batch: list[Sample] = []
    for sample in samples:
        if batch and (len(batch) + 1) * len(sample.ids) > tokens:
            result.append(batch)
            batch = []
        batch.append(sample)
    result.append(batch)
    rng.shuffle(result)
    return result


def loss_of(model: Any, batch: list[Sample], device: str) -> torch.Tensor:
    """Weighted next-token cross-entropy, a scalar. Padding sits on the right, where causal attention never looks."""
    width = max(len(sample.ids) for sample in batch)
    weights = torch.zeros(len(batch), width)
    for row, sample in enumerate(batch):
        weights[row, : len(sample.ids)] = torch.tensor(sample.weights)
    weights = weights[:, 1:].to(device)
    wanted = weights > 0
    with torch.autocast(device_type=device.split(":")[0], dtype=torch.bfloat16):
        ids, embeddings, _ = embed(model, batch, width, False, device)
        hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[wanted])
    losses = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="none")
    return (losses * weights[wanted]).sum() / weights[wanted].sum()


def learning_rate(done: float, peak: float) -> float:
    """Warm-up over the first 2 % and a cosine down to 2 % of the peak; `done` is the share of the budget used."""
    if done < 0.02:
        return peak * (done / 0.02 + 0.01)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - 0.02) / 0.98))))


def build_optimizers(model: Any, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices of the layers, AdamW for the rest.

    Muon's steps are scaled to AdamW's size (arXiv 2502.16982); it bears a larger rate.
    """
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MUON_FACTOR * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def save_checkpoint(folder: Path, model: Any, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
    """Write the newest state beside the old one, then swap, so that a kill leaves one whole checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.{name}": value.detach().clone()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value).clone()
    save_file(tensors, folder / "new.safetensors", metadata={"state": json.dumps(state)})
    (folder / "new.safetensors").replace(folder / "checkpoint.safetensors")


def load_checkpoint(folder: Path, model: Any, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Put the saved state into model and optimizers; returns the counters."""
    from safetensors import safe_open

    path = folder / "checkpoint.safetensors"
    tensors = load_file(path)
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        owner[id(parameter)].state[parameter] = found
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["state"]))


@torch.no_grad()
def answer(
    model: Any, encoder: Encoder, prompts: list[list[dict[str, str]]], device: str, longest: int = 60
) -> list[str]:
    """Greedy replies to `prompts`, batched with padding on the left."""
    batch = [encoder(prompt, reply=True) for prompt in prompts]
    with torch.autocast(device_type=device.split(":")[0], dtype=torch.bfloat16):
        _, embeddings, mask = embed(model, batch, max(len(sample.ids) for sample in batch), True, device)
        out = model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=longest, do_sample=False)
    return [str(text).strip() for text in encoder.tokenizer.batch_decode(out, skip_special_tokens=True)]


def probe(model: Any, encoder: Encoder, seed: int, device: str, scenes: int = 120) -> dict[str, dict[str, float]]:
    """Exact match per question type on dialogues never trained on: {"type": {"n", "accuracy"}}."""
    rng = random.Random(f"probe-{seed}")
    asked = text_worlds.probe_questions(rng, scenes)
    for intent, phrasing, answers in dialogues.held_out_exchanges():
        asked.append((f"talk/{intent}", [{"role": "user", "content": phrasing}], answers))
    for _ in range(60):
        question, reply = dialogues.sum_question(rng)
        asked.append(("talk/sums", [{"role": "user", "content": question}], (reply,)))
    asked.sort(key=lambda item: sum(len(message["content"]) for message in item[1]))
    hits: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(asked), 64):
        part = asked[start : start + 64]
        for (kind, _, wanted), reply in zip(part, answer(model, encoder, [p for _, p, _ in part], device), strict=True):
            hits[kind].append(reply in wanted)
    return {
        kind: {"n": len(found), "accuracy": round(sum(found) / len(found), 3)} for kind, found in sorted(hits.items())
    }


def train(arguments: argparse.Namespace) -> None:
    """The whole run: tokenizer, training within the time budget, probe, fp16 export."""
    torch.manual_seed(arguments.seed)
    output, work = Path(arguments.output), Path(arguments.output) / "training"
    work.mkdir(parents=True, exist_ok=True)
    written = read_written(Path(arguments.nlvr)) if arguments.nlvr else None
    resume = arguments.resume and (work / "checkpoint.safetensors").exists()
    if resume:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    else:
        rng = random.Random(arguments.seed)
        worded = WordedScenes(written, rng) if written else None
        texts = [
            " " + message["content"].replace(text_worlds.PATCHES, "")
            for _ in range(12_000)
            for message in make_sample(rng, worded)
        ]
        tokenizer = build_tokenizer(texts + 3 * (written.sentences if written else []))
        tokenizer.save_pretrained(work / "tokenizer")
    model = build_model(tokenizer).to(arguments.device)
    encoder = Encoder(tokenizer)
    optimizers = build_optimizers(model, arguments.lr)
    state: dict[str, Any] = {"step": 0, "chunk": 0, "seconds": 0.0, "tokens": 0}
    if resume:
        state = load_checkpoint(work, model, optimizers)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{size / 1e6:.2f} M parameters, {len(tokenizer)} tokens, device {arguments.device}, state {state}", flush=True
    )
    run(arguments, model, encoder, optimizers, written, state, work)
    trained, model = model, build_model(tokenizer).to(arguments.device).eval()  # one that is not compiled
    model.load_state_dict(trained.state_dict())
    result = probe(model, encoder, arguments.seed, arguments.device)
    print(json.dumps(result, indent=1), flush=True)
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "training.json").write_text(
        json.dumps({"seed": arguments.seed, **state, "probe": result}, indent=1) + "\n"
    )
    print("saved", output, flush=True)


def run(
    arguments: argparse.Namespace,
    model: Any,
    encoder: Encoder,
    optimizers: list[torch.optim.Optimizer],
    written: Written | None,
    state: dict[str, Any],
    work: Path,
) -> None:
    """The training loop; ends when the steps or the minutes are used up. Changes model, optimizers and `state`."""
    budget = arguments.minutes * 60
    model.train()
    for layer in model.model.layers:  # 1.4 times faster on a CPU; in place, so that the names of the weights stay
        layer.compile(dynamic=True)
    saved = shown = time.monotonic()
    losses: list[float] = []
    while state["seconds"] < budget and state["step"] < arguments.steps:
        begin = time.process_time()
        done = max(state["seconds"] / budget, state["step"] / arguments.steps)
        ease = max(0.0, 1 - done / EASY_SHARE)
        todo = batches(arguments.seed, state["chunk"], encoder, written, arguments.batch_tokens, ease)
        state["seconds"] += time.process_time() - begin
        for batch in todo:
            begin = time.process_time()
            done = max(state["seconds"] / budget, state["step"] / arguments.steps)
            if done >= 1:
                break
            for optimizer, factor in zip(optimizers, (MUON_FACTOR, 1.0), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = factor * learning_rate(done, arguments.lr)
            loss = loss_of(model, batch, arguments.device)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            losses.append(loss.item())
            state["step"] += 1
            state["tokens"] += sum(len(sample.ids) for sample in batch)
            state["seconds"] += time.process_time() - begin
            if time.monotonic() - shown > 15:
                rate, left = (
                    state["tokens"] / state["seconds"],
                    (state["seconds"] / done - state["seconds"]) if done else budget,
                )
                mean = sum(losses) / len(losses)
                print(
                    f"step {state['step']} loss {mean:.4f} {rate:.0f} tokens/s {done:.1%} ETA {left / 60:.1f} min",
                    flush=True,
                )
                losses, shown = [], time.monotonic()
        state["chunk"] += 1
        if time.monotonic() - saved > arguments.save_minutes * 60:
            save_checkpoint(work, model, optimizers, state)
            saved = time.monotonic()
    save_checkpoint(work, model, optimizers, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for the finished model and the checkpoints")
    parser.add_argument(
        "--nlvr", default="", help="NLVR as written by training/prepare_nlvr.py: real statements about scenes"
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="processor time, so that a busy machine changes nothing"
    )
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-tokens", type=int, default=2000)
    parser.add_argument("--save-minutes", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments)


if __name__ == "__main__":
    main()
