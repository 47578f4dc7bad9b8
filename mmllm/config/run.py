"""The configuration of one assembled system and of the stages that train it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from mmllm.config.alignment import AlignmentConfig, PFormerConfig
from mmllm.config.base import Config
from mmllm.config.families import (
    AnyBackbone,
    AnyEncoder,
    AnyFusion,
    AnyGenerator,
    AnyOutputProjector,
    AnyProjector,
    AnyReader,
    BackboneConfig,
    CodeGeneratorConfig,
    EncoderConfig,
)

Adapted = TypeVar("Adapted", EncoderConfig, BackboneConfig)
Probability = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# torch cannot compute with rates near the end of float32; no useful one is anywhere near this bound.
Rate = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Objective = Literal[
    "text", "condition", "denoise", "contrastive", "decision",
    "itc", "itm", "itg", "alignment",
    "reconstruction", "self_contrastive", "quantization",
]  # fmt: skip
ALIGNING: tuple[Objective, ...] = (
    "itc",
    "itm",
    "itg",
    "alignment",
)  # between a projector and captions: the backbone takes no part
PROMPTING: tuple[Objective, ...] = (
    "reconstruction",
    "self_contrastive",
    "quantization",
)  # by which P-Former learns from text alone
Batching = Literal["packed", "grouped", "padded"]
SIGNAL_TOKENS = 4  # of an output whose configuration does not say
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class InputConfig(Config):
    """How one modality enters the backbone: ``encoder`` then input ``projector``.

    ``markers`` puts a trainable start and end token around every media span (they live in ``backbone.new_tokens``).
    ``alignment`` is what a ``qformer`` projector needs for BLIP-2's first stage, in which it learns from captions; ``prompt``
    learns from text alone what the projector should give, for any that gives every medium as many outputs.
    With ``fusion`` the projector's outputs enter the backbone's blocks; in the sequence a medium is its two markers alone.
    """

    encoder: AnyEncoder
    projector: AnyProjector
    markers: bool = False
    alignment: AlignmentConfig | None = None
    prompt: PFormerConfig | None = None
    fusion: AnyFusion | None = None

    @model_validator(mode="before")
    @classmethod
    def _fused_media_are_marked(cls, value: Any) -> Any:
        fused = isinstance(value, dict) and value.get("fusion") is not None
        return {"markers": True, **value} if fused else value

    @model_validator(mode="after")
    def _marked(self) -> Self:
        if self.fusion is not None and not self.markers:
            raise ValueError("fused media stand in the text as their markers; leave `markers` out")
        return self

    @model_validator(mode="after")
    def _queries_to_align(self) -> Self:
        if self.alignment is not None and self.projector.kind != "qformer":
            raise ValueError(f"`alignment` is of the queries of a qformer; the projector is {self.projector.kind!r}")
        if self.prompt is not None and self.fusion is not None:
            raise ValueError("`prompt` is of outputs that the backbone reads as tokens; leave it out, or `fusion`")
        taught = [name for name in ("alignment", "prompt") if dict(self)[name] is not None]
        if taught and self.projector.num_outputs(1) != self.projector.num_outputs(4096):
            raise ValueError(
                f"`{taught[0]}` is of a fixed number of outputs; with projector {self.projector.kind!r} it depends on the medium. "
                "Use a qformer without windows"
            )
        return self


class RetrievalConfig(Config):
    """Answering with an existing medium (GILL, arXiv 2305.17216): signal tokens and media meet in a space of ``dim``.

    The media are seen by the encoder of the input of the same name; where it gives several features, by their mean.
    """

    dim: PositiveInt = 256


class DecisionConfig(Config):
    """A linear classifier of the signal tokens (GILL's): is an existing medium the better answer, or a generated one?

    ``dropout`` acts on what it reads, in training.
    """

    dropout: Probability = 0.5


class OutputConfig(Config):
    """How the backbone makes one modality.

    It writes ``signal_tokens`` new tokens; ``projector`` turns the hidden states there into the condition of the frozen
    ``generator``. ``distance`` is how the ``condition`` objective measures it against the generator's own: the Euclidean
    norm or 1 - cosine similarity. With ``retrieval`` it can look for an existing medium instead, and ``decision`` learns
    when to. A generator of codes has none of these: the backbone writes the codes.
    """

    signal_tokens: PositiveInt | None = None
    projector: AnyOutputProjector | None = None
    generator: AnyGenerator
    distance: Literal["l2", "cosine"] = "l2"
    retrieval: RetrievalConfig | None = None
    decision: DecisionConfig | None = None

    @model_validator(mode="after")
    def _something_to_decide(self) -> Self:
        if self.decision is not None and self.retrieval is None:
            raise ValueError("`decision` is between generating and retrieving; it needs `retrieval`")
        return self

    @model_validator(mode="before")
    @classmethod
    def _four_signals(cls, value: Any) -> Any:
        told = isinstance(value, dict) and value.get("projector") is not None
        return {**value, "signal_tokens": SIGNAL_TOKENS} if told and value.get("signal_tokens") is None else value

    @model_validator(mode="after")
    def _as_the_generator_needs(self) -> Self:
        if isinstance(self.generator, CodeGeneratorConfig):
            text = f"the backbone itself writes the codes of {self.generator.kind}; leave this out"
            needless = {"projector", "signal_tokens", "retrieval", "decision"}
            problems = [(name, text) for name in self.model_dump(include=needless, exclude_none=True)]
        else:
            problems = [("projector", "required, but not given")] if self.projector is None else []
        if problems:
            raise PydanticCustomError("component", "{nested}", {"nested": problems})
        return self


class ModelConfig(Config):
    """The assembled system: one entry per input modality, the backbone, one entry per output modality."""

    inputs: dict[Name, InputConfig] = {}
    backbone: AnyBackbone
    outputs: dict[Name, OutputConfig] = {}

    def tiny(self) -> Self:
        """The same composition with the ``tiny()`` version of every part: random weights, nothing to download."""
        inputs = {
            name: part.model_copy(
                update={
                    "encoder": _tiny(part.encoder),
                    "projector": part.projector.tiny(),
                    "alignment": None if part.alignment is None else part.alignment.tiny(),
                    "prompt": None if part.prompt is None else part.prompt.tiny(),
                    "fusion": None if part.fusion is None else part.fusion.tiny(),
                }
            )
            for name, part in self.inputs.items()
        }
        outputs = {
            name: part.model_copy(
                update={
                    "projector": None if part.projector is None else part.projector.tiny(),
                    "generator": part.generator.tiny(),
                }
            )
            for name, part in self.outputs.items()
        }
        return self.model_copy(update={"inputs": inputs, "backbone": _tiny(self.backbone), "outputs": outputs})


def _tiny(part: Adapted) -> Adapted:
    """``part.tiny()`` with a tiny adapter, where it has one."""
    return part.tiny().model_copy(update={"adapter": None if part.adapter is None else part.adapter.tiny()})


class DataSource(Config):
    """One part of a stage's data. ``weight`` is its share of the mixture relative to its size (2.0 = seen twice an epoch).

    A file name alone stands for a messages file: ``data: [train.jsonl]``.
    """

    reader: AnyReader
    weight: Positive = 1.0

    @model_validator(mode="before")
    @classmethod
    def _from_file_name(cls, value: Any) -> Any:
        return {"reader": {"kind": "messages", "path": value}} if isinstance(value, str) else value


class OptimizerConfig(Config):
    """AdamW and its schedule. Rates are per optimizer step; ``warmup`` is a share of the stage's steps."""

    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    warmup: Probability = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: Positive | None = 1.0


class SpikeConfig(Config):
    """When a step's loss leaps, the run goes back to the last checkpoint and on behind the steps that led there (PaLM, arXiv
    2204.02311, section 5.1).

    A leap: the loss lies more than ``deviations`` standard deviations above the mean of the ``window`` losses before it. It
    happens at most ``rollbacks`` times in a stage; leaps after that are logged.
    """

    window: Annotated[int, Field(ge=2)] = 128
    deviations: Positive = 6.0
    rollbacks: PositiveInt = 1


class StageConfig(Config):
    """One training stage. ``train`` names the trainable parts by pattern; everything else stays frozen, bit for bit.

    ``lr`` is the rate of every trainable part; ``part_lr`` maps patterns to other rates (the first match counts).
    ``objectives`` are weights: ``text`` is the next-token loss, a mean over supervised tokens; ``condition`` the distance of
    the output projectors' conditions from the generators' own text conditions of the captions, and ``denoise`` the frozen
    denoisers' loss on the targets, means over the media of the global batch; ``contrastive`` is the loss of retrieval
    among the media of a micro-batch over all processes, ``decision`` that of the choice between an existing medium and a
    generated one (see ``docs/outputs.md``); ``itc``, ``itm``, ``itg`` and ``alignment`` are between a projector and
    captions, ``reconstruction``, ``self_contrastive`` and ``quantization`` those of P-Former (see ``docs/alignment.md``).
    ``batch_size`` is the number of samples of one optimizer step over all processes; it is cut into micro-batches of
    ``micro_batch_size`` per process, so the same config gives the same run on one process or many. ``micro_batch_tokens`` and
    ``micro_batch_media`` (of one modality) are limits besides; a sample is never cut. ``batching`` is how samples share a
    micro-batch: ``packed`` behind each other in one row without padding, ``grouped`` by length, or ``padded`` in the data's
    order; the loss is the same. A backbone that cannot keep packed sequences apart gets grouped ones.
    ``mixture``: whether the sources' weights are passes through their rows, or shares of the tokens (all of them, or those with a
    label; see ``docs/data.md``).
    ``max_length`` is in tokens; a stage that does not give it gets fewer where the backbone has fewer positions.
    ``max_skipped`` is the share of samples that may turn out unusable before the run stops: looked at from 100 samples on,
    with 0 from the first.
    """

    name: Name
    train: Annotated[list[str], Field(min_length=1)]
    lr: Rate
    part_lr: dict[str, Rate] = {}
    data: Annotated[list[DataSource], Field(min_length=1)]
    eval_data: list[DataSource] = []
    mixture: Literal["rows", "tokens", "supervised_tokens"] = "rows"
    objectives: Annotated[dict[Objective, Positive], Field(min_length=1)] = {"text": 1.0}
    epochs: Positive | None = None
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 32
    micro_batch_size: PositiveInt = 8
    micro_batch_tokens: PositiveInt | None = None
    micro_batch_media: PositiveInt | None = None
    batching: Batching = "packed"
    max_length: PositiveInt = 2048
    optimizer: OptimizerConfig = OptimizerConfig()
    gradient_checkpointing: bool = False
    num_workers: Annotated[int, Field(ge=0)] = 0
    eval_every: PositiveInt | None = None
    save_every: PositiveInt | None = None
    samples: Annotated[int, Field(ge=0)] = 4
    max_skipped: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.1
    spike: SpikeConfig | None = None

    @model_validator(mode="after")
    def _something_to_go_back_to(self) -> Self:
        if self.spike is not None and self.save_every is None:
            raise ValueError("`spike` goes back to a checkpoint of the stage; give `save_every` too")
        return self

    @property
    def reads_captions(self) -> bool:
        """Whether an objective needs captions, or sentences."""
        return any(name in (*ALIGNING, *PROMPTING) for name in self.objectives)

    @property
    def answers(self) -> bool:
        """Whether an objective is about what the backbone says of media, or makes."""
        return any(name not in (*ALIGNING, *PROMPTING) for name in self.objectives)


class CacheConfig(Config):
    """Where a run keeps what its frozen parts give, so that each is computed once (see ``docs/cache.md``).

    The generators' text conditions of captions always: ``folder`` (by default ``conditions`` in the run directory; several
    runs may share one) grows to at most ``gigabytes``. With ``features`` also the features of frozen encoders, with
    ``latents`` what the generators' autoencoders say of their targets: in ``features`` below that folder (by default in the
    run directory), at most ``gigabytes`` of both. ``storage`` is how these are kept: ``exact``, or rounded to fewer bits.
    """

    folder: str | None = None
    gigabytes: Positive = 20.0
    features: bool = False
    latents: bool = False
    storage: Literal["exact", "float16", "bfloat16", "int8"] = "exact"


class RunConfig(Config):
    """Everything a run needs. ``output`` is the run directory, relative to the working directory.

    ``cache: null`` computes the text conditions of captions whenever they are needed; the results are the same.

    ``compile`` runs the backbone's layers through torch.compile: a minute of compiling and a C++ compiler, then faster steps.
    ``short_cuts`` computes the backbone's last layer only where its output is used, and head and loss a few positions at a time,
    where the model is built so that this gives the same.

    Of the checkpoints the newest ``keep_last`` stay, and with ``keep_every`` one of every so many steps of a stage, for good.
    With ``save_async`` they are copied in memory and written while training goes on.
    """

    model: ModelConfig
    stages: list[StageConfig] = []
    output: str = "runs/default"
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    cache: CacheConfig | None = CacheConfig()
    compile: bool = False
    short_cuts: bool = True
    trackers: list[str] = ["tensorboard"]
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None
    save_async: bool = False
    plugins: list[str] = []
