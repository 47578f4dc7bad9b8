"""The objectives by which an input learns from text: a projector from captions, and P-Former from sentences."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.backbones.base import Backbone
from mmllm.config.run import ALIGNING, PROMPTING
from mmllm.projectors.gather import several
from mmllm.projectors.p_former import squared
from mmllm.projectors.qformer_module import QFormerProjector

if TYPE_CHECKING:
    from mmllm.model import Input
    from mmllm.processing.batch import Batch

Seen = Mapping[str, tuple[Tensor, Tensor]]  # encoders' features (N, S, D) and masks (N, S), by input


def zero_of(modules: Iterable[nn.Module]) -> Tensor | float:
    """Zero, with a graph to the trainable parameters of ``modules``."""
    return sum(((p * 0.0).sum() for module in modules for p in module.parameters() if p.requires_grad), 0.0)


def align(
    inputs: Mapping[str, Input], batch: Batch, seen: Seen, embeddings: Mapping[str, Tensor], objectives: Collection[str]
) -> dict[str, Tensor]:
    """The summed losses of the objectives ``ALIGNING`` between media and their captions, float32 scalars.

    ``seen`` are the features of the batch's media, ``embeddings (N, Q, D_llm)`` their projectors' outputs, needed for
    ``alignment``. Every process goes through every input, also without media: some objectives exchange them.
    """
    zero = torch.zeros((), device=batch.ids.device)
    sums = {str(name): zero for name in ALIGNING if name in objectives}
    for name, one in inputs.items():
        losses: dict[str, Tensor] = {}
        told = batch.prompted.get(name) if "alignment" in objectives else None
        captioned = one.alignment is not None and name in batch.captions
        if told is None and not captioned:
            sums = {objective: loss + zero_of([one]) for objective, loss in sums.items()}
        if one.alignment is not None:
            losses = _from_captions(one, batch, name, seen, objectives)
        if told is not None and one.prompt is not None:
            training = one.prompt.training
            with torch.no_grad():
                wanted = one.prompt.eval().prompt(one.prompt.read(told.ids, told.real))
            one.prompt.train(training)
            losses["alignment"] = squared(embeddings[name][told.items], wanted)
        sums |= {objective: sums[objective] + loss for objective, loss in losses.items()}
    return sums


def _from_captions(one: Input, batch: Batch, name: str, seen: Seen, objectives: Collection[str]) -> dict[str, Tensor]:
    """BLIP-2's first stage for one input."""
    if one.alignment is None or not any(objective in objectives for objective in ("itc", "itm", "itg")):
        return {}
    projector, device = cast(QFormerProjector, one.projector), batch.ids.device
    if name not in batch.captions:
        if not several():
            return {}
        learns = any(p.requires_grad for p in one.encoder.parameters())
        features = torch.zeros(0, 1, one.encoder.output_dim, device=device, requires_grad=learns)
        none = torch.zeros(0, 1, dtype=torch.int64, device=device)
        return one.alignment.losses(projector, features, none.bool(), none, none.bool(), objectives)
    captions, (features, mask) = batch.captions[name], seen[name]
    own = captions.items
    return one.alignment.losses(projector, features[own], mask[own], captions.ids, captions.real, objectives)


def prompt(
    inputs: Mapping[str, Input], backbone: Backbone, batch: Batch, objectives: Collection[str]
) -> dict[str, Tensor]:
    """The summed losses of the objectives ``PROMPTING``, by which P-Former learns from the replies of a batch."""
    zero = torch.zeros((), device=batch.ids.device)
    sums: dict[str, Tensor] = {name: zero for name in PROMPTING if name in objectives}
    for name, one in inputs.items():
        if one.prompt is None:
            continue
        if name in batch.sentences:
            told = batch.sentences[name]
            state = one.prompt.read(one.prompt.hidden(told.ids, told.real, told.unknown), told.real)
        else:
            sums = {objective: loss + zero_of([one.prompt]) for objective, loss in sums.items()}
            state = zero.new_zeros(0, one.prompt.spread.in_features)
        prompts = one.prompt.prompt(state)
        losses = one.prompt.losses(state, prompts, backbone.tables()[0], objectives)
        if "reconstruction" in objectives and name in batch.sentences:
            losses["reconstruction"] = _reconstruction(backbone, batch, prompts, batch.sentences[name].items)
        elif "reconstruction" in objectives and several():
            # Where weights are shared out the backbone's are gathered by all processes or by none.
            token = backbone.embed(batch.ids[:1, :1]) + zero_of([one.prompt])
            losses["reconstruction"] = backbone(token, positions=batch.ids.new_zeros(1)).logits.float().sum() * 0.0
        sums |= {objective: sums[objective] + loss for objective, loss in losses.items()}
    return sums


def _reconstruction(backbone: Backbone, batch: Batch, prompts: Tensor, rows: Tensor) -> Tensor:
    """The summed cross-entropy of the supervised tokens of ``rows`` of the batch, each row's behind its prompt alone."""
    width, count = batch.ids.shape[1], prompts.shape[1]
    owner = batch.predict // width
    lengths = torch.bincount(owner, minlength=len(batch.ids))[rows]
    places = torch.arange(int(lengths.max()), device=rows.device)
    real = places < lengths[:, None]
    tokens = torch.zeros_like(real, dtype=torch.int64)
    tokens[real] = batch.targets[torch.isin(owner, rows)]
    embedded = backbone.embed(tokens[:, :-1])
    embeddings = torch.cat([prompts.to(embedded.dtype), embedded], dim=1)
    attention = F.pad(real[:, :-1], (count, 0), value=True).long()
    asked = F.pad(real, (count - 1, 0), value=False).flatten().nonzero().flatten()
    logits = backbone(embeddings, attention, positions=asked).logits
    return F.cross_entropy(logits.float(), tokens[real], reduction="sum")
