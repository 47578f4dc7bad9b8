"""Any causal language model of transformers as the backbone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from mmllm.config.base import BuildContext
from mmllm.config.families import BackboneConfig
from mmllm.errors import MmllmError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from mmllm.backbones.causal_lm_module import CausalLM

TEMPLATES = Path(__file__).parent / "templates"


class CausalLMConfig(BackboneConfig):
    """A decoder-only transformers model.

    ``pretrained``: hub id or folder (``./`` is relative to the config file). ``architecture``: the numbers of transformers'
    own config (``{model_type: llama, hidden_size: 4096, …}``), enough for ``plan`` without the files; when weights are
    loaded they are checked against it. ``chat_template``: the name of a template that ships with mmllm (``chatml``,
    ``vicuna``, ``plain``) or a Jinja file, for tokenizers that have none of their own or the wrong one.
    ``tokenizer_path``: where the tokenizer is, when not beside the weights. Without ``pretrained`` the weights are random,
    and without a tokenizer bytes are the tokens: such a model is for trying out a combination.
    """

    kind: Literal["causal_lm"] = "causal_lm"
    pretrained: str | None = None
    revision: str | None = None
    architecture: dict[str, Any] | None = None
    tokenizer_path: str | None = None
    chat_template: str | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"

    def tiny(self) -> Self:
        model_type = (self.architecture or {}).get("model_type", "llama")
        return self.model_copy(
            update={
                "pretrained": None,
                "revision": None,
                "tokenizer_path": None,
                "chat_template": None,
                "architecture": {"model_type": model_type, **TINY, "vocab_size": TINY_VOCAB},
            }
        )

    def hf_config(self, context: BuildContext) -> PretrainedConfig:
        """The transformers config: of the local folder, of the given architecture, or (weights wanted) of the hub."""
        from transformers import AutoConfig

        path = context.resolve(self.pretrained) if self.pretrained else None
        if path and (context.weights or Path(path).is_dir()):
            config = AutoConfig.from_pretrained(
                path, revision=self.revision, trust_remote_code=context.trust_remote_code
            )
            wrong = {k: v for k, v in (self.architecture or {}).items() if getattr(config, k) != v}
            if wrong:
                found = ", ".join(f"{k} is {getattr(config, k)!r}, the config says {v!r}" for k, v in wrong.items())
                raise MmllmError(f"backbone {self.pretrained}: {found}; correct `architecture` or `pretrained`")
            return config
        if self.architecture is None:
            raise MmllmError(
                f"backbone {self.pretrained}: its architecture is not known offline; give `architecture: "
                "{model_type: …, hidden_size: …, num_hidden_layers: …, vocab_size: …}` or a local folder as `pretrained`"
            )
        numbers = dict(self.architecture)
        config = AutoConfig.for_model(numbers.pop("model_type", None), **numbers)
        heads, groups = numbers.get("num_attention_heads"), numbers.get("num_key_value_heads")
        if heads and groups and heads % groups:  # transformers finds out only in the first forward pass
            raise MmllmError(
                f"backbone: {heads} attention heads cannot share {groups} key-value heads; num_key_value_heads must divide "
                "num_attention_heads"
            )
        return config

    def vocab_rows(self, context: BuildContext) -> int:
        return int(self.hf_config(context).vocab_size)

    def tokenizer(self, context: BuildContext) -> PreTrainedTokenizerBase:
        source = self.tokenizer_path or self.pretrained
        if source is None:
            tokenizer = byte_tokenizer()
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                context.resolve(source), revision=self.revision, trust_remote_code=context.trust_remote_code
            )
        if self.chat_template is not None:
            tokenizer.chat_template = read_template(self.chat_template, context)
        if tokenizer.chat_template is None:
            known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
            raise MmllmError(
                f"backbone {source}: its tokenizer has no chat template; "
                f"set `backbone.chat_template` to a Jinja file or one of {known}"
            )
        return tokenizer

    def build(self, context: BuildContext, *, num_new_tokens: int) -> CausalLM:
        from mmllm.backbones.causal_lm_module import CausalLM, load_causal_lm

        model = load_causal_lm(self, context)
        return CausalLM(model, adapter=self.adapter, num_new_tokens=num_new_tokens)


# Enough names for every transformers family: each takes those it knows.
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
TINY_VOCAB = 272


def read_template(name: str, context: BuildContext) -> str:
    """The text of a shipped template by name, or of a Jinja file by path. Raises ``MmllmError`` when there is neither."""
    shipped = TEMPLATES / f"{name}.jinja"
    file = shipped if shipped.is_file() else Path(context.resolve(name))
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise MmllmError(f"chat template {name!r} is neither a file nor one of {known}")
    return file.read_text(encoding="utf-8")


@cache
def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of the 256 bytes and four control tokens, for models that are built without files (tests, dry runs)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=special[1:3],
        chat_template=(TEMPLATES / "chatml.jinja").read_text(encoding="utf-8"),
    )
