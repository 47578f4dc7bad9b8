"""What transformers' language models have in common behind the backbone contract: tables, new tokens, the head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmllm.backbones.base import Backbone, BackboneOutput, NewTokens
from mmllm.backbones.linear_cross_entropy import linear_cross_entropy
from mmllm.backbones.trimming import ASKED
from mmllm.errors import CheckpointError, ConfigError, brief

if TYPE_CHECKING:
    from mmllm.backbones.causal_lm import LanguageModelConfig
    from mmllm.config.base import BuildContext
    from mmllm.config.families import AdapterConfig


def load_language_model(config: LanguageModelConfig, context: BuildContext) -> Any:
    """The transformers model: with its weights (safetensors only), or at random values when ``context.weights`` is false."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a second progress display beside ours, and noise in a command's output
    hf_config = config.hf_config(context)
    auto: Any = {"causal LM": AutoModelForCausalLM, "sequence-to-sequence LM": AutoModelForSeq2SeqLM}[config.task]
    options: dict[str, Any] = {"trust_remote_code": context.trust_remote_code}
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    if config.pretrained is None or not context.weights:
        try:
            model = auto.from_config(hf_config, dtype=context.dtype or torch.float32, **options)
        except REFUSALS as error:
            raise _refusal(error) from error
    else:
        path = context.resolve(config.pretrained)
        if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
            raise CheckpointError(
                f"backbone {path}: no .safetensors file in the folder; pickled weights are refused, convert them first"
            )
        try:
            model = auto.from_pretrained(
                path, config=hf_config, revision=config.revision, dtype=context.dtype, use_safetensors=True, **options
            )
        except torch.OutOfMemoryError:
            raise
        except OSError as error:
            raise CheckpointError(f"cannot read the weights of {config.pretrained}: {brief(error)}") from error
        except (SafetensorError, *REFUSALS) as error:
            if "ttention" in str(error):
                raise _refusal(error) from error
            raise CheckpointError(f"{config.pretrained} does not fit its config: {brief(error)}") from error
    model.config.use_cache = False
    return model


# With these transformers and torch refuse numbers that do not fit together.
REFUSALS = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, ImportError, RuntimeError)


def _refusal(error: Exception) -> ConfigError:
    """The mistake behind an error of transformers: an attention that the model does not have, or sizes."""
    asked = "attention implementation" in str(error) or "lash" in str(error)
    path, advice = ("attention", "; leave it out") if asked else ("architecture", "")
    return ConfigError([(path, f"transformers refuses it: {brief(error, 200)}{advice}")])


class LanguageModel(Backbone):
    """``model`` is the transformers model, wrapped by peft for some adapters."""

    def __init__(
        self,
        model: Any,
        adapter: AdapterConfig | None,
        num_new_tokens: int = 0,
        num_signals: int = 0,
        tie_signals: bool = False,
    ) -> None:
        super().__init__()
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        self.vocab_rows, self.hidden_dim = table.shape
        if tie_signals and head.weight is not table:
            raise ConfigError([("tie_signals", "this model's embeddings and head are not tied; leave it out")])
        self.new_tokens, self.num_signals = None, num_signals
        if num_new_tokens:
            self.new_tokens = NewTokens(table, num_new_tokens, head.weight, num_signals, tie_signals)
        self._asked, self._trimmed, self._compiled, self._in_pieces = Asked(), False, False, False
        # A hook on the head's input does it for every architecture alike: what a model adds after its head (scaling,
        # soft-capping) acts on each logit alone and so stays exact.
        head.register_forward_pre_hook(self._select)
        self.adapter = None if adapter is None else adapter.attach(model)
        self.model = model if self.adapter is None else self.adapter.model

    def _select(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Let the head see only the asked positions, and keep the hidden states that were asked for."""
        asked, hidden = self._asked, args[0]
        flat = hidden.reshape(-1, hidden.shape[-1])
        if asked.kept is not None and asked.positions is not None and len(flat) == len(asked.kept):
            # A trimmed layer has left the rows at `positions`, and behind them those at `states_at`.
            here, also = torch.split(flat, [len(asked.positions), len(flat) - len(asked.positions)])
            asked.seen, asked.states = here[None], None if asked.states_at is None else also
        else:
            asked.seen = hidden if asked.positions is None else flat[asked.positions][None]
            asked.states = None if asked.states_at is None else flat[asked.states_at]
        return (asked.seen[:, :1] if asked.targets is not None else asked.seen, *args[1:])

    def embed(self, ids: Tensor) -> Tensor:
        is_new = ids >= self.vocab_rows
        old: Tensor = self.model.get_input_embeddings()(ids.masked_fill(is_new, 0))  # type: ignore[operator]
        if self.new_tokens is None:
            return old
        # Placeholders have no row: media embeddings take their places, so any row may stand there meanwhile.
        rows = (ids - self.vocab_rows).clamp(0, self.new_tokens.weight.shape[0] - 1)
        new = nn.functional.embedding(rows, self.new_tokens.weight)
        return torch.where(is_new[..., None], new.to(old.dtype), old)

    def compile_layers(self) -> None:
        from transformers import PreTrainedModel

        self._compiled = True
        models = [module for module in self.modules() if isinstance(module, PreTrainedModel)]
        layers = {name for model in models for name in model._no_split_modules or ()}
        for module in self.modules():
            if type(module).__name__ in layers:
                module.compile(dynamic=True)

    def tables(self) -> tuple[Tensor, Tensor]:
        embeddings, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()  # type: ignore[operator]
        return embeddings.weight, head.weight

    def _run(
        self, positions: Tensor | None, states_at: Tensor | None, targets: Tensor | None, **arguments: Any
    ) -> tuple[Any, BackboneOutput]:
        """One pass of ``model`` with the head at ``positions`` only: its output, and what the contract's ``forward`` gives of it,
        logits ``(1, K, V)`` there.
        """
        # Sharded weights are whole only inside their own modules; float16 needs the loss's scale before any gradient.
        device = self.tables()[1].device.type
        scaled = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        pieces = self._in_pieces and self.quick and not scaled and not isinstance(self.tables()[1], DTensor)
        self._asked = asked = Asked(positions, states_at, targets if pieces else None)
        if self._trimmed and self.quick and positions is not None and arguments["inputs_embeds"].shape[1] > 1:
            wanted = torch.cat([positions, *([] if states_at is None else [states_at])])
            if len(wanted) < arguments["inputs_embeds"].shape[:2].numel():
                asked.kept = arguments[ASKED] = wanted
        try:
            out = self.model(**arguments)
        finally:
            self._asked = Asked()
        logits, loss = self._with_signals(out.logits, asked), None
        if asked.targets is not None and asked.seen is not None:
            head, rows = self.model.get_output_embeddings(), self.new_tokens  # type: ignore[operator]
            signals = rows.signal_head() if rows is not None and self.num_signals else None
            loss = linear_cross_entropy(asked.seen[0], head.weight, head.bias, signals, asked.targets)
        elif targets is not None:
            loss = nn.functional.cross_entropy(logits[0].float(), targets, reduction="sum")
        return out, BackboneOutput(logits, asked.states, loss)

    def _with_signals(self, logits: Tensor, asked: Asked) -> Tensor:
        """``logits (…, vocab_rows)`` with those of the signal tokens behind them."""
        if self.new_tokens is None or not self.num_signals or asked.seen is None:
            return logits
        head = self.new_tokens.signal_head()
        signals = nn.functional.linear(asked.seen[..., : logits.shape[-2], :].to(head.dtype), head)
        return torch.cat([logits, signals.to(logits.dtype)], dim=-1)


@dataclass
class Asked:
    """What one forward pass is asked for, and what the head's hook found."""

    positions: Tensor | None = None
    states_at: Tensor | None = None
    targets: Tensor | None = None  # of positions whose loss is computed in pieces: the head sees the first one alone
    kept: Tensor | None = None  # positions to which the last layer may be trimmed, fewer than there are
    seen: Tensor | None = None
    states: Tensor | None = None
