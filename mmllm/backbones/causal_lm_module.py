"""A transformers causal LM behind the backbone contract."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from mmllm.backbones.base import BackboneOutput
from mmllm.backbones.language_model_module import LanguageModel
from mmllm.config.families import AdapterConfig


@dataclass
class RecurrentStates:
    """What a model without transformers' cache has read, row by row: its tensors ``(1, D, layers)``; none before the first
    pass.
    """

    rows: list[list[Tensor]] = field(default_factory=list)


class CausalLM(LanguageModel):
    """A decoder-only model. What it keeps of what it has read is handed to it as its own forward calls that: keys and
    values (``past_key_values``), the states of a state-space model (``cache_params``), or a list of tensors (``state``,
    RWKV).
    """

    def __init__(
        self,
        model: Any,
        adapter: AdapterConfig | None,
        num_new_tokens: int = 0,
        num_signals: int = 0,
        tie_signals: bool = False,
    ) -> None:
        taken = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in taken
        self._memory = next(name for name in ("past_key_values", "cache_params", "state") if name in taken)
        self.one_stream = self._memory != "state"  # without a mask rows are read one by one
        super().__init__(model, adapter, num_new_tokens, num_signals, tie_signals)

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return RecurrentStates() if self._memory == "state" else DynamicCache(config=self.model.config)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        positions: Tensor | None = None,
        states_at: Tensor | None = None,
        cache: Any = None,
        replies: Tensor | None = None,
    ) -> BackboneOutput:
        arguments: dict[str, Any] = {"position_ids": position_ids} if self._positions else {}
        match self._memory:
            case "past_key_values":
                arguments |= {"past_key_values": cache, "attention_mask": attention_mask}
            case "cache_params":  # padding is told of what is read now, not of what was
                own = None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]
                arguments |= {"cache_params": cache, "attention_mask": own}
            case _:  # has no mask: padding behind a sequence does no harm, before it the state would take it up
                if cache is not None:
                    return self._row_by_row(inputs_embeds, attention_mask, positions, states_at, cache)
        out, asked = self._run(
            positions, states_at, inputs_embeds=inputs_embeds, use_cache=cache is not None, **arguments
        )
        logits = self.with_signals(out.logits, asked)
        return BackboneOutput(logits if positions is None else logits[0], asked.states)

    def _row_by_row(
        self,
        inputs_embeds: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        states_at: Tensor | None,
        cache: RecurrentStates,
    ) -> BackboneOutput:
        """A pass with memory, each row without its padding. What stands at padding is zero.

        Also where no row is padded: transformers' RWKV mixes the rows of a batch up as soon as there is a state.
        """
        rows, width, dim = inputs_embeds.shape
        real = inputs_embeds.new_ones(rows, width) if mask is None else mask[:, -width:]
        logits = inputs_embeds.new_zeros(rows, width, self.vocab_rows + self.num_signals)
        states, kept = inputs_embeds.new_zeros(rows, width, dim), list[list[Tensor]]()
        for row, seen in enumerate(real.bool()):
            given = inputs_embeds[row, seen][None]
            everywhere = torch.arange(given.shape[1], device=given.device)
            state = cache.rows[row] if cache.rows else None
            out, asked = self._run(everywhere, everywhere, inputs_embeds=given, use_cache=True, state=state)
            kept.append(out.state)
            logits[row, seen] = self.with_signals(out.logits, asked)[0].to(logits.dtype)
            states[row, seen] = cast(Tensor, asked.states).to(states.dtype)
        cache.rows = kept
        return BackboneOutput(
            logits if positions is None else logits.flatten(0, 1)[positions],
            None if states_at is None else states.flatten(0, 1)[states_at],
        )
