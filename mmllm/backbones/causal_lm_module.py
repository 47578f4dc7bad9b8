"""A transformers causal LM behind the backbone contract."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from mmllm.backbones.base import BackboneOutput
from mmllm.backbones.language_model_module import LanguageModel
from mmllm.backbones.packing import PACKED, as_mask, register
from mmllm.backbones.reading_module import Reading, RowReading
from mmllm.backbones.trimming import last_layer, trim
from mmllm.config.families import AdapterConfig
from mmllm.errors import MmllmError


def restarted(lengths: Tensor, device: torch.device) -> Tensor:
    """Position ids ``(1, T)`` of sequences of ``lengths (S,)`` in one row: each begins at 0."""
    return torch.cat([torch.arange(length) for length in lengths.tolist()]).to(device, non_blocking=True)[None]


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

    def start_packing(self, instead_of: Sequence[str] = ("sdpa",)) -> bool:
        config = self._language_model().config
        if config._attn_implementation == PACKED:
            return True
        # What a prefix adds in front of a row belongs in front of each of its sequences. Compiled layers would be compiled
        # again for every number of sequences.
        prefixed = self.adapter is not None and self.adapter.positions > 0
        before = config._attn_implementation
        if before not in instead_of or not self._positions or prefixed or self._compiled:
            return False
        register()
        self._language_model().set_attn_implementation(PACKED)
        if config._attn_implementation != PACKED:  # a family with attention of its own (Falcon) only warns
            return False
        lengths = torch.tensor([3, 5])
        try:
            if self._equal(
                lambda x: self(x, lengths=lengths).logits,
                lambda x: torch.cat([self(piece).logits for piece in torch.split(x, [3, 5], dim=1)], dim=1),
                lambda x: self(x).logits,
            ):
                return True
        except ValueError:  # what transformers' sdpa cannot do for a family that is eager by nature (a soft cap)
            pass
        self._language_model().set_attn_implementation(before)
        return False

    def take_short_cuts(self) -> list[str]:
        taken = {"last layer trimmed": self._trim_last_layer(), "loss in pieces": self._lose_in_pieces()}
        return [name for name, works in taken.items() if works]

    def _lose_in_pieces(self) -> bool:
        """Compute head and loss a few rows at a time, where nothing stands between the head and the logits."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if type(head) is not torch.nn.Linear:
            return False
        everywhere = torch.arange(8, device=head.weight.device)

        def steep(compute: Callable[[], Tensor]) -> Tensor:
            """With a head whose logits are far apart, as a trained one's may be: a cap on them has no effect on small ones."""
            handle = head.register_forward_pre_hook(lambda _, args: (args[0] * 1e3,))
            try:
                return compute()
            finally:
                handle.remove()

        self._in_pieces = self._equal(
            lambda x: steep(lambda: head(cast(Tensor, self(x, states_at=everywhere).states)[None])),
            lambda x: steep(lambda: self(x).logits[..., : self.vocab_rows]),
            lambda x: steep(lambda: self(x).logits[..., : self.vocab_rows].roll(1, dims=1)),
        )
        return self._in_pieces

    def _trim_last_layer(self) -> bool:
        """Compute the last layer only at the positions asked for. False where the model has no such layer."""
        layer = last_layer(self.model)
        if layer is None or self._trimmed or self._compiled:
            return self._trimmed
        trim(layer)
        self._trimmed, wanted = True, torch.tensor([2, 4, 5], device=self.tables()[0].device)
        try:
            self._trimmed = self._equal(
                lambda x: self(x, positions=wanted).logits,
                lambda x: self(x).logits[0, wanted],
                lambda x: self(x).logits[0, wanted - 1],
            )
        except TypeError:  # a model that hands nothing on to its layers
            self._trimmed = False
        return self._trimmed

    def _language_model(self) -> Any:
        """The transformers model, without what an adapter wraps it in."""
        from transformers import PreTrainedModel

        return next(module for module in self.model.modules() if isinstance(module, PreTrainedModel))

    def keep_rows(self, cache: Any, rows: Tensor) -> None:
        if isinstance(cache, RecurrentStates):
            cache.rows = [cache.rows[row] for row in rows.tolist()]
        else:
            cache.reorder_cache(rows)

    @cached_property
    def _full_layers(self) -> int:
        """How many layers keep keys and values of all that was read; 0 where anything else is kept as well."""
        prefixed = self.adapter is not None and self.adapter.positions > 0
        if self._memory != "past_key_values" or not self._positions or prefixed:
            return 0
        layers = self.new_cache().layers
        return len(layers) if {type(layer).__name__ for layer in layers} == {"DynamicLayer"} else 0

    def reads_rows(self, lengths: Sequence[int]) -> bool:
        # Others would not take a mask of four axes, or need one where there is nothing to hide.
        known = self._language_model().config._attn_implementation in ("sdpa", PACKED)
        return known and self._full_layers > 0 and (len(set(lengths)) == 1 or self.start_packing())

    def row_reading(self, lengths: Sequence[int]) -> Reading:
        return RowReading(self, lengths, self._full_layers)

    @torch.no_grad()
    def _equal(
        self,
        fast: Callable[[Tensor], Tensor],
        plain: Callable[[Tensor], Tensor],
        wrong: Callable[[Tensor], Tensor],
    ) -> bool:
        """Whether a short cut gives what the plain way does, tried out on this very model with eight tokens. ``wrong`` is what
        it could give instead.

        Families differ in where positions come from, in what their layers add up, and in whether they look at neighbours
        by other means than attention.
        """
        table = self.tables()[0]
        if table.is_meta:  # a plan's, of which nothing can be known but its sizes
            return True
        modes = {module: module.training for module in self.modules()}
        self.eval()
        half = table.dtype in (torch.float16, torch.bfloat16)
        try:
            with torch.autocast(table.device.type, table.dtype if half else None, enabled=half):
                embedded = self.embed(torch.arange(8, device=table.device) % self.vocab_rows)[None]
                found, expected, other = fast(embedded), plain(embedded), wrong(embedded)
        finally:
            for module, mode in modes.items():
                module.training = mode
        # In half precision rounding differs: by far less than where something is wrong.
        tolerance = 0.1 * (other - expected).abs().max() if half else 1e-4 * expected.abs().max()
        return bool((found - expected).abs().max() <= tolerance)

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
        lengths: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> BackboneOutput:
        if lengths is not None:
            if not self.start_packing():
                raise MmllmError("this backbone cannot keep the sequences of one row apart; give it a padded batch")
            attention_mask, position_ids = as_mask(lengths), restarted(lengths, inputs_embeds.device)
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
        _, found = self._run(
            positions, states_at, targets, inputs_embeds=inputs_embeds, use_cache=cache is not None, **arguments
        )
        return found if positions is None else found._replace(logits=found.logits[0])

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
            out, found = self._run(everywhere, everywhere, None, inputs_embeds=given, use_cache=True, state=state)
            kept.append(out.state)
            logits[row, seen] = found.logits[0].to(logits.dtype)
            states[row, seen] = cast(Tensor, found.states).to(states.dtype)
        cache.rows = kept
        return BackboneOutput(
            logits if positions is None else logits.flatten(0, 1)[positions],
            None if states_at is None else states.flatten(0, 1)[states_at],
        )
