"""Input projectors of queries: BLIP-2's Querying Transformer (``qformer``, arXiv 2301.12597), whole or window by window, and
one with queries for each of several encoders (``mq_former``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mmllm.config.base import BuildContext
from mmllm.config.families import Layout, LayoutProjectorConfig, Membered, Preprocessor, ProjectorConfig
from mmllm.errors import ConfigError

if TYPE_CHECKING:
    from mmllm.projectors.qformer_module import MultiQueryProjector, QFormerProjector

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class QueryingConfig(ProjectorConfig):
    """The numbers of a Q-Former: queries read features by cross-attention in every ``cross_attention_every``-th layer.

    The defaults are BLIP-2's.
    """

    num_layers: PositiveInt = 12
    hidden_dim: PositiveInt = 768
    num_heads: PositiveInt = 12
    ff_mult: PositiveInt = 4
    cross_attention_every: PositiveInt = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_dim {self.hidden_dim}")
        return self

    def tiny(self) -> Self:
        """Two layers of width 16, one without cross-attention where the original has such."""
        every = min(self.cross_attention_every, 2)
        numbers = {"num_layers": 2, "hidden_dim": 16, "num_heads": 2, "ff_mult": 2, "cross_attention_every": every}
        return self.model_copy(update=numbers)


class QFormerConfig(QueryingConfig):
    """``num_queries`` trained queries read the features by cross-attention in every ``cross_attention_every``-th layer.

    However many features there are, one output comes out for each query, unless there are windows. The defaults are BLIP-2's
    numbers.

    - ``extra_queries`` stand behind the others and start at random beside pretrained ones (VideoChat, arXiv 2305.06355).
    - ``window``: the queries read ``window`` features, and then the next, so that a long sound has more outputs than a short
      one: SALMONN's window-level Q-Former (arXiv 2310.13289). Windows begin ``stride`` features apart (``window`` unless
      given), and outputs stand in the order of the windows; all weights are shared. The last window may be shorter, and
      reads what there is. Both are numbers of features: an encoder does not say how long a feature lasts (Whisper's 20 ms,
      so that SALMONN's 0.333 s are 17).
    - ``norm`` puts a LayerNorm on the features first (BLIP-2's ``ln_vision``), for encoders read before it.
    - ``pretrained``: a folder or hub id of a transformers BLIP-2 checkpoint. Its Q-Former, queries and, with ``norm``,
      its vision tower's last LayerNorm are taken; the encoder's width and all numbers here must be the checkpoint's.
      Its linear layer is taken too when the backbone has the width it was made for; otherwise that starts at random.
    - ``bert``: a folder or hub id of a BERT whose self-attention and feed-forward blocks are the start, as in BLIP-2's first
      stage; cross-attention, queries and the linear layer are new.
    """

    kind: Literal["qformer"] = "qformer"
    num_queries: PositiveInt = 32
    extra_queries: NonNegativeInt = 0
    norm: bool = False
    window: PositiveInt | None = None
    stride: PositiveInt | None = None
    pretrained: str | None = None
    revision: str | None = None
    bert: str | None = None

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.pretrained is not None and self.bert is not None:
            raise ValueError(
                "give `pretrained` or `bert`, not both: a BLIP-2 checkpoint has all that a BERT would give"
            )
        return self

    @model_validator(mode="after")
    def _nothing_between_windows(self) -> Self:
        if self.stride is not None and (self.window is None or self.stride > self.window):
            found = "no `window`" if self.window is None else f"`window: {self.window}`"
            raise ValueError(f"found `stride: {self.stride}` with {found}; expected a window of at least the stride")
        return self

    def num_windows(self, length: int) -> int:
        """How many windows ``length`` features have: as many as it takes for each feature to be in one."""
        if self.window is None:
            return 1
        return 1 + max(0, -(-(length - self.window) // (self.stride or self.window)))

    def num_outputs(self, length: int) -> int:
        return (self.num_queries + self.extra_queries) * self.num_windows(length)

    def tiny(self) -> QFormerConfig:
        """At most 4 queries and two layers of width 16, one without cross-attention where the original has such."""
        few = {"num_queries": min(self.num_queries, 4), "extra_queries": min(self.extra_queries, 2)}
        return super().tiny().model_copy(update={**few, "pretrained": None, "bert": None, "revision": None})

    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> QFormerProjector:
        """Raises ``CheckpointError`` when the checkpoint has other numbers."""
        from mmllm.projectors.qformer_module import make_projector

        return make_projector(self, context, input_dim, output_dim)


class MQFormerConfig(QueryingConfig, LayoutProjectorConfig):
    """Queries for each encoder of a ``fused`` one (``along: sequence``): a group reads the features of its own encoder, and
    all groups attend to each other.

    A general form of what Lyrics' MQ-Former (arXiv 2312.05278) does with a picture's features and a visual refiner's; no
    code of it was published. Every encoder's features have a linear layer of their own to the Q-Former's width first, so
    they may be of any scale and, with the encoder's ``widths: pad``, of any width. ``queries`` are the encoders' names, in
    their order, and how many queries each has; as many outputs come out, those of the first encoder first.
    """

    suggested: ClassVar[Mapping[str, Any]] = {"any": {"queries": {"siglip": 16, "dino": 16}}}  # `fused`'s suggestion

    kind: Literal["mq_former"] = "mq_former"
    queries: Annotated[dict[Name, PositiveInt], Field(min_length=2)]

    def layout(self, preprocessor: Preprocessor, item: dict[str, Any]) -> Layout:
        """How many features each encoder has."""
        found = preprocessor.members(item) if isinstance(preprocessor, Membered) else None
        if found is None:
            problem = "the encoder is not `fused` with `along: sequence`, so there is nothing to give each its queries"
            raise ConfigError([("queries", problem)], "mq_former projector")
        if list(found) != list(self.queries):
            problem = (
                f"found {', '.join(self.queries)}, expected the encoders' names in their order: {', '.join(found)}"
            )
            raise ConfigError([("queries", problem)], "mq_former projector")
        return tuple(found.values())

    def num_outputs(self, length: int) -> int:
        return sum(self.queries.values())

    def num_outputs_on(self, layout: Layout) -> int:
        return sum(self.queries.values())

    def layout_examples(self) -> list[tuple[int, Layout]]:
        members = range(len(self.queries))
        layouts = [tuple(1 + (shift + 3 * index) % 4 for index in members) for shift in range(4)]
        return [(sum(layout), layout) for layout in layouts]

    def tiny(self) -> MQFormerConfig:
        """At most 2 queries for each encoder."""
        few = {name: min(count, 2) for name, count in self.queries.items()}
        return super().tiny().model_copy(update={"queries": few})

    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> MultiQueryProjector:
        from mmllm.projectors.qformer_module import MultiQueryProjector

        return MultiQueryProjector(self, input_dim, output_dim).to(context.dtype)
