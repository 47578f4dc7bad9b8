"""X-LLM's C-Former: convolutions, a transformer, continuous integrate-and-fire, and a BERT (transformers' own module)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.encoders.base import Encoder
from mmllm.encoders.cformer import AcousticNumbers, BertNumbers, CFormerConfig
from mmllm.encoders.sounds import RATE, Samples, check_sound, filter_bank, mel_bank, povey
from mmllm.errors import CheckpointError
from mmllm.pretrained import find, load_into, read_json, read_tensors, weight_files


class CFormerPreprocessor:
    """Mono float32 samples at 16 kHz to log-mel frames; deterministic, picklable, no weights.

    An item is ``mel`` (T, F) float32, every bin of zero mean and unit variance over the sound, and ``count`` () int64, its
    features. Collated: ``mels`` (N, T, F), zeros behind the shorter ones; ``frames`` (N,) and ``counts`` (N,) int64.
    """

    media = "audio"

    def __init__(self, config: CFormerConfig) -> None:
        self.decode_options: dict[str, Any] = {"sample_rate": RATE}
        self.config = config
        self.bank, self.window = torch.from_numpy(mel_bank(config.acoustic.num_mel_bins)), povey()

    def __call__(self, media: Samples) -> dict[str, Tensor]:
        """Raises ``MediaError``, see ``check_sound``."""
        check_sound(media, RATE, self.config.max_seconds, "cformer")
        mel = filter_bank(torch.from_numpy(media), self.bank, self.window)
        centred = mel - mel.mean(dim=0)
        mel = centred / (centred.square().mean(dim=0) + 1e-5).sqrt()
        return {"mel": mel, "count": torch.tensor(self.config.num_features(len(media) / RATE))}

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        return int(item["count"])

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            "mels": nn.utils.rnn.pad_sequence([item["mel"] for item in items], batch_first=True),
            "frames": torch.tensor([len(item["mel"]) for item in items]),
            "counts": torch.stack([item["count"] for item in items]),
        }


class AcousticEncoder(nn.Module):
    """Frames of 10 ms ``(N, T, F)`` to frames of 40 ms ``(N, S, C)``: two convolutions of stride 2, blocks as in Whisper."""

    def __init__(self, numbers: AcousticNumbers) -> None:
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

        super().__init__()
        width = numbers.hidden_size
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, width, 3, stride=2, padding=1) for before in (numbers.num_mel_bins, width)
        )
        like_whisper = WhisperConfig(
            d_model=width,
            encoder_attention_heads=numbers.num_attention_heads,
            encoder_ffn_dim=numbers.intermediate_size,
            attn_implementation="sdpa",
        )
        self.layers = nn.ModuleList(WhisperEncoderLayer(like_whisper) for _ in range(numbers.num_hidden_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, mels: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Features and mask ``(N, S)``; ``frames (N,)`` are the real ones of ``mels``."""
        x = mels
        for convolution in self.convolutions:
            frames = (frames + 1) // 2
            x = F.gelu(convolution(x.transpose(1, 2))).transpose(1, 2)
            mask = torch.arange(x.shape[1], device=x.device)[None] < frames[:, None]
            x = x.masked_fill(~mask[..., None], 0)  # what is behind the end, as for a sound that is alone
        x = x + sinusoids(x.shape[1], x.shape[2], x)
        hidden = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)[:, None, None]
        for layer in self.layers:
            x = layer(x, hidden)
        return self.norm(x).masked_fill(~mask[..., None], 0), mask


def sinusoids(length: int, width: int, like: Tensor) -> Tensor:
    """Positions ``(length, width)``: sines, then cosines, of wavelengths from 2 pi to 10000 * 2 pi (arXiv 1706.03762)."""
    rates = 1e4 ** -torch.linspace(0, 1, width // 2, device=like.device)
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


def integrate_and_fire(features: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """``counts (N,)`` fired features of ``features (N, S, C)`` with ``weights (N, S)`` >= 0: ``(N, max(counts), C)`` float32.

    Continuous integrate-and-fire (arXiv 1905.11235, section 3.1) with the weights of every item scaled to the sum that its
    count is (section 3.4). On the line of summed weights, frame s covers the stretch from the sum before it to the sum
    with it, and what fires as number i is the stretch from i to i + 1: the overlap of both is the share of frame s in feature
    i. So a frame whose weight reaches over a threshold is divided between two features, or more, as in the paper's loop.
    The features behind an item's count are zero. Computed in float32.
    """
    ends = weights.float().cumsum(dim=1)
    ends = ends / ends[:, -1:] * counts[:, None]  # the last is the count, exactly
    starts = F.pad(ends[:, :-1], (1, 0))
    fired = torch.arange(int(counts.max()), device=weights.device)[None, :, None]
    shares = torch.minimum(ends[:, None], fired + 1.0) - torch.maximum(starts[:, None], fired.float())
    return shares.clamp(min=0) @ features.float()


class CFormerEncoder(Encoder):
    """Frames, their weights, what fires, and BERT."""

    def __init__(self, acoustic: AcousticNumbers, behind: BertNumbers) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        width = acoustic.hidden_size
        self.acoustic = AcousticEncoder(acoustic)
        self.weigh_neighbours, self.weigh = nn.Conv1d(width, width, 3, padding=1), nn.Linear(width, 1)
        self.to_bert = nn.Linear(width, behind.hidden_size)
        numbers = BertConfig(
            **behind.model_dump(), vocab_size=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.bert: Any = BertModel(numbers, add_pooling_layer=False)
        self.bert.embeddings.word_embeddings = nn.Identity()  # what fired stands in their place
        self.output_dim = behind.hidden_size

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``batch`` from ``CFormerPreprocessor.collate``; features (N, S, D), zero on the padding, and their mask."""
        counts = batch["counts"]
        frames, seen = self.acoustic(batch["mels"].to(self.to_bert.weight.dtype), batch["frames"])
        # Contiguous: with transposed rows the last bits of the next product depend on where they lie in memory.
        near = self.weigh_neighbours(frames.transpose(1, 2)).transpose(1, 2).contiguous()
        weights = self.weigh(near).squeeze(2).float().sigmoid().masked_fill(~seen, 0)
        fired = integrate_and_fire(frames, weights, counts).to(frames.dtype)
        mask = torch.arange(fired.shape[1], device=counts.device)[None] < counts[:, None]
        read = self.bert(inputs_embeds=F.relu(self.to_bert(fired)), attention_mask=mask.long()).last_hidden_state
        features: Tensor = read.masked_fill(~mask[..., None], 0)
        return features, mask


def make_encoder(config: CFormerConfig, context: BuildContext) -> CFormerEncoder:
    """See ``CFormerConfig.build``."""
    encoder = CFormerEncoder(config.acoustic, config.transformer)
    if config.bert is not None and context.weights:
        reference = context.resolve(config.bert)
        _check_numbers(config, reference)
        tensors = read_tensors(weight_files(reference, config.revision, ["model.safetensors"]), [""])
        load_into(encoder.bert, {_own_name(name): value for name, value in tensors.items()}, reference)
    return encoder.to(context.dtype).train(False)


def _check_numbers(config: CFormerConfig, reference: str) -> None:
    path = find(reference, config.revision, ["config.json"])
    content = read_json(path) if path is not None else {}
    if content.get("model_type") != "bert":
        raise CheckpointError(
            f"found model_type {content.get('model_type')!r} in {reference}, expected a transformers BERT"
        )
    declared = config.transformer.model_dump()
    wrong = [
        f"{key} {content.get(key)}, the YAML makes it {here}"
        for key, here in declared.items()
        if content.get(key) != here
    ]
    if wrong:
        raise CheckpointError(f"{reference} has {'; '.join(wrong)}; set `transformer` to the checkpoint's numbers")


def _own_name(name: str) -> str:
    """The name in ``BertModel``: a model with a head has its own in front, and old files have TensorFlow's for norms."""
    own = name.removeprefix("bert.")
    return own.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
