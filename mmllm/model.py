"""The assembled model: encode media, splice them into the token embeddings, run the backbone, score what it says and makes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mmllm.adapters.blocks import find_blocks
from mmllm.aligning import align, prompt, zero_of
from mmllm.backbones.base import Backbone
from mmllm.cache.media import CachedBatch, MediaCache
from mmllm.config.base import BuildContext, problems_at
from mmllm.config.families import FusionConfig, TokenGroup
from mmllm.config.pieces import part_of
from mmllm.config.run import ALIGNING, PROMPTING, ModelConfig
from mmllm.encoders.base import Encoder
from mmllm.errors import ConfigError, MmllmError
from mmllm.fusion.base import Fusion, Seen
from mmllm.generators.base import CodeGenerator, Generator
from mmllm.generators.text_conditions import Store, TextConditions
from mmllm.outputs import AnyOutput, CodeOutput, Output
from mmllm.projectors.base import Projector
from mmllm.projectors.blip2 import Blip2Alignment, make_alignment
from mmllm.projectors.p_former import PFormer, make_p_former
from mmllm.projectors.qformer import QFormerConfig
from mmllm.projectors.retrieval import DecisionHead, RetrievalHeads

if TYPE_CHECKING:
    from mmllm.adapters.base import Adapter
    from mmllm.processing.batch import Batch, MadeBatch, MediaBatch


class Input(nn.Module):
    """One modality's way in: encoder, then input projector; with ``fusion`` into the backbone's blocks. ``alignment`` and
    ``prompt`` teach it from captions.
    """

    def __init__(self, encoder: Encoder, projector: Projector, adapter: Adapter | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.adapter = adapter  # what was attached to the encoder
        self.fusion: Fusion | None = None
        self.alignment: Blip2Alignment | None = None
        self.prompt: PFormer | None = None
        self.cache: MediaCache | None = None  # a stage's, of the features of a frozen encoder

    def features(self, batch: dict[str, Tensor], cached: CachedBatch | None = None) -> tuple[Tensor, Tensor]:
        """The encoder's features ``(N, S, D)`` and mask ``(N, S)`` of N media items; with ``cached`` the ``batch`` are those
        that are missing in it.
        """
        if cached is not None and self.cache is not None:
            return self.cache.features(cached, lambda: self.features(batch))
        # A frozen encoder leaves no graph behind: nothing of it would be used.
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        ):
            features, mask = self.encoder(batch)
        return features, mask

    def forward(
        self, batch: dict[str, Tensor], layouts: Tensor | None = None, cached: CachedBatch | None = None
    ) -> Tensor:
        """Backbone embeddings ``(N, Q, D_llm)`` of N media items; ``layouts (N, K)`` for a projector that asks for them."""
        return self.project(*self.features(batch, cached), layouts)

    def project(self, features: Tensor, mask: Tensor, layouts: Tensor | None = None) -> Tensor:
        """Backbone embeddings ``(N, Q, D_llm)`` of N media items' features ``(N, S, D)`` with their mask, and layouts."""
        told = () if layouts is None else (layouts,)
        embeddings, _ = self.projector(features, mask, *told)
        return embeddings  # type: ignore[no-any-return]


class MultimodalLM(nn.Module):
    """Modality inputs in front of a language-model backbone, modality outputs behind it."""

    def __init__(self, inputs: Mapping[str, Input], backbone: Backbone, outputs: Mapping[str, AnyOutput]) -> None:
        super().__init__()
        self.inputs = nn.ModuleDict(inputs)
        self.backbone = backbone
        self.outputs = nn.ModuleDict(outputs)

    @classmethod
    def from_config(cls, config: ModelConfig, context: BuildContext) -> MultimodalLM:
        """Build every part and wire the dimensions. With ``torch.device("meta")`` around it, nothing is allocated.

        Raises ``ConfigError`` with everything that the parts refuse, each under its dotted path.
        """
        markers = 2 * sum(part.markers for part in config.inputs.values())
        problems: list[tuple[str, str]] = []
        groups: dict[str, TokenGroup] = {}
        for name, made in config.outputs.items():
            with problems_at(f"model.outputs.{name}.generator", problems, context):
                groups[name] = made.generator.tokens(context, made.signal_tokens)
        signals = sum(group.rows for group in groups.values())
        backbone: Backbone | None = None
        inputs = {}
        with problems_at("model.backbone", problems, context):
            backbone = config.backbone.build(context, num_new_tokens=signals + markers, num_signals=signals)
        for name, part in config.inputs.items():
            path = f"model.inputs.{name}"
            with problems_at(f"{path}.encoder", problems, context):
                encoder, adapter = part.encoder.build(context), None
                if part.encoder.adapter is not None:
                    adapter = part.encoder.adapter.attach(encoder)
                    encoder = cast(Encoder, adapter.model)
            if backbone is not None and not problems:
                with problems_at(f"{path}.projector", problems, context):
                    width = backbone.hidden_dim if part.fusion is None else part.fusion.width(encoder.output_dim)
                    connect = part.projector.behind(part.encoder, context)
                    projector = connect.build(context, input_dim=encoder.output_dim, output_dim=width)
                    one = inputs[name] = Input(encoder, projector, adapter)
            if backbone is None or name not in inputs:
                continue
            with problems_at(f"{path}.fusion", problems, context):
                if part.fusion is not None:
                    one.fusion = fuse(part.fusion, context, backbone, width)
            with problems_at(f"{path}.alignment", problems, context):
                if part.alignment is not None:
                    one.alignment = make_alignment(part.alignment, cast(QFormerConfig, connect), context)
            with problems_at(f"{path}.prompt", problems, context):
                if part.prompt is not None:
                    one.prompt = make_p_former(part.prompt, context, connect.num_outputs(1), backbone.hidden_dim)
        outputs: dict[str, AnyOutput] = {}
        for name, made in config.outputs.items():
            path = f"model.outputs.{name}"
            with problems_at(f"{path}.generator", problems, context):
                shape, generator = made.generator.condition_shape(context), made.generator.build(context)
            if backbone is None or problems:
                continue
            if made.projector is None:
                outputs[name] = CodeOutput(cast(CodeGenerator | None, generator))
                continue
            with problems_at(f"{path}.projector", problems, context):
                out = made.projector.build(
                    context,
                    input_dim=backbone.hidden_dim,
                    num_signals=len(groups[name].places),
                    condition_shape=shape,
                )
                width, retrieval, decision = backbone.hidden_dim, None, None
                if made.retrieval is not None and name in inputs:  # without: see `contradictions`
                    seen_dim = inputs[name].encoder.output_dim
                    retrieval = RetrievalHeads(width, seen_dim, made.retrieval.dim).to(context.dtype)
                if made.decision is not None:
                    decision = DecisionHead(width, made.decision.dropout).to(context.dtype)
                outputs[name] = Output(out, cast(Generator | None, generator), made.distance, retrieval, decision)
        if backbone is None or problems:
            raise ConfigError(problems)
        return cls(inputs, backbone, outputs)

    def keep_text_conditions(self, folder: Path, limit: int, processes: int = 1) -> None:
        """Keep the text conditions of captions in ``folder``, at most ``limit`` bytes, and compute only what it lacks.

        ``processes`` is how many do so at once. Raises ``OSError`` when the folder cannot be used.
        """
        store = Store(folder, limit, processes)
        for output in self.outputs.values():
            if isinstance(output, Output):
                output.text_conditions = TextConditions(output.frozen(), store)

    def start_packing(self) -> bool:
        """Let ``forward`` take packed batches from now on. False where sequences of one row cannot be kept apart: fused media
        are seen by all of a row.
        """
        fused = any(cast(Input, one).fusion is not None for one in self.inputs.values())
        return not fused and self.backbone.start_packing()

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parts a stage can train, by name: disjoint, and together all parameters.

        ``inputs.<name>.encoder``, ``.projector``, ``.fusion``, ``.alignment`` and ``.prompt``, ``backbone`` (its own weights),
        ``backbone.new_tokens``, ``backbone.adapter`` and ``inputs.<name>.encoder.adapter``, ``outputs.<name>.projector``,
        ``.retrieval`` and ``.decision`` where there are, and ``outputs.<name>.generator`` (never trained). Inner keys are the
        parameters' names in this module.
        """
        parts: dict[str, dict[str, nn.Parameter]] = {}
        adapters = self.adapters()
        for name, parameter in self.named_parameters():
            part, rest = part_of(name)
            if part in adapters and adapters[part].owns(rest):
                part = f"{part}.adapter"
            parts.setdefault(part, {})[name] = parameter
        return parts

    def adapters(self) -> dict[str, Adapter]:
        """The adapters by the part that each was attached to: ``backbone``, ``inputs.<name>.encoder``."""
        found = {f"inputs.{name}.encoder": cast(Input, module).adapter for name, module in self.inputs.items()}
        found["backbone"] = self.backbone.adapter
        return {part: adapter for part, adapter in found.items() if adapter is not None}

    def encode(self, media: Mapping[str, MediaBatch]) -> dict[str, Tensor]:
        """Backbone embeddings ``(N, Q, D_llm)`` per modality present: one encoder call each."""
        return {name: self.inputs[name](batch.inputs, batch.layouts, batch.cached) for name, batch in media.items()}

    def splice(
        self, ids: Tensor, media: Mapping[str, MediaBatch], encoded: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Token embeddings ``(B, T, D_llm)`` of ``ids (B, T)`` with every media span's embeddings in its place: ``encoded``,
        where they are at hand.

        Fused media are shown to the backbone's blocks instead, for all its passes until the next call.
        """
        embeddings = self.backbone.embed(ids)
        flat = embeddings.flatten(0, 1)
        fusions = {name: fusion for name, one in self.inputs.items() if (fusion := cast(Input, one).fusion) is not None}
        for fusion in fusions.values():
            fusion.look(None)
        for name, found in (self.encode(media) if encoded is None else encoded).items():
            batch = media[name]
            if found.shape[1] != batch.width:
                raise RuntimeError(
                    f"{name}: the projector returned {found.shape[1]} outputs, its config's num_outputs said {batch.width}"
                )
            if batch.fused is not None:
                fusions[name].look(Seen(found, batch.fused, (len(ids), ids.shape[1])))
                continue
            rows = found.flatten(0, 1)[batch.sources].to(flat.dtype)
            flat = flat.index_copy(0, batch.positions, rows)
        return flat.view_as(embeddings)

    def with_codes(self, batch: Batch) -> Batch:
        """``batch`` with the codes of its media in their places, made by the frozen generators."""
        if not batch.codes:
            return batch
        ids = batch.ids.flatten()
        for name, one in batch.codes.items():
            codes = cast(CodeOutput, self.outputs[name]).frozen().encode(one.targets).to(ids.device)
            ids = ids.index_copy(0, one.positions.flatten(), (codes + one.firsts).flatten())
        # What is to be predicted at a position stands behind it.
        return replace(batch, ids=ids.view_as(batch.ids), targets=ids[batch.predict + 1])

    def exact_parts(self) -> list[str]:
        """Parts that compute in float32 whatever the precision of a run: models of codes."""
        exact = {name: output for name, output in self.outputs.items() if isinstance(output, CodeOutput)}
        return [f"outputs.{name}.generator" for name, output in exact.items() if output.generator is not None]

    def forward(self, batch: Batch, objectives: Collection[str] = ("text",)) -> dict[str, Tensor]:
        """The objectives' losses over ``batch``, each a *sum* (float32 scalar) of ``batch.counts[objective]`` terms.

        Sums, not means: the trainer divides by the terms of the whole global batch. ``text`` is the next-token
        cross-entropy of the supervised tokens; an objective that nothing in the batch is for is left out. The backbone runs
        only where an objective needs it.
        """
        rest = [name for name in objectives if name not in (*ALIGNING, *PROMPTING)]
        aligning = any(name in objectives for name in ALIGNING)
        inputs = cast("Mapping[str, Input]", dict(self.inputs.items()))
        # Encoders and projectors run once, whatever is made of what they give.
        seen = {n: inputs[n].features(m.inputs, m.cached) for n, m in batch.media.items()} if aligning or rest else {}
        wanted = seen if "alignment" in objectives or rest else {}
        embeddings = {n: inputs[n].project(*found, batch.media[n].layouts) for n, found in wanted.items()}
        sums: dict[str, Tensor] = {}
        if aligning:
            sums |= align(inputs, batch, seen, embeddings, objectives)
        if any(name in objectives for name in PROMPTING):
            sums |= prompt(inputs, self.backbone, batch, objectives)
        return sums | self._answered(batch, embeddings, rest) if rest else sums

    def _answered(self, batch: Batch, encoded: Mapping[str, Tensor], objectives: Collection[str]) -> dict[str, Tensor]:
        """The losses of the objectives that are about what the backbone says and makes; ``encoded`` are the media."""
        batch = self.with_codes(batch)
        embeddings = self.splice(batch.ids, batch.media, encoded)
        made = batch.made if any(name != "text" for name in objectives) else {}
        states_at = torch.cat([m.positions.flatten() for m in made.values()]) if made else None
        out = self.backbone(
            embeddings,
            batch.attention_mask,
            positions=batch.predict,
            states_at=states_at,
            replies=batch.replies,
            lengths=batch.lengths,
            targets=batch.targets if "text" in objectives else None,
        )
        sums: dict[str, Tensor] = {}
        if out.loss is not None:
            sums["text"] = out.loss
        signals: dict[str, Tensor] = {}
        if states_at is not None and out.states is not None:
            flat = out.states + embeddings.flatten(0, 1)[states_at]
            pieces = torch.split(flat, [one.positions.numel() for one in made.values()])
            for (name, one), piece in zip(made.items(), pieces, strict=True):
                signals[name] = piece.view(*one.positions.shape, -1)
                for objective, loss in cast(Output, self.outputs[name]).losses(signals[name], one, objectives).items():
                    sums[objective] = sums.get(objective, 0.0) + loss
        if "contrastive" in objectives:
            # The zero is for a batch without media: all that a process trains must take part in its backward.
            sums |= self._contrastive(signals, made, out.logits[:1].float().sum() * 0.0)
        # Ranks must agree on what takes part in backward: a batch without anything to learn from gives a zero.
        sums = sums or {name: out.logits.float().sum() * 0.0 for name in objectives}
        # Behind the backbone, not in front: a frozen one then keeps a graph only where media or tokens need it.
        zero = self._zero(batch)
        return {name: loss + zero for name, loss in sums.items()}

    def embed_media(self, name: str, inputs: dict[str, Tensor]) -> Tensor:
        """Unit vectors ``(N, dim)`` of N media in the retrieval space of output ``name``; ``inputs`` are its encoder's."""
        output = self.outputs[name]
        if not isinstance(output, Output) or output.retrieval is None:
            raise MmllmError(
                f"output {name!r} has no retrieval heads; set model.outputs.{name}.retrieval and train them"
            )
        return output.retrieval.embed_media(*cast(Input, self.inputs[name]).features(inputs))

    def _contrastive(
        self, signals: Mapping[str, Tensor], made: Mapping[str, MadeBatch], zero: Tensor
    ) -> dict[str, Tensor]:
        """The summed loss of retrieval, plus ``zero``. Every process goes through every output, also without media: they
        exchange them.
        """
        losses = [zero]
        for name, module in self.outputs.items():
            heads = module.retrieval if isinstance(module, Output) else None
            if heads is None:
                continue
            text = media = next(heads.parameters()).new_zeros(0, heads.text.out_features, dtype=torch.float32)
            if name in made and made[name].seen is not None:
                text = heads.embed_signals(signals[name][made[name].shown])
                media = self.embed_media(name, cast("dict[str, Tensor]", made[name].seen))
            losses.append(heads.loss(text, media))
        return {"contrastive": torch.stack(losses).sum()}

    def _zero(self, batch: Batch) -> Tensor | float:
        """Zero, with a graph to the trainable parameters of modalities that this batch lacks.

        A rank without pictures thus still produces (zero) gradients for the picture projector, and gradient reduction
        over ranks does not wait for ever. A text-only batch in a projector-only stage can run backward for the same reason.
        """
        # Whether an output takes part depends on its captions and targets too, so outputs are always among them.
        absent = [m for name, m in self.inputs.items() if name not in batch.media] + [*self.outputs.values()]
        return zero_of([*absent, *([self.backbone.new_tokens] if self.backbone.new_tokens is not None else [])])


def fuse(config: FusionConfig, context: BuildContext, backbone: Backbone, media_dim: int) -> Fusion:
    """The fusion, put into ``backbone``. Raises ``ConfigError`` for one without blocks that it could sit between."""
    blocks = find_blocks(backbone.model)
    if not (backbone.one_stream and blocks):
        text = f"works between the blocks of a decoder-only backbone that masks padding, not in {type(backbone).__name__}'s"
        raise ConfigError([("", f"{text}; leave it out, so that media are read among the tokens")])
    fusion = config.build(context, hidden_dim=blocks[0].width, media_dim=media_dim, num_layers=len(blocks))
    fusion.attach([block.module for block in blocks])
    return fusion
