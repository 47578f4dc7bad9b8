"""The ways out of the model: signal tokens to a condition, or codes, and the frozen generators behind them."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.cache.media import MediaCache
from mmllm.errors import MmllmError
from mmllm.generators.base import Artifact, CodeGenerator, Condition, Generator, Sampling
from mmllm.generators.diffusion_module import LatentDiffusion
from mmllm.generators.text_conditions import TextConditions
from mmllm.projectors.output_module import OutputProjector
from mmllm.projectors.retrieval import DecisionHead, RetrievalHeads

if TYPE_CHECKING:
    from mmllm.processing.batch import MadeBatch


class Output(nn.Module):
    """One modality's way out: signal tokens' states to a condition, condition to the frozen generator.

    With ``retrieval`` they can also find an existing medium, and ``decision`` tells when they should.
    """

    def __init__(
        self,
        projector: OutputProjector,
        generator: Generator | None,
        distance: Literal["l2", "cosine"] = "l2",
        retrieval: RetrievalHeads | None = None,
        decision: DecisionHead | None = None,
    ) -> None:
        super().__init__()
        self.projector, self.distance = projector, distance
        self.generator = None if generator is None else generator.requires_grad_(False)
        self.retrieval, self.decision = retrieval, decision
        self.text_conditions: TextConditions | None = None  # a run's, which may keep them
        self.cache: MediaCache | None = None  # a run's, of what the generator's autoencoder says of targets

    def frozen(self) -> Generator:
        """The generator. Raises ``MmllmError`` when the model was built without weights, for a plan."""
        if self.generator is None:
            raise MmllmError("this model was built without its generators' weights")
        return self.generator

    def forward(self, signals: Tensor) -> Condition:
        """The condition of N media from ``signals (N, K, D_llm)``, last hidden states plus input embeddings."""
        return Condition(self.projector(signals))

    def make(
        self, signals: Tensor, sampling: Sampling, on_step: Callable[[int, int], bool] | None = None
    ) -> list[Artifact]:
        """Media from ``signals (N, K, D_llm)``."""
        return self.frozen().generate(self(signals), sampling, on_step)

    def losses(self, signals: Tensor, made: MadeBatch, objectives: Container[str]) -> dict[str, Tensor]:
        """Summed losses over the N media of a batch with ``signals (N, K, D_llm)``, float32 scalars."""
        sums: dict[str, Tensor] = {}
        if any(name in objectives for name in ("condition", "denoise")):
            condition = self(signals)
        if "condition" in objectives and made.captions:
            wanted = (self.text_conditions or TextConditions(self.frozen()))(made.captions)
            sums["condition"] = condition.at(made.captioned).distance(wanted, self.distance).sum()
        if "denoise" in objectives and len(made.drawn):
            sums["denoise"] = self._denoising_loss(condition.at(made.drawn), made).sum()
        if "decision" in objectives and self.decision is not None and len(made.decided):
            found = self.decision(signals[made.decided])
            sums["decision"] = F.cross_entropy(found, made.retrieved, reduction="sum")
        return sums

    def _denoising_loss(self, condition: Condition, made: MadeBatch) -> Tensor:
        """``(N,)``, of the targets of a batch."""
        generator = self.frozen()
        if made.cached is None or self.cache is None or not isinstance(generator, LatentDiffusion):
            return generator.denoising_loss(condition, cast(Tensor, made.targets))
        return generator.loss_of_encoded(condition, torch.stack(self.encoded_targets(made)))

    def encoded_targets(self, made: MadeBatch) -> list[Tensor]:
        """What the generator's autoencoder says of the targets of a batch, each computed only if the cache lacks it."""
        if made.cached is None or self.cache is None:
            raise MmllmError("this output has no cache of its generator's latents")
        generator = cast(LatentDiffusion, self.frozen())
        return self.cache.values(made.cached, lambda: list(generator.encode_targets(cast(Tensor, made.targets))))


class CodeOutput(nn.Module):
    """One modality's way out where the backbone itself writes the codes that the frozen generator is told."""

    def __init__(self, generator: CodeGenerator | None) -> None:
        super().__init__()
        self.generator = None if generator is None else generator.requires_grad_(False)

    def frozen(self) -> CodeGenerator:
        """The generator. Raises ``MmllmError`` when the model was built without weights, for a plan."""
        if self.generator is None:
            raise MmllmError("this model was built without its generators' weights")
        return self.generator

    def make(
        self, codes: Tensor, sampling: Sampling, on_step: Callable[[int, int], bool] | None = None
    ) -> list[Artifact]:
        """Media from ``codes (N, P)``."""
        return self.frozen().generate(codes, sampling, on_step)


AnyOutput = Output | CodeOutput
