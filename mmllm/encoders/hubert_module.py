"""HuBERT, wav2vec 2.0 and WavLM (transformers' own modules underneath), and the samples that they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.encoders.base import Encoder
from mmllm.encoders.hubert import KNOWN, HubertArchitecture, HubertConfig
from mmllm.encoders.numbers import agreed_numbers, extractor_settings
from mmllm.encoders.sounds import Samples, check_sound
from mmllm.errors import CheckpointError, ConfigError
from mmllm.pretrained import find, load_into, read_json, read_tensors, weight_files

RATE = 16_000  # Hz
SAMPLES_PER_CALL = 8 * 30 * RATE  # bounds the memory of the convolutions, whose first has 512 channels at 3.2 kHz
# No noise in training, and so no parameter (`masked_spec_embed`) that only the noise would use.
PLAIN = {
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
}


class HubertPreprocessor:
    """Mono float32 samples at 16 kHz, normalised where the checkpoint wants that; deterministic, picklable, no weights.

    An item is ``wave`` (T,) float32. Collated: ``waves`` (N, T), zeros behind the shorter ones; ``length`` (N,) int64, their
    samples; ``mask`` (N, S) bool, their features.
    """

    media = "audio"

    def __init__(self, numbers: HubertArchitecture, max_seconds: float) -> None:
        self.decode_options: dict[str, Any] = {"sample_rate": RATE}
        self.numbers, self.max_seconds = numbers, max_seconds

    def __call__(self, media: Samples) -> dict[str, Tensor]:
        """Raises ``MediaError``, see ``check_sound``."""
        check_sound(media, RATE, self.max_seconds, "hubert")
        if self.numbers.do_normalize:  # as Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm
            media = (media - media.mean()) / np.sqrt(media.var() + 1e-7)
        wave = torch.from_numpy(media.astype(np.float32))
        return {"wave": F.pad(wave, (0, max(self.numbers.receptive_field - len(wave), 0)))}

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        return self.numbers.num_features(len(item["wave"]))

    def grid(self, item: dict[str, Tensor]) -> tuple[int, ...] | None:
        return (self.num_tokens(item),)

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        waves = [item["wave"] for item in items]
        counts = torch.tensor([self.num_tokens(item) for item in items])
        return {
            "waves": nn.utils.rnn.pad_sequence(waves, batch_first=True),
            "length": torch.tensor([len(wave) for wave in waves]),
            "mask": torch.arange(int(counts.max()))[None] < counts[:, None],
        }


class ZeroKeepingBatchNorm(nn.BatchNorm1d):
    """The batch norm of a few checkpoints before their convolution over positions ``(N, D, S)``.

    The padding, all zeros here, stays zero, as what is beyond the end of a sound that is alone.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).masked_fill((input == 0).all(dim=1, keepdim=True), 0)


class HubertEncoder(Encoder):
    """transformers' model without the blocks after the selected one."""

    def __init__(self, numbers: HubertArchitecture, select_layer: int) -> None:
        from transformers import AutoConfig, AutoModel

        super().__init__()
        blocks = numbers.num_hidden_layers + 1 + select_layer
        if blocks < 1:
            expected = f"-{numbers.num_hidden_layers} to -1"
            raise ConfigError([("select_layer", f"found {select_layer}, expected {expected}")], "hubert encoder")
        given = numbers.model_dump(exclude={"model_type", "do_normalize"}) | {"num_hidden_layers": blocks}
        self.model: Any = AutoModel.from_config(AutoConfig.for_model(numbers.model_type, **given, **PLAIN))
        if numbers.do_stable_layer_norm and select_layer < -1:
            self.model.encoder.layer_norm = nn.Identity()
        if numbers.conv_pos_batch_norm:
            self.model.encoder.pos_conv_embed.batch_norm = ZeroKeepingBatchNorm(numbers.hidden_size)
        self.normed_over_time = numbers.feat_extract_norm == "group"
        self.output_dim, self.total = numbers.hidden_size, numbers.num_hidden_layers

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``batch`` from ``HubertPreprocessor.collate``; features (N, S, D), zero on the padding, and their mask."""
        waves, mask = batch["waves"].to(self.model.feature_projection.projection.weight.dtype), batch["mask"]
        size = max(SAMPLES_PER_CALL // waves.shape[1], 1)
        parts = zip(torch.split(waves, size), torch.split(batch["length"], size), strict=True)
        found = self.model.feature_projection(torch.cat([self._convolve(*part) for part in parts]))
        projected = found if isinstance(found, Tensor) else found[0]  # the others also give what they quantise
        features: Tensor = self.model.encoder(projected, attention_mask=mask).last_hidden_state
        return features.masked_fill(~mask[..., None], 0), mask

    def _convolve(self, waves: Tensor, length: Tensor) -> Tensor:
        """Waves ``(N, T)`` to ``(N, S, C)``. What follows a sound's real features is of no meaning, and they are free of it."""
        first, *rest = self.model.feature_extractor.conv_layers
        x: Tensor = waves[:, None]
        if self.normed_over_time:
            kernel, stride = first.conv.kernel_size[0], first.conv.stride[0]
            x = norm_over_time(first.conv(x), (length - kernel) // stride + 1, first.layer_norm)
            x = first.activation(x)
        else:
            x = first(x)
        for layer in rest:
            x = layer(x)
        return x.transpose(1, 2)

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy the model's tensors under transformers' names. Raises ``CheckpointError`` where they do not fit."""
        found = {name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}
        if len(found) != self.total:
            raise CheckpointError(
                f"{source} has {len(found)} encoder blocks, expected {self.total}; correct the numbers"
            )
        load_into(self.model, tensors, source)


def norm_over_time(x: Tensor, counts: Tensor, norm: nn.GroupNorm) -> Tensor:
    """``norm`` of every channel of ``x (N, C, T)`` over the first ``counts (N,)`` steps; zero mean, unit variance there.

    transformers lets the padding into mean and variance, so that a sound's features depend on what it is batched with.
    """
    steps = torch.arange(x.shape[-1], device=x.device)
    padding, count = steps >= counts[:, None, None], counts[:, None, None]
    wide = x.float().masked_fill(padding, 0)
    centred = (wide - wide.sum(-1, keepdim=True) / count).masked_fill(padding, 0)
    variance = centred.square().sum(-1, keepdim=True) / count
    scaled: Tensor = centred * (variance + norm.eps).rsqrt() * norm.weight[:, None] + norm.bias[:, None]
    return scaled.to(x.dtype)


def make_preprocessor(config: HubertConfig, context: BuildContext) -> HubertPreprocessor:
    """See ``HubertConfig.preprocessor``."""
    return HubertPreprocessor(read_numbers(config, context), config.max_seconds)


def make_encoder(config: HubertConfig, context: BuildContext) -> HubertEncoder:
    """See ``HubertConfig.build``."""
    encoder = HubertEncoder(read_numbers(config, context), config.select_layer)
    if config.pretrained is not None and context.weights:
        reference = context.resolve(config.pretrained)
        tensors = read_tensors(weight_files(reference, config.revision, ["model.safetensors"]), [""])
        last = "feature_projection.projection.weight"  # a model with a head has its own name in front
        prefix = next((name.removesuffix(last) for name in tensors if name.endswith(last)), "")
        encoder.load({_own_name(n.removeprefix(prefix)): v for n, v in tensors.items()}, reference)
    return encoder.to(context.dtype).train(False)


def _own_name(name: str) -> str:
    """The name of a tensor today; torch stored the two halves of a normalised weight under others once."""
    weight = "conv.parametrizations.weight.original"
    return name.replace("conv.weight_g", f"{weight}0").replace("conv.weight_v", f"{weight}1")


def read_numbers(config: HubertConfig, context: BuildContext) -> HubertArchitecture:
    """The architecture, from the YAML or the checkpoint; see ``agreed_numbers``."""
    return agreed_numbers(
        "hubert",
        config.pretrained,
        context,
        declared=config.architecture,
        known=KNOWN.get(config.pretrained or ""),
        read=lambda reference: _read_checkpoint(reference, config),
    )


def _read_checkpoint(reference: str, config: HubertConfig) -> HubertArchitecture:
    path = find(reference, config.revision, ["config.json"])
    content = read_json(path) if path is not None else {}
    for key in ("add_adapter", "adapter_attn_dim"):
        if content.get(key):
            raise CheckpointError(f"{path} has {key} {content[key]}; checkpoints with trained adapters are not read")
    sound = extractor_settings(reference, config.revision)
    if sound.get("sampling_rate", RATE) != RATE:
        raise CheckpointError(f"{reference} has sampling_rate {sound['sampling_rate']}, expected {RATE}")
    fields = {name: value for name, value in content.items() if name in HubertArchitecture.model_fields}
    declared = {} if config.architecture is None else {"do_normalize": config.architecture.do_normalize}
    normalize = {name: sound[name] for name in ("do_normalize",) if name in sound}
    try:
        return HubertArchitecture.model_validate({"model_type": None} | fields | declared | normalize)
    except ValueError as error:
        raise CheckpointError(
            f"found model_type {content.get('model_type')!r} in {reference}, expected a transformers checkpoint of hubert, "
            f"wav2vec2 or wavlm: {error}"
        ) from error
