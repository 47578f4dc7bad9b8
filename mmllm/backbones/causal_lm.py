"""Any causal language model of transformers as the backbone; what ``seq2seq`` shares with it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from mmllm.config.architecture import check_declared, field_names, make_numbers
from mmllm.config.base import BuildContext, suggest
from mmllm.config.families import BackboneConfig
from mmllm.errors import CheckpointError, ConfigError, MmllmError, brief
from mmllm.pretrained import is_local, missing

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from mmllm.backbones.causal_lm_module import CausalLM

TEMPLATES = Path(__file__).parent / "templates"


Task = Literal["causal LM", "sequence-to-sequence LM"]


class LanguageModelConfig(BackboneConfig):
    """A transformers model of one ``task``.

    ``pretrained``: hub id or folder (``./`` is relative to the config file). ``architecture``: the numbers of transformers'
    own config (``{model_type: llama, hidden_size: 4096, …}``), enough for ``plan`` without the files; when weights are
    loaded they are checked against it. ``chat_template``: the name of a template that ships with mmllm (``chatml``,
    ``vicuna``, ``plain``) or a Jinja file, for tokenizers that have none of their own or the wrong one.
    ``tokenizer_path``: where the tokenizer is, when not beside the weights. Without ``pretrained`` the weights are random,
    and without a tokenizer bytes are the tokens: such a model is for trying out a combination. ``attention``: which
    implementation; by default transformers takes the best that the model has, ``sdpa`` for most. ``tie_signals``: the
    embeddings of signal tokens give their logits as well, where the model's own table does so (OPT, GPT-2).
    """

    task: ClassVar[Task]
    example: ClassVar[str]  # a family of the task, and what `tiny()` is of when none is declared
    pretrained: str | None = None
    revision: str | None = None
    architecture: dict[str, Any] | None = None
    tokenizer_path: str | None = None
    chat_template: str | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    tie_signals: bool = False

    def tiny(self) -> Self:
        architecture = self.architecture or {}
        model_type = architecture.get("model_type", self.example)
        known = field_names(config_class(model_type, self.task))
        numbers = {name: number for name, number in TINY.items() if name in known}
        numbers |= {name: architecture[name] for name in STRUCTURE if name in architecture}
        return self.model_copy(
            update={
                "pretrained": None,
                "revision": None,
                "tokenizer_path": None,
                "chat_template": None,
                "architecture": {"model_type": model_type, **numbers, "vocab_size": TINY_VOCAB},
            }
        )

    def hf_config(self, context: BuildContext) -> PretrainedConfig:
        """The transformers config: of the local folder, of the given architecture, or (weights wanted) of the hub.

        Raises ``ConfigError`` with paths inside this config, or ``CheckpointError``.
        """
        from transformers import AutoConfig

        path = context.resolve(self.pretrained) if self.pretrained else None
        here = path is not None and Path(path).is_dir()
        if path and is_local(path) and not here and (context.weights or self.architecture is None):
            raise missing(Path(path))
        if path and (context.weights or here):
            try:
                config = AutoConfig.from_pretrained(
                    path, revision=self.revision, trust_remote_code=context.trust_remote_code
                )
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(f"cannot read the config of {self.pretrained}: {brief(error)}") from error
            check_declared(self.architecture or {}, config, self.pretrained)
            return ready(config)
        if self.architecture is None:
            raise MmllmError(
                f"backbone {self.pretrained}: its architecture is not known offline; give `architecture: "
                "{model_type: …, hidden_size: …, num_hidden_layers: …, vocab_size: …}` or a local folder as `pretrained`"
            )
        return ready(config_of(self.architecture, self.task))

    def vocab_rows(self, context: BuildContext) -> int:
        return int(self.hf_config(context).vocab_size)

    def num_tokens(self, context: BuildContext) -> int | None:
        source = self.tokenizer_path or self.pretrained
        fetched = source is not None and not Path(context.resolve(source)).exists()
        return None if fetched and not context.weights else len(self.tokenizer(context))

    def max_positions(self, context: BuildContext) -> int | None:
        config = self.hf_config(context)
        # A plan for a hub's model has the numbers that the YAML gives; transformers' default is not its limit.
        guessed = (
            self.pretrained is not None and not context.weights and not Path(context.resolve(self.pretrained)).exists()
        )
        own_name = type(config).attribute_map.get("max_position_embeddings", "max_position_embeddings")
        if guessed and not {own_name, "max_position_embeddings"} & set(self.architecture or {}):
            return None
        number = getattr(config, "max_position_embeddings", None)
        taken = 0 if self.adapter is None else self.adapter.positions
        return number - taken if isinstance(number, int) and number > 0 else None

    def tokenizer(self, context: BuildContext) -> PreTrainedTokenizerBase:
        source = self.tokenizer_path or self.pretrained
        if source is None:
            tokenizer = byte_tokenizer()
        else:
            from transformers import AutoTokenizer

            path = context.resolve(source)
            if is_local(path) and not Path(path).exists():
                raise missing(Path(path))
            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    path, revision=self.revision, trust_remote_code=context.trust_remote_code
                )
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(f"cannot read the tokenizer of {source}: {brief(error)}") from error
        if self.chat_template is not None:
            tokenizer.chat_template = read_template(self.chat_template, context)
        if tokenizer.chat_template is None:
            known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
            raise ConfigError(
                [("chat_template", f"the tokenizer of {source} has none; set a Jinja file or one of {known}")]
            )
        return tokenizer

    def language_model(self, context: BuildContext) -> Any:
        """The transformers model that ``build`` puts behind the contract, quantised where that is wanted."""
        from mmllm.backbones.language_model_module import load_language_model

        model = load_language_model(self, context)
        if self.quantize is not None:
            from mmllm.backbones.quantized import quantize

            quantize(model, self.quantize.bits)
        return model


class CausalLMConfig(LanguageModelConfig):
    """A decoder-only transformers model: transformers, mixtures of experts, state-space and recurrent models."""

    suggested: ClassVar[Mapping[str, Any]] = {
        "text": {
            "pretrained": "Qwen/Qwen2.5-0.5B-Instruct",
            "architecture": {
                "model_type": "qwen2",
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "vocab_size": 151936,
                "tie_word_embeddings": True,
            },
        }
    }
    kind: Literal["causal_lm"] = "causal_lm"
    task: ClassVar[Task] = "causal LM"
    example: ClassVar[str] = "llama"

    def build(self, context: BuildContext, *, num_new_tokens: int, num_signals: int = 0) -> CausalLM:
        from mmllm.backbones.causal_lm_module import CausalLM

        return CausalLM(self.language_model(context), self.adapter, num_new_tokens, num_signals, self.tie_signals)


def config_of(architecture: Mapping[str, Any], task: Task = "causal LM") -> PretrainedConfig:
    """transformers' config of ``{model_type: …, hidden_size: …}``. Raises ``ConfigError`` for names and numbers that it
    refuses.
    """
    numbers = dict(architecture)
    cls = config_class(numbers.pop("model_type", None), task)
    config = make_numbers(cls, numbers)
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and groups and heads % groups:  # transformers finds out only in the first forward pass
        text = f"{heads} attention heads cannot share {groups} key-value heads; it must divide num_attention_heads"
        raise ConfigError([("architecture.num_key_value_heads", text)])
    return config


def config_class(model_type: Any, task: Task = "causal LM") -> type[PretrainedConfig]:
    """The config class of a family of language models. Raises ``ConfigError`` for a ``model_type`` without that task."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    families, examples = {
        "causal LM": (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "llama, qwen2 or gpt2"),
        "sequence-to-sequence LM": (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "t5 or bart"),
    }[task]
    if model_type not in families:
        found = "required, but not given" if model_type is None else f"transformers has no {task} {model_type!r}"
        near = suggest(str(model_type), families) or f"; for example {examples}"
        raise ConfigError([("architecture.model_type", found + near)])
    cls: type[PretrainedConfig] = CONFIG_MAPPING[model_type]
    return cls


def ready(config: PretrainedConfig) -> PretrainedConfig:
    """``config`` without what would change weights behind a run's back."""
    if hasattr(config, "rescale_every"):  # RWKV halves its weights in place for fp16 whenever evaluation begins
        config.rescale_every = 0
    return config


# The usual names; a family takes those it knows.
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    # state-space and recurrent models, and hybrids
    "state_size": 4,
    "time_step_rank": 4,
    "num_heads": 4,
    "n_groups": 2,
    "chunk_size": 8,
    "attention_hidden_size": 32,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    # encoder-decoders
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 0,
    "pad_token_id": None,  # a family's own may lie behind the small table
}
STRUCTURE = ("tie_word_embeddings", "feed_forward_proj", "scale_embedding")  # kept when the sizes are not
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
