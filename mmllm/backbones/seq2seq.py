"""Any encoder-decoder language model of transformers as the backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mmllm.backbones.causal_lm import LanguageModelConfig, Task
from mmllm.config.base import BuildContext

if TYPE_CHECKING:
    from mmllm.backbones.seq2seq_module import Seq2Seq


class Seq2SeqConfig(LanguageModelConfig):
    """An encoder-decoder (Flan-T5, BART): media and what was said go into the encoder, the reply comes from the decoder.

    That is how BLIP-2 (arXiv 2301.12597) and InstructBLIP (arXiv 2305.06500) use Flan-T5. Such tokenizers have no chat template;
    ``chat_template: seq2seq`` ends every message with the tokenizer's end token.
    """

    kind: Literal["seq2seq"] = "seq2seq"
    task: ClassVar[Task] = "sequence-to-sequence LM"
    example: ClassVar[str] = "t5"

    def build(self, context: BuildContext, *, num_new_tokens: int, num_signals: int = 0) -> Seq2Seq:
        from mmllm.backbones.seq2seq_module import Seq2Seq

        return Seq2Seq(self.language_model(context), self.adapter, num_new_tokens, num_signals, self.tie_signals)
