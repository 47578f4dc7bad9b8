"""The assembled model: encode media, splice them into the token embeddings, run the backbone, score the replies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.backbones.base import Backbone
from mmllm.config.base import BuildContext, problems_at
from mmllm.config.run import ModelConfig
from mmllm.encoders.base import Encoder
from mmllm.errors import ConfigError
from mmllm.projectors.base import Projector

if TYPE_CHECKING:
    from mmllm.processing.processor import Batch, MediaBatch


@dataclass(frozen=True)
class Loss:
    """``total`` is the *sum* of the supervised tokens' losses (float32 scalar), ``tokens`` their number.

    Sums, not means: the trainer divides by the number of supervised tokens of the whole global batch.
    """

    total: Tensor
    tokens: int


class Input(nn.Module):
    """One modality's way in: encoder, then input projector."""

    def __init__(self, encoder: Encoder, projector: Projector) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Backbone embeddings ``(N, Q, D_llm)`` of N media items."""
        # A frozen encoder leaves no graph behind: nothing of it would be used.
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        ):
            features, mask = self.encoder(batch)
        embeddings, _ = self.projector(features, mask)
        return embeddings  # type: ignore[no-any-return]


class MultimodalLM(nn.Module):
    """Modality inputs in front of a language-model backbone."""

    def __init__(self, inputs: Mapping[str, Input], backbone: Backbone) -> None:
        super().__init__()
        self.inputs = nn.ModuleDict(inputs)
        self.backbone = backbone

    @classmethod
    def from_config(cls, config: ModelConfig, context: BuildContext) -> MultimodalLM:
        """Build every part and wire the dimensions. With ``torch.device("meta")`` around it, nothing is allocated.

        Raises ``ConfigError`` with everything that the parts refuse, each under its dotted path.
        """
        markers = 2 * sum(part.markers for part in config.inputs.values())
        problems: list[tuple[str, str]] = []
        backbone: Backbone | None = None
        inputs = {}
        with problems_at("model.backbone", problems, context):
            backbone = config.backbone.build(context, num_new_tokens=markers)
        for name, part in config.inputs.items():
            path = f"model.inputs.{name}"
            with problems_at(f"{path}.encoder", problems, context):
                encoder = part.encoder.build(context)
            if backbone is not None and not problems:
                with problems_at(f"{path}.projector", problems, context):
                    projector = part.projector.build(
                        context, input_dim=encoder.output_dim, output_dim=backbone.hidden_dim
                    )
                    inputs[name] = Input(encoder, projector)
        if backbone is None or problems:
            raise ConfigError(problems)
        return cls(inputs, backbone)

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parts a stage can train, by name: disjoint, and together all parameters.

        ``inputs.<name>.encoder``, ``inputs.<name>.projector``, ``backbone`` (its own weights), ``backbone.adapter`` and
        ``backbone.new_tokens``. Inner keys are the parameters' names in this module.
        """
        parts: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            parts.setdefault(part_of(name), {})[name] = parameter
        return parts

    def encode(self, media: Mapping[str, MediaBatch]) -> dict[str, Tensor]:
        """Backbone embeddings ``(N, Q, D_llm)`` per modality present: one encoder call each."""
        return {name: self.inputs[name](batch.inputs) for name, batch in media.items()}

    def splice(self, ids: Tensor, media: Mapping[str, MediaBatch]) -> Tensor:
        """Token embeddings ``(B, T, D_llm)`` of ``ids (B, T)`` with every media span's embeddings in its place."""
        embeddings = self.backbone.embed(ids)
        flat = embeddings.flatten(0, 1)
        for name, encoded in self.encode(media).items():
            batch = media[name]
            if encoded.shape[1] != batch.width:
                raise RuntimeError(
                    f"{name}: the projector returned {encoded.shape[1]} outputs, its config's num_outputs said {batch.width}"
                )
            rows = encoded.flatten(0, 1)[batch.sources].to(flat.dtype)
            flat = flat.index_copy(0, batch.positions, rows)
        return flat.view_as(embeddings)

    def forward(self, batch: Batch) -> Loss:
        """Summed next-token cross-entropy over the supervised tokens of ``batch``."""
        embeddings = self.splice(batch.ids, batch.media) + self._zero(batch)
        logits = self.backbone(embeddings, batch.attention_mask, positions=batch.predict)
        return Loss(F.cross_entropy(logits.float(), batch.targets, reduction="sum"), batch.tokens)

    def _zero(self, batch: Batch) -> Tensor | float:
        """Zero, with a graph to the trainable parameters of modalities that this batch lacks.

        A rank without pictures thus still produces (zero) gradients for the picture projector, and gradient reduction
        over ranks does not wait for ever. A text-only batch in a projector-only stage can run backward for the same reason.
        """
        absent = [m for name, m in self.inputs.items() if name not in batch.media]
        trainable = [p for module in absent for p in module.parameters() if p.requires_grad]
        if self.backbone.new_tokens is not None:
            trainable += [p for p in self.backbone.new_tokens.parameters() if p.requires_grad]
        return sum(((p * 0.0).sum() for p in trainable), 0.0)


def part_of(parameter: str) -> str:
    """The part that a parameter belongs to, from its qualified name."""
    words = parameter.split(".")
    if words[0] == "inputs":
        return ".".join(words[:3])
    if words[1] == "new_tokens":
        return "backbone.new_tokens"
    # peft names its weights lora_A, lora_B, …; ADAPTER_WORDS are the prefixes of the adapter kinds that mmllm knows.
    return "backbone.adapter" if any(word.startswith(ADAPTER_WORDS) for word in words) else "backbone"


ADAPTER_WORDS = ("lora_",)
