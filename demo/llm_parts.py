"""The embedded assistant's tokenizer, language model, and how dialogues become its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import text_worlds
import torch

VOCABULARY = 1536
PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
PROMPT_WEIGHT = 0.02  # of a user's or system's token in the loss; an assistant's token has 1
# An ending of the plural is a token of its own, so that "circle" and "circles" share one: what is asked for can then be
# found by being the same. For the same reason a reply begins with a space: its first word is the token it is elsewhere.
PLURAL = r"(?<=x|ss|sh|ch)es\b|(?<=[a-z]{3}[a-rt-z])s\b"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}{% set text = message['content'] | map(attribute='text') | join('') %}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %} {{ text }}<|end|>{% endgeneration %}"
    "{% elif message['role'] in ['system', 'user'] %}"
    "<|{{ message['role'] }}|>{{ text }}<|end|>"
    "{% else %}{{ raise_exception('roles are system, user and assistant, not ' ~ message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE with `VOCABULARY` tokens learned from `texts`; single digits, any UTF-8 text round-trips."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PLURAL), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in (PAD, SYSTEM, USER, ASSISTANT, END)
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def build_model(tokenizer: Any) -> Any:
    """A Llama of about 4.3 million parameters with random weights.

    Attention starts *mimetic* (Trockman and Kolter, arXiv 2305.09828): keys equal queries, and what a value writes back
    is what it read. So from the first step a token finds its equals and copies them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=8,
            intermediate_size=512,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            rms_norm_eps=1e-5,
            attn_implementation="eager",  # trains 1.2 times faster on a CPU than the fused kernel, and compiles
        )
    )
    with torch.no_grad():
        # Larger than usual, so that words stay apart while Adam moves them.
        model.get_input_embeddings().weight.normal_(0, 256**-0.5)
        for layer in model.model.layers:
            for parameter in layer.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 256**-0.5)
            attention = layer.self_attn
            attention.q_proj.weight.mul_(0.75)
            attention.k_proj.weight.copy_(attention.q_proj.weight + 0.02 * torch.randn(256, 256))
            attention.o_proj.weight.copy_(0.5 * attention.v_proj.weight.T)
            layer.mlp.down_proj.weight.mul_(0.3)
    return model


@dataclass
class Sample:
    """A dialogue in tokens. Patch words beyond the first of a patch are `extra`: (position, token id) pairs whose
    embeddings are added to the one in `ids`, so that a patch is one vector, as a picture encoder's will be."""

    ids: list[int]
    weights: list[float]
    extra: list[tuple[int, int]]


class Encoder:
    """Lays dialogues out in tokens as `CHAT_TEMPLATE` does."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = {token: tokenizer.convert_tokens_to_ids(token) for token in (SYSTEM, USER, ASSISTANT, END)}
        self.words: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def word(self, word: str) -> list[int]:
        """The tokens of one word of a patch."""
        if word not in self.words:
            self.words[word] = self.text(" " + word)
        return self.words[word]

    def __call__(self, messages: list[dict[str, str]], reply: bool = False) -> Sample:
        """`reply` ends the sample with the mark that asks the assistant to speak."""
        sample = Sample([], [], [])
        for message in messages:
            weight = 1.0 if message["role"] == "assistant" else PROMPT_WEIGHT
            self._add(sample, [self.special[f"<|{message['role']}|>"]], 0.0)
            space = " " if message["role"] == "assistant" else ""
            for index, part in enumerate((space + message["content"]).split(text_worlds.PATCHES)):
                if index % 2 == 0:
                    self._add(sample, self.text(part) if part else [], weight)
                    continue
                for line in part.split("\n"):
                    tokens = [token for word in line.split() for token in self.word(word)]
                    sample.extra += [(len(sample.ids), token) for token in tokens[1:]]
                    self._add(sample, tokens[:1], 0.0)
            self._add(sample, [self.special[END]], weight)
        if reply:
            self._add(sample, [self.special[ASSISTANT]], 0.0)
        return sample

    @staticmethod
    def _add(sample: Sample, tokens: list[int], weight: float) -> None:
        sample.ids += tokens
        sample.weights += [weight] * len(tokens)


def embed(
    model: Any, batch: list[Sample], width: int, left: bool, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (N, T), embeddings (N, T, D) with the patches' words summed, and attention mask (N, T); T is `width`."""
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    extra: list[tuple[int, int]] = []
    for row, sample in enumerate(batch):
        offset = width - len(sample.ids) if left else 0
        ids[row, offset : offset + len(sample.ids)] = torch.tensor(sample.ids)
        mask[row, offset : offset + len(sample.ids)] = 1
        extra += [(row * width + offset + position, token) for position, token in sample.extra]
    ids = ids.to(device)
    embeddings = model.get_input_embeddings()(ids)
    if extra:
        places, tokens = torch.tensor(extra).T.to(device)
        added = torch.zeros_like(embeddings).flatten(0, 1).index_add(0, places, model.get_input_embeddings()(tokens))
        embeddings = embeddings + added.view_as(embeddings)
    return ids, embeddings, mask.to(device)
