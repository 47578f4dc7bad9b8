"""P-Former (arXiv 2307.07063): the prompt that would make a frozen language model say a text, learned from text alone."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.config.alignment import PFormerConfig
from mmllm.config.base import BuildContext
from mmllm.pretrained import load_into
from mmllm.projectors.gather import gathered
from mmllm.projectors.qformer_module import bert_tensors, check_taken


class PFormer(nn.Module):
    """Texts ``ids (N, L)``, of which ``real (N, L)`` are not padding, to prompts ``(N, num_outputs, output_dim)``.

    From BLIText (``lavis/models/blip2_models/pformer_opt.py``): the state of BERT's class token goes through a linear layer to
    ``num_outputs`` states, then each of these through a layer with tanh and a linear layer to the backbone's width.
    """

    def __init__(self, config: PFormerConfig, num_outputs: int, output_dim: int) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        width = config.hidden_dim
        numbers = BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.ff_mult * width,
            max_position_embeddings=config.max_positions,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
        )
        self.bert = BertModel(numbers, add_pooling_layer=False)
        self.spread = nn.Linear(width, num_outputs * width)
        self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.language_projection = nn.Linear(width, output_dim)
        self.text_projection = nn.Linear(width, config.dim)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.mask, self.label_smoothing, self.num_outputs = config.mask, config.label_smoothing, num_outputs

    def read(self, ids: Tensor, real: Tensor) -> Tensor:
        """The states ``(N, hidden_dim)`` of the class token."""
        state: Tensor = self.bert(input_ids=ids, attention_mask=real.long()).last_hidden_state[:, 0]
        return state

    def prompt(self, state: Tensor) -> Tensor:
        """Prompts ``(N, num_outputs, output_dim)`` from ``state (N, hidden_dim)``."""
        spread = self.spread(state).view(len(state), self.num_outputs, state.shape[1])
        prompts: Tensor = self.language_projection(self.pooler(spread))
        return prompts

    def hidden(self, ids: Tensor, real: Tensor, unknown: int) -> Tensor:
        """``ids`` with the share ``mask`` of real tokens but the first replaced by ``unknown``, the mask token.

        Drawn from torch's state in training, and the same every time in evaluation.
        """
        draws = None if self.training else torch.Generator(ids.device).manual_seed(0)
        chosen = torch.rand(ids.shape, generator=draws, device=ids.device) < self.mask
        chosen[:, 0] = False
        return ids.masked_fill(chosen & real, unknown)

    def losses(self, state: Tensor, prompts: Tensor, table: Tensor, objectives: Collection[str]) -> dict[str, Tensor]:
        """Sums of N terms, float32 scalars: ``self_contrastive`` and ``quantization`` of texts with these class ``state`` and
        ``prompts``; ``table (V, output_dim)`` are the backbone's embeddings.

        Every process must call this for ``self_contrastive``, also with N = 0.
        """
        sums: dict[str, Tensor] = {}
        if "self_contrastive" in objectives:
            text = F.normalize(self.text_projection(state).float(), dim=-1)
            first, everyone = gathered(text) if self.training else (0, text)
            with torch.autocast(text.device.type, enabled=False):
                logits = text @ everyone.T / self.temperature
            own = first + torch.arange(len(text), device=text.device)
            sums["self_contrastive"] = logits.sum() * 0.0
            if len(text):
                smooth = self.label_smoothing
                sums["self_contrastive"] = F.cross_entropy(logits, own, label_smoothing=smooth, reduction="sum")
        if "quantization" in objectives:
            sums["quantization"] = squared(prompts, nearest(prompts.detach(), table))
        return sums


def squared(found: Tensor, wanted: Tensor) -> Tensor:
    """The sum over N of the mean squared error of ``found (N, Q, D)``; gradients go to it alone. Float32."""
    return (found.float() - wanted.detach().float()).square().mean(dim=(1, 2)).sum()


@torch.no_grad()
def nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """For each of ``vectors (…, D)`` the nearest row of ``table (V, D)``, by Euclidean distance."""
    with torch.autocast(vectors.device.type, enabled=False):
        rows = table.float()
        distances = rows.square().sum(dim=1) - 2 * vectors.float().flatten(0, -2) @ rows.T
    return table[distances.argmin(dim=1)].view_as(vectors)


def make_p_former(config: PFormerConfig, context: BuildContext, num_outputs: int, output_dim: int) -> PFormer:
    """Raises ``CheckpointError`` when the BERT to start from has other numbers."""
    former = PFormer(config, num_outputs, output_dim)
    if config.bert is not None and context.weights:
        reference = context.resolve(config.bert)
        found, own = bert_tensors(reference), former.bert.state_dict()
        check_taken({name: name for name in own}, found, reference)
        load_into(former.bert, found, reference)
    return former.to(context.dtype)
