"""The ``group`` input projector: NExT-GPT's, which groups features by GroupViT's assignment (arXiv 2309.05519, 2202.11094)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from mmllm.config.base import BuildContext
from mmllm.config.families import ProjectorConfig

if TYPE_CHECKING:
    from mmllm.projectors.group_module import GroupProjector

PerStage = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class GroupConfig(ProjectorConfig):
    """Stages of transformer blocks; between two of them every feature is assigned to one of a few groups.

    However many features there are, the last of ``num_output_groups`` come out. Names and numbers are those of
    ``GroupProjector`` in NExT-GPT's code (``nextgpt/model/multimodal_projector/projector.py``).

    - ``num_group_tokens``: trained tokens beside the features in each stage that ends in a grouping; from them the groups of
      that stage are made.
    - ``num_output_groups``: groups after each of these stages, the features of the next.
    - ``depths``: blocks in each stage; one stage more than there are groupings.

    In training the assignment is drawn (Gumbel noise, straight-through gradients); otherwise the likeliest is taken.
    """

    kind: Literal["group"] = "group"
    hidden_dim: PositiveInt = 512
    num_heads: PositiveInt = 8
    num_group_tokens: PerStage = (64, 8)
    num_output_groups: PerStage = (64, 8)
    depths: PerStage = (6, 3, 3)

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_dim {self.hidden_dim}")
        groupings = len(self.num_output_groups)
        if (len(self.num_group_tokens), len(self.depths)) != (groupings, groupings + 1):
            raise ValueError(
                f"found {len(self.num_group_tokens)} num_group_tokens and {len(self.depths)} depths, expected {groupings} and "
                f"{groupings + 1} for {groupings} num_output_groups"
            )
        return self

    def num_outputs(self, length: int) -> int:
        return self.num_output_groups[-1]

    def tiny(self) -> GroupConfig:
        """Width 16, one block in each stage, at most 4 tokens and groups."""
        return GroupConfig(
            hidden_dim=16,
            num_heads=2,
            num_group_tokens=tuple(min(count, 4) for count in self.num_group_tokens),
            num_output_groups=tuple(min(count, 4) for count in self.num_output_groups),
            depths=(1,) * len(self.depths),
        )

    def build(self, context: BuildContext, *, input_dim: int, output_dim: int) -> GroupProjector:
        from mmllm.projectors.group_module import GroupProjector

        return GroupProjector(self, input_dim, output_dim).to(context.dtype)
