"""The ``hubert`` encoder: sounds as HuBERT (arXiv 2106.07447), wav2vec 2.0 (2006.11477) or WavLM (2110.13900) hear them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mmllm.config.base import BuildContext, Config
from mmllm.config.families import EncoderConfig

if TYPE_CHECKING:
    from mmllm.encoders.hubert_module import HubertEncoder, HubertPreprocessor

ModelType = Literal["hubert", "wav2vec2", "wavlm"]
Activation = Literal["gelu", "gelu_new", "relu", "selu", "silu"]


class HubertArchitecture(Config):
    """The encoder's numbers under transformers' names; the defaults are those of HuBERT, wav2vec 2.0 and WavLM base.

    ``do_normalize`` belongs to the preprocessor: every sound to mean 0 and variance 1. ``feat_proj_layer_norm`` and
    ``conv_pos_batch_norm`` exist in ``hubert`` alone, ``num_buckets`` and ``max_bucket_distance`` in ``wavlm`` alone.
    """

    model_type: ModelType = "hubert"
    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt = 3072
    hidden_act: Activation = "gelu"
    layer_norm_eps: PositiveFloat = 1e-5
    do_stable_layer_norm: bool = False
    conv_dim: tuple[PositiveInt, ...] = (512,) * 7
    conv_kernel: tuple[PositiveInt, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[PositiveInt, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    feat_extract_norm: Literal["group", "layer"] = "group"
    feat_extract_activation: Activation = "gelu"
    feat_proj_layer_norm: bool = True
    num_conv_pos_embeddings: PositiveInt = 128
    num_conv_pos_embedding_groups: PositiveInt = 16
    conv_pos_batch_norm: bool = False
    num_buckets: PositiveInt = 320
    max_bucket_distance: PositiveInt = 800
    do_normalize: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}")
        if self.hidden_size % self.num_conv_pos_embedding_groups:
            groups = self.num_conv_pos_embedding_groups
            raise ValueError(f"{groups} num_conv_pos_embedding_groups do not divide hidden_size {self.hidden_size}")
        lengths = (len(self.conv_dim), len(self.conv_kernel), len(self.conv_stride))
        if len(set(lengths)) > 1 or not self.conv_dim:
            names = "conv_dim, conv_kernel and conv_stride"
            raise ValueError(f"{names} have {lengths} entries, expected the same number, at least one")
        if self.model_type != "hubert" and (self.conv_pos_batch_norm or not self.feat_proj_layer_norm):
            raise ValueError(
                f"{self.model_type} has neither conv_pos_batch_norm nor feat_proj_layer_norm; leave them out"
            )
        return self

    @property
    def receptive_field(self) -> int:
        """Samples that the first feature is made of: the shortest sound that the convolutions read."""
        samples = 1
        for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    def num_features(self, samples: int) -> int:
        """Features of a sound of ``samples``, at least ``receptive_field`` of them."""
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples


_BASE = HubertArchitecture()
_LARGE = HubertArchitecture(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    do_stable_layer_norm=True,
    conv_bias=True,
    feat_extract_norm="layer",
)
_XLARGE = _LARGE.model_copy(update={"hidden_size": 1280, "num_hidden_layers": 48, "intermediate_size": 5120})
_WAVLM = {"model_type": "wavlm", "conv_bias": False}

# The `config.json` of these hub ids, so that a plan needs no file.
KNOWN = {
    "facebook/hubert-base-ls960": _BASE,
    "facebook/hubert-large-ll60k": _LARGE,
    "facebook/hubert-large-ls960-ft": _LARGE,
    "facebook/hubert-xlarge-ll60k": _XLARGE,
    "facebook/hubert-xlarge-ls960-ft": _XLARGE,
    "facebook/wav2vec2-base": _BASE.model_copy(update={"model_type": "wav2vec2"}),
    "facebook/wav2vec2-base-960h": _BASE.model_copy(update={"model_type": "wav2vec2"}),
    "facebook/wav2vec2-large-lv60": _LARGE.model_copy(update={"model_type": "wav2vec2"}),
    "facebook/wav2vec2-large-960h-lv60-self": _LARGE.model_copy(update={"model_type": "wav2vec2"}),
    "microsoft/wavlm-base": _BASE.model_copy(update=_WAVLM),
    "microsoft/wavlm-base-plus": _BASE.model_copy(update=_WAVLM),
    "microsoft/wavlm-large": _LARGE.model_copy(update=_WAVLM),
}


class HubertConfig(EncoderConfig):
    """A HuBERT, wav2vec 2.0 or WavLM encoder on the waveform at 16 kHz, read at one of its layers.

    A feature stands for 20 ms: 49 for one second, 1499 for 30 (the first needs 400 samples; a shorter sound is filled up
    with silence). A sound is read whole and attends over all of itself, so ``max_seconds`` bounds memory. Its features are
    those of the sound alone, whatever it is batched with; in transformers that holds only for checkpoints with
    ``feat_extract_norm: layer``, since the others normalise over the padding too.

    - ``pretrained``: a folder written by ``save_pretrained`` of transformers' ``HubertModel``, ``Wav2Vec2Model``,
      ``WavLMModel`` or one of their models with a head, or a hub id of one. Checkpoints with trained adapter layers
      (``add_adapter``, ``adapter_attn_dim``) are refused.
    - ``architecture``: the numbers, so that a plan needs no file; random weights without ``pretrained``. The ids in
      ``KNOWN`` need none.
    - ``select_layer``: -1 the model's output, -2 the output of the block before the last, and so on; later blocks, and the
      norm after the last block where there is one, are then not part of the module.

    Trained, it runs without the dropout, layer drop and masking that its own pretraining used.
    """

    suggested: ClassVar[Mapping[str, Any]] = {"audio": {"pretrained": "facebook/hubert-large-ll60k"}}
    kind: Literal["hubert"] = "hubert"
    architecture: HubertArchitecture | None = None
    pretrained: str | None = None
    revision: str | None = None
    select_layer: Annotated[int, Field(le=-1)] = -1
    max_seconds: PositiveFloat = 60.0

    @model_validator(mode="after")
    def _some_architecture(self) -> Self:
        if self.architecture is None and self.pretrained is None:
            raise ValueError("found no architecture; give `pretrained`, or `architecture` for random weights")
        return self

    def tiny(self) -> HubertConfig:
        """Three blocks of width 32; model type, norms and convolutions' strides stay where they are known."""
        whole = self.architecture or KNOWN.get(self.pretrained or "", _BASE)
        numbers = {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "conv_dim": (16,) * len(whole.conv_dim),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        }
        return HubertConfig(
            architecture=whole.model_copy(update=numbers),
            select_layer=max(self.select_layer, -3),
            max_seconds=self.max_seconds,
        )

    def preprocessor(self, context: BuildContext) -> HubertPreprocessor:
        """Sounds to normalised samples."""
        from mmllm.encoders.hubert_module import make_preprocessor

        return make_preprocessor(self, context)

    def build(self, context: BuildContext) -> HubertEncoder:
        """The encoder up to ``select_layer``. Raises ``ConfigError`` or ``CheckpointError``."""
        from mmllm.encoders.hubert_module import make_encoder

        return make_encoder(self, context)
