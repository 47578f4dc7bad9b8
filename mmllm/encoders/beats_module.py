"""BEATs, written so that the published checkpoints' tensors fit (microsoft/unilm, `beats/`; code and weights MIT).

Patches of a log-mel spectrogram, a grouped convolution over them for their places, then post-norm blocks whose residuals are
scaled up (DeepNorm, arXiv 2203.00555) and whose attention has a relative position bias, gated by the query (WavLM's). So are
all published checkpoints; the options of the reference that none of them uses do not exist here.

The names of tensors are the published ones but for three things: the two halves of the convolution's normalised weight, see
``published_name``; the table of the position bias, which all blocks share and a published file repeats in each; and the
classifier of fine-tuned checkpoints (``predictor``), which is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from mmllm.config.base import BuildContext
from mmllm.encoders.base import Encoder
from mmllm.encoders.beats import BeatsArchitecture, BeatsConfig
from mmllm.encoders.sounds import HOP, RATE, WINDOW, Samples, check_sound, filter_bank, mel_bank, povey
from mmllm.errors import CheckpointError, ConfigError
from mmllm.pretrained import load_into, read_tensors, tensor_names, weight_files

MEAN, STD = 15.41663, 6.55582  # of AudioSet's log-mel energies, from the reference; twice the deviation is divided by
SCALE = 2**15  # the reference's samples are those of 16-bit files
GATES = 8  # outputs of the gates' linear layer: four are summed for each of two gates


class BeatsPreprocessor:
    """Mono float32 samples at 16 kHz to normalised log-mel spectra; deterministic, picklable, no weights.

    An item is ``mel`` (T, F) float32, whole patches long. Collated: ``mels`` (N, T, F), zeros behind the shorter ones, and
    ``mask`` (N, S) bool of their features.
    """

    media = "audio"

    def __init__(self, numbers: BeatsArchitecture, max_seconds: float) -> None:
        self.decode_options: dict[str, Any] = {"sample_rate": RATE}
        self.numbers, self.max_seconds = numbers, max_seconds
        self.shortest = WINDOW + (numbers.input_patch_size - 1) * HOP  # samples of one step
        self.bank, self.window = torch.from_numpy(mel_bank(numbers.num_mel_bins)), povey()

    def __call__(self, media: Samples) -> dict[str, Tensor]:
        """Raises ``MediaError``, see ``check_sound``."""
        check_sound(media, RATE, self.max_seconds, "beats")
        wave = torch.from_numpy(media) * SCALE
        wave = F.pad(wave, (0, max(self.shortest - len(wave), 0)))
        mel = (filter_bank(wave, self.bank, self.window) - MEAN) / (2 * STD)
        size = self.numbers.input_patch_size
        return {"mel": mel[: len(mel) // size * size]}

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        return len(item["mel"]) // self.numbers.input_patch_size * self.numbers.rows

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        counts = torch.tensor([self.num_tokens(item) for item in items])
        return {
            "mels": nn.utils.rnn.pad_sequence([item["mel"] for item in items], batch_first=True),
            "mask": torch.arange(int(counts.max()))[None] < counts[:, None],
        }


class Attention(nn.Module):
    """Attention with a position bias that the query lets through more or less."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // heads, GATES)
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        """``x (N, L, D)``, ``mask (N, L)`` bool, ``bias (H, L, L)``."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, H, L, D/H)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        first, second = self.grep_linear(q).unflatten(-1, (2, -1)).sum(-1).sigmoid().unbind(-1)  # (N, H, L) each
        gate = first[..., None] * (second[..., None] * self.grep_a - 1) + 2  # WavLM, arXiv 2110.13900, equation 4
        scores = (gate * bias).masked_fill(~mask[:, None, None], -math.inf)
        found: Tensor = self.out_proj(
            F.scaled_dot_product_attention(q, k, v, attn_mask=scores).transpose(1, 2).flatten(2)
        )
        return found


class Block(nn.Module):
    """Attention and MLP, a norm behind each: ``norm(alpha x + f(x))``."""

    def __init__(self, numbers: BeatsArchitecture) -> None:
        super().__init__()
        width = numbers.encoder_embed_dim
        self.alpha = (2 * numbers.encoder_layers) ** 0.25  # of all blocks, also when only the first are built
        self.self_attn = Attention(width, numbers.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, numbers.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(numbers.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(self.alpha * x + self.self_attn(x, mask, bias))
        found: Tensor = self.final_layer_norm(self.alpha * x + self.fc2(F.gelu(self.fc1(x))))
        return found


class Transformer(nn.Module):
    """The places of patches and the blocks: ``(N, L, D) -> (N, L, D)``."""

    def __init__(self, numbers: BeatsArchitecture, blocks: int) -> None:
        super().__init__()
        width, kernel = numbers.encoder_embed_dim, numbers.conv_pos
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=numbers.conv_pos_groups)
        self.pos_conv = nn.ModuleList([weight_norm(conv, dim=2)])
        self.layer_norm = nn.LayerNorm(width)
        self.relative_attention_bias = nn.Embedding(numbers.num_buckets, numbers.encoder_attention_heads)
        self.layers = nn.ModuleList(Block(numbers) for _ in range(blocks))
        self.max_distance = numbers.max_distance

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x.masked_fill(~mask[..., None], 0)
        length = x.shape[1]
        places = self.pos_conv[0](x.transpose(1, 2))[..., :length]  # an even kernel gives one too many
        x = self.layer_norm(x + F.gelu(places).transpose(1, 2))
        steps = torch.arange(length, device=x.device)
        table = self.relative_attention_bias
        buckets = relative_buckets(steps[None] - steps[:, None], table.num_embeddings, self.max_distance)
        bias = table(buckets).permute(2, 0, 1)
        for layer in self.layers:
            x = layer(x, mask, bias)
        return x


def relative_buckets(distance: Tensor, buckets: int, furthest: int) -> Tensor:
    """Distances of keys from queries, int64, to T5's buckets (arXiv 1910.10683): half of them for keys behind the query.

    Of each half the first half holds one distance each, the rest grow logarithmically up to ``furthest`` and hold all beyond.
    """
    half, exact = buckets // 2, buckets // 4
    size = distance.abs()
    grown = (size.clamp(min=1).float() / exact).log() / math.log(furthest / exact) * (half - exact)
    far = (exact + grown.long()).clamp(max=half - 1)
    return (distance > 0) * half + torch.where(size < exact, size, far)


class BeatsEncoder(Encoder):
    """Patches and the blocks up to the selected one."""

    def __init__(self, numbers: BeatsArchitecture, select_layer: int) -> None:
        super().__init__()
        blocks = numbers.encoder_layers + 1 + select_layer
        if blocks < 1:
            expected = f"-{numbers.encoder_layers} to -1"
            raise ConfigError([("select_layer", f"found {select_layer}, expected {expected}")], "beats encoder")
        size, width, self.output_dim = numbers.input_patch_size, numbers.embed_dim, numbers.encoder_embed_dim
        self.patch_embedding = nn.Conv2d(1, width, size, size, bias=False)
        self.layer_norm = nn.LayerNorm(width)
        self.post_extract_proj = nn.Linear(width, self.output_dim) if width != self.output_dim else nn.Identity()
        self.encoder = Transformer(numbers, blocks)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``batch`` from ``BeatsPreprocessor.collate``; features (N, S, D), zero on the padding, and their mask.

        They go step by step in time, at each from low to high frequencies.
        """
        mels, mask = batch["mels"].to(self.patch_embedding.weight.dtype), batch["mask"]
        patches = self.patch_embedding(mels[:, None]).flatten(2).transpose(1, 2)  # (N, S, embed_dim)
        features: Tensor = self.encoder(self.post_extract_proj(self.layer_norm(patches)), mask)
        return features.masked_fill(~mask[..., None], 0), mask


def published_name(own: str) -> str:
    """The published checkpoints' name of this module's tensor ``own``.

    Of a published file only ``predictor.*`` and the other blocks' copies of ``relative_attention_bias`` have no counterpart.
    """
    start, half = "encoder.pos_conv.0.", "parametrizations.weight.original"
    moved = {
        f"{start}{half}0": f"{start}weight_g",
        f"{start}{half}1": f"{start}weight_v",
        "encoder.relative_attention_bias.weight": "encoder.layers.0.self_attn.relative_attention_bias.weight",
    }
    return moved.get(own, own)


def make_encoder(config: BeatsConfig, context: BuildContext) -> BeatsEncoder:
    """See ``BeatsConfig.build``."""
    encoder = BeatsEncoder(config.architecture, config.select_layer)
    if config.pretrained is not None and context.weights:
        reference = context.resolve(config.pretrained)
        files = weight_files(reference, config.revision, ["model.safetensors"])
        _check_depth(tensor_names(files), config.architecture.encoder_layers, reference)
        names = {own: published_name(own) for own in encoder.state_dict()}
        tensors = read_tensors(files, sorted(names.values()))
        load_into(encoder, {own: tensors[name] for own, name in names.items() if name in tensors}, reference)
    return encoder.to(context.dtype).train(False)


def _check_depth(names: Sequence[str], expected: int, source: str) -> None:
    start = "encoder.layers."
    found = len({name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)})
    if "patch_embedding.weight" not in names or not found:
        raise CheckpointError(
            f"{source} is no BEATs checkpoint; expected tensors named as under `model` of a published BEATs_iter….pt, "
            "such as patch_embedding.weight and encoder.layers.0.fc1.weight"
        )
    if found != expected:
        raise CheckpointError(f"{source} has {found} blocks, expected {expected}; give `architecture`")
