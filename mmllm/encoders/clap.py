"""The ``clap`` encoder: LAION's CLAP audio tower, a Swin transformer over log-mel windows (arXiv 2211.06687)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from mmllm.config.base import BuildContext, Config
from mmllm.config.families import EncoderConfig

if TYPE_CHECKING:
    from mmllm.encoders.clap_module import ClapEncoder
    from mmllm.encoders.clap_preprocess import ClapPreprocessor

Positives = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class ClapArchitecture(Config):
    """Numbers of transformers' ``ClapAudioConfig`` and ``ClapFeatureExtractor`` under their names.

    The defaults are transformers'. ``truncation`` is what the checkpoint's own extractor does with long
    sounds; it also says which mel filters the checkpoint was trained with: HTK's for ``fusion``, Slaney's for ``rand_trunc``.
    """

    # the tower
    spec_size: PositiveInt = 256
    patch_size: PositiveInt = 4
    patch_stride: PositiveInt = 4
    patch_embeds_hidden_size: PositiveInt = 96
    depths: Positives = (2, 2, 6, 2)
    num_attention_heads: Positives = (4, 8, 16, 32)
    window_size: PositiveInt = 8
    mlp_ratio: PositiveFloat = 4.0
    qkv_bias: bool = True
    enable_patch_layer_norm: bool = True
    enable_fusion: bool = False
    aff_block_r: PositiveInt = 4
    layer_norm_eps: PositiveFloat = 1e-5
    projection_dim: PositiveInt = 512
    # the sound
    num_mel_bins: PositiveInt = 64
    sampling_rate: PositiveInt = 48_000
    hop_length: PositiveInt = 480
    fft_window_size: PositiveInt = 1024
    max_length_s: PositiveInt = 10
    frequency_min: NonNegativeFloat = 0
    frequency_max: PositiveFloat = 14_000
    padding: Literal["repeatpad", "repeat", "pad"] = "repeatpad"
    truncation: Literal["fusion", "rand_trunc"] = "fusion"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.depths) != len(self.num_attention_heads):
            entries = f"{len(self.depths)} and {len(self.num_attention_heads)}"
            raise ValueError(f"depths and num_attention_heads have {entries} entries, expected the same number")
        if self.spec_size % self.num_mel_bins:
            raise ValueError(f"num_mel_bins {self.num_mel_bins} do not divide spec_size {self.spec_size}")
        if self.frames > self.spec_size * self.ratio:
            most = self.spec_size * self.ratio
            raise ValueError(
                f"{self.max_length_s} seconds are {self.frames} frames, but the tower reads at most {most}"
            )
        if self.grid % self.ratio:
            raise ValueError(
                f"the last stage has {self.grid} rows, not a multiple of spec_size / num_mel_bins {self.ratio}"
            )
        if self.grid < self.window_size:
            raise ValueError(f"the last stage has {self.grid} rows, fewer than window_size {self.window_size}")
        return self

    @property
    def window(self) -> int:
        """Samples that the tower reads at once."""
        return self.max_length_s * self.sampling_rate

    @property
    def frames(self) -> int:
        """Spectra of one window."""
        return self.window // self.hop_length + 1

    @property
    def ratio(self) -> int:
        """Pieces of time that are put below each other to make the spectrogram a square."""
        return self.spec_size // self.num_mel_bins

    @property
    def grid(self) -> int:
        """Rows and columns of the last stage."""
        return int(self.spec_size // self.patch_stride // 2 ** (len(self.depths) - 1))

    @property
    def width(self) -> int:
        """Of the last stage."""
        return int(self.patch_embeds_hidden_size * 2 ** (len(self.depths) - 1))


# Fields of the extractor, not of the tower.
SOUND = {"sampling_rate", "hop_length", "fft_window_size", "max_length_s"}
SOUND |= {"frequency_min", "frequency_max", "padding", "truncation"}
_UNFUSED = ClapArchitecture(frequency_min=50, truncation="rand_trunc")
_LARGER = _UNFUSED.model_copy(update={"patch_embeds_hidden_size": 128, "depths": (2, 2, 12, 2)})

# The `config.json` and `preprocessor_config.json` of these hub ids, so that a plan needs no file.
KNOWN = {
    "laion/clap-htsat-unfused": _UNFUSED,
    "laion/clap-htsat-fused": _UNFUSED.model_copy(update={"enable_fusion": True, "truncation": "fusion"}),
    "laion/larger_clap_general": _LARGER,
    "laion/larger_clap_music": _LARGER,
    "laion/larger_clap_music_and_speech": _LARGER,
}


class ClapConfig(EncoderConfig):
    """CLAP's audio tower on windows of 10 s at 48 kHz.

    A sound shorter than a window is repeated to fill it, as the checkpoint's own extractor does (``padding``), so every
    window is full and none of its features stands for padding.

    - ``pretrained``: a folder written by ``save_pretrained`` of transformers' ``ClapModel``, ``ClapAudioModel`` or
      ``ClapAudioModelWithProjection``, or a hub id of one.
    - ``architecture``: the numbers, so that a plan needs no file; random weights without ``pretrained``. The ids in
      ``KNOWN`` need none.
    - ``output``: ``sequence``, the tower's last features, 64 of a window: step after step of 32, at each the low and the
      high frequencies; ``pooled``, their mean, one of a window; ``embedding``, that mean in the space that CLAP shares with
      text, of unit length.
    - ``long``: what becomes of a sound that is longer than a window. ``windows``: as many as cover it, spread evenly from its
      start to its end, their features one after the other; fusion then has no part in it. ``fusion``, for checkpoints with
      ``enable_fusion``: one window, the whole spectrogram shrunk, to which three stretches of it add their detail.
      ``crop``: the middle. The checkpoints' own extractor draws the stretches and the crop at random, and takes a random
      sound of a batch without a long one for long; here the stretches are those in the middle of each third of the
      possible places, and nothing is random.
    - ``max_seconds``: longer sounds are refused. A minute costs 6 windows.
    """

    suggested: ClassVar[Mapping[str, Any]] = {"audio": {"pretrained": "laion/clap-htsat-unfused"}}
    kind: Literal["clap"] = "clap"
    architecture: ClapArchitecture | None = None
    pretrained: str | None = None
    revision: str | None = None
    output: Literal["sequence", "pooled", "embedding"] = "sequence"
    long: Literal["windows", "fusion", "crop"] = "windows"
    max_seconds: PositiveFloat = 600.0

    @model_validator(mode="after")
    def _some_architecture(self) -> Self:
        if self.architecture is None and self.pretrained is None:
            raise ValueError("found no architecture; give `pretrained`, or `architecture` for random weights")
        return self

    def tiny(self) -> ClapConfig:
        """Two stages of widths 8 and 16 over windows of one second, 101 spectra; fusion where it is asked for."""
        whole = self.architecture or KNOWN.get(self.pretrained or "", _UNFUSED)
        numbers = {
            "spec_size": 32,
            "num_mel_bins": 8,
            "patch_embeds_hidden_size": 8,
            "depths": (2, 2),
            "num_attention_heads": (2, 2),
            "window_size": 2,
            "projection_dim": 12,
            "max_length_s": 1,
            "hop_length": max(whole.sampling_rate // 100, 1),
        }
        if self.long == "fusion":  # a checkpoint that is not at hand may have it
            numbers |= {"enable_fusion": True, "truncation": "fusion"}
        return self.model_copy(
            update={"architecture": whole.model_copy(update=numbers), "pretrained": None, "revision": None}
        )

    def preprocessor(self, context: BuildContext) -> ClapPreprocessor:
        """Sounds to log-mel windows. Raises ``ConfigError`` for ``long: fusion`` without ``enable_fusion``."""
        from mmllm.encoders.clap_preprocess import make_preprocessor

        return make_preprocessor(self, context)

    def build(self, context: BuildContext) -> ClapEncoder:
        """The tower, with ``embedding`` its projection. Raises ``ConfigError`` or ``CheckpointError``."""
        from mmllm.encoders.clap_module import make_encoder

        return make_encoder(self, context)
