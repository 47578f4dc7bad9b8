"""The component families and what each kind must offer. Configs know sizes and arithmetic; modules hold the weights.

Splitting the two keeps `mmllm plan`, config errors and data workers free of torch modules and of weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from pydantic import BeforeValidator, Field, SerializeAsAny

from mmllm.config.base import BuildContext, ComponentConfig, Config, _dispatch
from mmllm.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from mmllm.adapters.base import Adapter
    from mmllm.backbones.base import Backbone
    from mmllm.encoders.base import Encoder
    from mmllm.fusion.base import Fusion
    from mmllm.generators.base import CodeGenerator, MediaGenerator
    from mmllm.projectors.base import Projector
    from mmllm.projectors.output_module import OutputProjector

FrameCount = Annotated[int, Field(gt=0, le=108_000)]
"""Frames taken of a clip: no more than a clip may have (``mmllm.processing.sources.Limits``)."""
Shape = tuple[int, int]  # (L, D) of one stream of a generator's condition; a single vector has L = 1


@dataclass(frozen=True)
class TokenGroup:
    """The new tokens by which the backbone writes one medium of an output: one of each of ``places``, in turn.

    A place is a range of the output's own tokens, numbered from 0; the first place has one. Where there are several the
    backbone chooses, and what it chooses are codes.
    """

    places: tuple[range, ...]

    @property
    def rows(self) -> int:
        """How many tokens the output needs."""
        return max(place.stop for place in self.places)

    @property
    def free(self) -> list[int]:
        """The places at which the backbone chooses."""
        return [index for index, place in enumerate(self.places) if len(place) > 1]


@dataclass(frozen=True)
class Codes:
    """The codes of one medium: at each of ``length`` positions one of ``size`` of every one of ``codebooks``."""

    length: int
    size: int
    codebooks: int = 1

    def group(self) -> TokenGroup:
        """A token that begins, the codes position by position (a codebook's are the same tokens at each), one that ends."""
        books = [range(1 + book * self.size, 1 + (book + 1) * self.size) for book in range(self.codebooks)]
        end = 1 + self.codebooks * self.size
        return TokenGroup((range(1), *books * self.length, range(end, end + 1)))


class Preprocessor(Protocol):
    """The worker-side half of an encoder: deterministic, picklable, without weights.

    ``media`` names the decoder of the raw bytes (``image`` gives an RGB ``PIL.Image``, ``audio`` a mono float32 array,
    ``video`` a list of RGB pictures, ``point_cloud`` a float32 array of x, y, z, red, green, blue); ``decode_options`` are
    that decoder's keyword arguments (audio: ``sample_rate`` in Hz; video: ``frames``, and ``clips``, ``seconds`` and
    ``spread``, see ``mmllm.processing.video.decode_video``; point cloud: ``points``).
    """

    media: str
    decode_options: dict[str, Any]

    def __call__(self, media: Any) -> dict[str, torch.Tensor]:
        """Tensors of one media item, without a batch axis."""
        ...

    def num_tokens(self, item: dict[str, torch.Tensor]) -> int:
        """How many feature vectors the encoder returns for this item; known before any forward."""
        ...

    def collate(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """One padded batch for ``Encoder.forward``; N = ``len(items)``."""
        ...


@runtime_checkable
class Gridded(Protocol):
    """A preprocessor that knows where the features of an item lie, so that they can be interpolated to another grid."""

    def grid(self, item: dict[str, torch.Tensor]) -> tuple[int, ...] | None:
        """``(rows, cols)`` of a picture's features, row by row, or ``(steps,)`` of a sound's; None where there is no such
        grid (one pooled feature, a class token among them). Of several pictures one behind the other, tiles or frames of
        one grid, ``(pictures, rows, cols)``.
        """
        ...


@runtime_checkable
class Membered(Protocol):
    """A preprocessor of several encoders whose features may stand one encoder's behind the other's."""

    def members(self, item: dict[str, torch.Tensor]) -> dict[str, int] | None:
        """How many features of an item come from which encoder, in their order; None where they are joined otherwise."""
        ...


class Target(Protocol):
    """The worker-side half of a generator: makes the tensor of a decoded medium that is to be generated. Picklable.

    ``media`` and ``decode_options`` as in ``Preprocessor``; all its tensors have one shape.
    """

    media: str
    decode_options: dict[str, Any]

    def __call__(self, media: Any) -> torch.Tensor: ...


class EncoderConfig(ComponentConfig):
    """A modality encoder."""

    family: ClassVar[str] = "encoder"
    adapter: AnyAdapter | None = None

    def segments(self, context: BuildContext) -> int:
        """Into how many runs of equal length, in order of time, the features of every item fall: the frames of a clip, the
        stretches of a sound. 1 where they do not.
        """
        return 1

    @abstractmethod
    def preprocessor(self, context: BuildContext) -> Preprocessor: ...

    @abstractmethod
    def build(self, context: BuildContext) -> Encoder: ...


class ProjectorConfig(ComponentConfig):
    """An input projector: (N, S, D) features to (N, Q, D_llm)."""

    family: ClassVar[str] = "input_projector"

    @abstractmethod
    def num_outputs(self, length: int) -> int:
        """Q for an item of ``length`` features (length >= 1); Q >= 1."""

    def behind(self, encoder: EncoderConfig, context: BuildContext) -> Self:
        """This projector with what it has to know of the encoder in front of it, beyond its width. Raises ``ConfigError``."""
        return self

    @abstractmethod
    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> Projector: ...


Layout = tuple[int, ...]  # what a `LayoutProjectorConfig` must know of an item's features beside their number


class LayoutProjectorConfig(ProjectorConfig):
    """An input projector that needs to know how the features of an item lie, not only how many there are.

    Its module (``LayoutProjector``) is given the layouts of a batch beside its features.
    """

    @abstractmethod
    def layout(self, preprocessor: Preprocessor, item: dict[str, torch.Tensor]) -> Layout:
        """The layout of an item's features; equally long for all items. Raises ``ConfigError`` where they have none."""

    @abstractmethod
    def num_outputs_on(self, layout: Layout) -> int:
        """Q for an item with features in ``layout``; Q >= 1."""

    @abstractmethod
    def layout_examples(self) -> list[tuple[int, Layout]]:
        """A few possible layouts, each after its number of features, for the contract test."""


def outputs_of(
    projector: ProjectorConfig, preprocessor: Preprocessor, item: dict[str, torch.Tensor], path: str = ""
) -> tuple[int, Layout | None]:
    """How many embeddings ``projector`` gives for an item, and the layout that its module needs; None where it needs none.

    Raises ``ConfigError`` where the features have no such layout, with the projector at the dotted ``path``.
    """
    if isinstance(projector, LayoutProjectorConfig):
        try:
            layout = projector.layout(preprocessor, item)
        except ConfigError as error:
            found = [(".".join(filter(None, (path, inner))), text) for inner, text in error.problems]
            raise ConfigError(found) from None
        return projector.num_outputs_on(layout), layout
    return projector.num_outputs(preprocessor.num_tokens(item)), None


class FusionConfig(ComponentConfig):
    """Deep fusion: the input projector's outputs enter the backbone's blocks, not its sequence of embeddings."""

    family: ClassVar[str] = "fusion"

    @abstractmethod
    def width(self, encoder_dim: int) -> int:
        """D_m, the width that the input projector's outputs are to have."""

    @abstractmethod
    def build(self, context: BuildContext, *, hidden_dim: int, media_dim: int, num_layers: int) -> Fusion:
        """``hidden_dim`` is the width of the backbone's ``num_layers`` blocks, ``media_dim`` D_m."""


class OutputProjectorConfig(ComponentConfig):
    """An output projector: hidden states at K signal tokens, (N, K, D_llm), to a generator's condition."""

    family: ClassVar[str] = "output_projector"

    @abstractmethod
    def build(
        self, context: BuildContext, *, input_dim: int, num_signals: int, condition_shape: Mapping[str, Shape]
    ) -> OutputProjector:
        """``input_dim`` is D_llm, ``num_signals`` K; ``condition_shape`` comes from the generator, never from YAML."""


class GeneratorConfig(ComponentConfig):
    """A frozen generator: a condition in, a picture, sound or clip out. ``media`` names what it makes."""

    family: ClassVar[str] = "generator"
    media: ClassVar[str]

    @abstractmethod
    def condition_shape(self, context: BuildContext) -> dict[str, Shape]:
        """The streams of the condition and their shapes, read from JSON files alone; empty when it is told codes."""

    def tokens(self, context: BuildContext, signal_tokens: int | None) -> TokenGroup:
        """The tokens that stand for a medium. Here ``signal_tokens`` fixed ones, whose states an output projector reads."""
        return TokenGroup(tuple(range(k, k + 1) for k in range(signal_tokens or 0)))

    @abstractmethod
    def target(self, context: BuildContext) -> Target:
        """How a medium becomes what ``Generator.denoising_loss`` or ``CodeGenerator.encode`` takes."""

    @abstractmethod
    def build(self, context: BuildContext) -> MediaGenerator | None:
        """A ``Generator``; None when its weights are in files that ``context`` does not allow to read: a plan needs the
        shape alone.
        """


class CodeGeneratorConfig(GeneratorConfig):
    """A frozen generator that is told discrete codes: the backbone writes them itself, as tokens of its own, and there is
    no output projector.
    """

    @abstractmethod
    def codes(self, context: BuildContext) -> Codes:
        """How many codes of which kinds one medium has, read from JSON files alone."""

    def condition_shape(self, context: BuildContext) -> dict[str, Shape]:
        return {}

    def tokens(self, context: BuildContext, signal_tokens: int | None) -> TokenGroup:
        return self.codes(context).group()

    @abstractmethod
    def build(self, context: BuildContext) -> CodeGenerator | None:
        """None when its weights are in files that ``context`` does not allow to read."""


class AdapterConfig(ComponentConfig):
    """A parameter-efficient adapter of a backbone or an encoder."""

    family: ClassVar[str] = "adapter"

    # Whether gradient checkpointing of the adapted layers leaves it intact.
    checkpointing: ClassVar[bool] = True

    @property
    def positions(self) -> int:
        """How many of a backbone's positions it takes from a sequence."""
        return 0

    @abstractmethod
    def attach(self, model: Any) -> Adapter:
        """Put it into ``model``, in place: a transformers causal LM, or the module of an encoder.

        Afterwards the adapter's parameters alone require gradients, and ``model`` computes what it did before unless the
        method begins otherwise. Raises ``ConfigError`` with paths from ``adapter`` on for a model that it does not fit.
        """


class QuantizeConfig(Config):
    """The frozen linear layers of a backbone in fewer bits: 4 are QLoRA's NF4 (arXiv 2305.14314), 8 steps of equal size; each
    with a float32 scale for 64 weights. They are quantised when they are loaded, and never trained.
    """

    bits: Literal[4, 8] = 4


class BackboneConfig(ComponentConfig):
    """The language model."""

    family: ClassVar[str] = "backbone"
    adapter: AnyAdapter | None = None
    quantize: QuantizeConfig | None = None

    @abstractmethod
    def tokenizer(self, context: BuildContext) -> PreTrainedTokenizerBase:
        """The backbone's own tokenizer, with a chat template."""

    @abstractmethod
    def vocab_rows(self, context: BuildContext) -> int:
        """Rows of the backbone's embedding table; ids from here on are mmllm's new tokens."""

    def num_tokens(self, context: BuildContext) -> int | None:
        """How many tokens the tokenizer has; None when that is in files which ``context`` does not allow to fetch."""
        return None

    def max_positions(self, context: BuildContext) -> int | None:
        """The longest sequence that the backbone takes; None when it has no limit, or that is not known."""
        return None

    @abstractmethod
    def build(self, context: BuildContext, *, num_new_tokens: int, num_signals: int = 0) -> Backbone:
        """``num_new_tokens`` rows beside the table; the first ``num_signals`` of them can also be predicted."""


class ReaderConfig(ComponentConfig):
    """A data source's file format."""

    family: ClassVar[str] = "reader"

    @abstractmethod
    def read(self, context: BuildContext) -> Iterable[Any]:
        """The samples (``mmllm.processing.messages.Sample``) in file order; media stay references."""


AnyEncoder = Annotated[SerializeAsAny[EncoderConfig], BeforeValidator(partial(_dispatch, "encoder"))]
AnyProjector = Annotated[SerializeAsAny[ProjectorConfig], BeforeValidator(partial(_dispatch, "input_projector"))]
AnyFusion = Annotated[SerializeAsAny[FusionConfig], BeforeValidator(partial(_dispatch, "fusion"))]
AnyAdapter = Annotated[SerializeAsAny[AdapterConfig], BeforeValidator(partial(_dispatch, "adapter"))]
AnyBackbone = Annotated[SerializeAsAny[BackboneConfig], BeforeValidator(partial(_dispatch, "backbone"))]
AnyReader = Annotated[SerializeAsAny[ReaderConfig], BeforeValidator(partial(_dispatch, "reader"))]
AnyOutputProjector = Annotated[
    SerializeAsAny[OutputProjectorConfig], BeforeValidator(partial(_dispatch, "output_projector"))
]
AnyGenerator = Annotated[SerializeAsAny[GeneratorConfig], BeforeValidator(partial(_dispatch, "generator"))]
BackboneConfig.model_rebuild()
EncoderConfig.model_rebuild()
