"""The contract of a backbone's module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mmllm.backbones.layout_module import quicken
from mmllm.backbones.reading_module import PaddedReading, Reading

if TYPE_CHECKING:
    from mmllm.adapters.base import Adapter


class NewTokens(nn.Module):
    """Rows of mmllm's own tokens, beside the backbone's frozen tables.

    ``weight (n, D_llm)`` are embeddings. The first tokens, the signal tokens, can be written as well: ``head
    (num_signals, D_llm)`` gives their logits, and is absent without them, or when they are ``tied``: then their
    embeddings do.
    """

    def __init__(
        self, table: Tensor, count: int, head: Tensor | None = None, num_signals: int = 0, tied: bool = False
    ) -> None:
        super().__init__()
        self.num_signals = num_signals
        self.weight = nn.Parameter(_fresh_rows(table, count))
        self.register_parameter("head", None)
        if num_signals and not tied:
            self.head = nn.Parameter(_fresh_rows(table if head is None else head, num_signals))

    def signal_head(self) -> Tensor:
        """The rows ``(num_signals, D_llm)`` that give the signal tokens' logits."""
        return self.weight[: self.num_signals] if self.head is None else self.head

    def keep_norms(self, table: Tensor, head: Tensor) -> None:
        """Scale every row to the mean norm of its table (GILL, arXiv 2305.17216, ``main.py``): call after each step."""
        with torch.no_grad():
            for rows, old in ((self.weight, table), (self.head, head)):
                if rows is not None:
                    scale = old.detach().float().norm(dim=1).mean()
                    rows.mul_(scale / rows.norm(dim=1, keepdim=True).clamp(min=1e-12))


def _fresh_rows(table: Tensor, count: int) -> Tensor:
    # Rows start as the mean of the table plus noise of its spread (Hewitt 2021, "Initializing new word embeddings"),
    # which keeps their norm at the table's scale. They train, so they are kept in float32.
    table = table.detach().float()
    std, mean = torch.std_mean(table, dim=0)
    return mean + std * torch.randn(count, table.shape[1], device=table.device)


class BackboneOutput(NamedTuple):
    """``logits``, and the last hidden ``states (K', D_llm)`` at the positions asked for (None when none were).

    With ``targets``, ``loss`` is their summed cross-entropy, a float32 scalar, and ``logits`` may be those of the first
    position alone.
    """

    logits: Tensor
    states: Tensor | None
    loss: Tensor | None = None


class Backbone(nn.Module):
    """A language model that takes embeddings. ``hidden_dim`` is D_llm, ``vocab_rows`` the size of its own table.

    ``model`` is the (possibly adapter-wrapped) transformers model; ``new_tokens`` holds the rows of mmllm's own tokens,
    or is None when there are none, and ``adapter`` is what was attached to ``model``.
    """

    hidden_dim: int
    vocab_rows: int
    model: nn.Module
    new_tokens: NewTokens | None
    adapter: Adapter | None
    # Whether every block reads hidden states at the positions that it is given, (B, T, D), so that others can act there.
    one_stream: bool = True
    # Whether the short cuts that were found are taken.
    quick: bool = True

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings ``(..., D_llm)`` of int64 ids ``(...)``; ids from ``vocab_rows`` on are new tokens."""

    @abstractmethod
    def tables(self) -> tuple[Tensor, Tensor]:
        """The frozen embedding table and head, ``(vocab_rows, D_llm)`` each; one tensor twice where they are tied."""

    @abstractmethod
    def compile_layers(self) -> None:
        """Compile the repeated layers in place, for batches of any shape; the names of the parameters stay."""

    def start_packing(self, instead_of: Sequence[str] = ("sdpa",)) -> bool:
        """Let ``forward`` take rows of several sequences from now on. False where the model has no way to keep them apart, or
        computes attention otherwise than ``instead_of`` says."""
        return False

    def take_short_cuts(self) -> list[str]:
        """Compute from now on only what is asked for, where this model gives the same then; what that is, in words."""
        return []

    def quicken(self, *others: nn.Module) -> int:
        """Let the linear layers of this model and of ``others``, from now on only used, compute faster; how many can."""
        return quicken(self, *others)

    @abstractmethod
    def new_cache(self) -> Any:
        """An empty memory for ``forward``, for one batch that is decoded step by step."""

    @abstractmethod
    def keep_rows(self, cache: Any, rows: Tensor) -> None:
        """Let ``cache``, which holds a batch, hold its ``rows`` alone (int64, rising), in place."""

    def reads_rows(self, lengths: Sequence[int]) -> bool:
        """Whether ``row_reading`` takes prompts of these lengths; else they are padded."""
        return False

    def row_reading(self, lengths: Sequence[int]) -> Reading:
        """How prompts of ``lengths`` are read that ``reads_rows`` said yes to."""
        raise NotImplementedError

    def reading(self, attention: Tensor) -> Reading:
        """How prompts are read that are padded in front; ``attention (B, T)`` says what is real."""
        return PaddedReading(self, attention)

    @abstractmethod
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
        """Logits from ``inputs_embeds (B, T, D_llm)``.

        ``positions`` (int64, K) are flat indices into B*T: the head runs there only and the logits are ``(K, V)``;
        without it they are ``(B, T, V)``. V is ``vocab_rows`` plus the number of signal tokens. ``states_at`` (int64, K')
        are flat indices of which the head's own input is returned as well. ``attention_mask (B, T_total)`` and
        ``position_ids (B, T)`` as in transformers; ``cache`` comes from ``new_cache`` and is filled in place.

        ``replies`` (int64, (R, 3)) are the assistant's replies, which do not overlap: row, first position and the position
        behind the last one. A decoder-only model needs no such thing; an encoder-decoder reads what stands before a
        reply with its encoder and the reply with its decoder, so what is asked must lie in a reply or right before it
        (the position that predicts its first token). Without ``replies`` all that is given is to be replied to.

        ``targets`` (int64, (K,)) are the tokens wanted at ``positions``, for their loss.

        ``lengths`` (int64, (S,)), for a model that can ``start_packing``, are those of the sequences of the one row ``(1, T,
        D_llm)``, which stand behind each other without padding and do not see each other.
        """
