"""A small CLIP text encoder for captions, trained from nothing to know what a caption says.

Its states are the condition of a generator. They are learned by answering: queries that look at the states through one
attention layer must tell every fact of the caption (`labels`). Those queries are thrown away afterwards.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Fact = tuple[int, ...]  # one class per question, -1 where a question does not apply


def build_tokenizer(captions: list[str], length: int, vocabulary: int = 512) -> Any:
    """A lower-cased CLIP tokenizer in which every word of ``captions`` is one token, padded to ``length`` by pipelines."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,?!'-"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    # Every letter as the end of a word, so that any word can be spelled.
    tokenizer.train_from_iterator([*captions, " ".join(letters), *(f"{a}{a}" for a in letters)], trainer)
    saved = json.loads(tokenizer.to_str())["model"]
    return CLIPTokenizer(
        vocab=saved["vocab"], merges=[tuple(pair) for pair in saved["merges"]], model_max_length=length
    )


def build_text_encoder(tokenizer: Any, width: int, layers: int) -> Any:
    """transformers' ``CLIPTextModel`` with random weights; states are ``(N, tokenizer.model_max_length, width)``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_roberta_tokenizer(captions: list[str], length: int, vocabulary: int = 512) -> Any:
    """A RoBERTa tokenizer in which every word of ``captions`` is one token, padded to ``length`` by pipelines."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer

    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(captions, vocabulary, min_frequency=1, special_tokens=special, show_progress=False)
    saved = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in saved["merges"]]
    return RobertaTokenizer(vocab=saved["vocab"], merges=merges, model_max_length=length)


def build_clap_encoder(tokenizer: Any, width: int, layers: int) -> Any:
    """transformers' ``ClapTextModelWithProjection`` with random weights; its one vector is as wide as its states."""
    from transformers import ClapTextConfig, ClapTextModelWithProjection

    return ClapTextModelWithProjection(
        ClapTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=tokenizer.model_max_length + tokenizer.pad_token_id + 1,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def clip_states(encoder: Any, ids: Tensor) -> Tensor:
    """What a Stable Diffusion reads of a caption: ``(N, L, width)``."""
    states: Tensor = encoder(ids).last_hidden_state
    return states


def clap_states(encoder: Any, ids: Tensor) -> Tensor:
    """What an AudioLDM reads of a caption: one vector ``(N, 1, width)``, of length sqrt(width) here and not 1."""
    found = encoder(ids, attention_mask=(ids != encoder.config.pad_token_id).long()).text_embeds
    return nn.functional.normalize(found, dim=-1)[:, None] * found.shape[-1] ** 0.5


def tokens(tokenizer: Any, captions: list[str]) -> Tensor:
    """Ids ``(N, L)`` as a diffusers pipeline makes them: padded and cut to the model's length."""
    out: Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return out


class Questions(nn.Module):
    """One learned query and one classifier for every fact."""

    def __init__(self, width: int, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(len(classes), width))
        self.attention = nn.MultiheadAttention(width, width // 32, batch_first=True)
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in classes)

    def answers(self, states: Tensor) -> list[Tensor]:
        """States ``(N, L, D)`` -> logits ``(N, classes)`` of every fact."""
        seen, _ = self.attention(self.queries.expand(len(states), -1, -1), states, states, need_weights=False)
        return [head(seen[:, index]) for index, head in enumerate(self.heads)]

    def forward(self, states: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
        """States ``(N, L, D)``, facts ``(N, questions)`` -> mean loss, share of captions with every fact right."""
        losses, right = [], torch.ones(len(states), dtype=torch.bool)
        for logits, wanted in zip(self.answers(states), facts.unbind(1), strict=True):
            losses.append(nn.functional.cross_entropy(logits, wanted, ignore_index=-1))
            right &= (wanted < 0) | (logits.argmax(-1) == wanted)
        return torch.stack(losses).mean(), right.float().mean()


def train_text_encoder(
    tokenizer: Any,
    encoder: Any,
    sample: Callable[[random.Random], tuple[str, Fact]],
    classes: tuple[int, ...],
    steps: int,
    seed: int,
    batch: int = 128,
    lr: float = 1.5e-3,
    read: Callable[[Any, Tensor], Tensor] = clip_states,
) -> float:
    """Train ``encoder`` in place on captions from ``sample``; the share of captions fully understood at the end."""
    rng, questions = random.Random(f"captions-{seed}"), Questions(encoder.config.projection_dim, classes)
    parameters = [*encoder.parameters(), *questions.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    begin, shown = time.monotonic(), []
    encoder.train()
    for step in range(steps):
        captions, facts = zip(*(sample(rng) for _ in range(batch)), strict=True)
        states = read(encoder, tokens(tokenizer, list(captions)))
        # Noise on the states: what is learned has to be told from its neighbours from afar.
        states = states + 0.1 * torch.randn_like(states)
        loss, right = questions(states, torch.tensor(facts))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        shown.append(right.item())
        if step % 100 == 99:
            print(
                f"text step {step + 1}/{steps} loss {loss.item():.4f} understood {sum(shown[-100:]) / 100:.1%} "
                f"{time.monotonic() - begin:.0f} s",
                flush=True,
            )
    encoder.eval()
    return sum(shown[-50:]) / 50


def text_part(
    folder: Path,
    sample: Callable[[random.Random], tuple[str, Fact]],
    classes: tuple[int, ...],
    shape: tuple[int, int, int],
    steps: int,
    seed: int,
    resume: bool,
) -> tuple[Any, Any]:
    """Tokenizer and frozen text encoder of ``shape`` (positions, width, layers): those in ``folder``, or new ones, kept there."""
    if resume and (folder / "encoder" / "model.safetensors").exists():
        from transformers import CLIPTextModel, CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        return tokenizer, CLIPTextModel.from_pretrained(folder / "encoder").requires_grad_(False).eval()
    length, width, layers = shape
    rng = random.Random(f"words-{seed}")
    torch.manual_seed(seed)
    tokenizer = build_tokenizer([sample(rng)[0] for _ in range(4000)], length)
    encoder = build_text_encoder(tokenizer, width, layers)
    understood = train_text_encoder(tokenizer, encoder, sample, classes, steps, seed)
    print(f"captions understood {understood:.1%}, {len(tokenizer)} words", flush=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "encoder")
    return tokenizer, encoder.requires_grad_(False).eval()


@torch.no_grad()
def nothing(tokenizer: Any, encoder: Any) -> Tensor:
    """The states of an empty caption, ``(1, L, D)``."""
    return clip_states(encoder, tokens(tokenizer, [""]))
