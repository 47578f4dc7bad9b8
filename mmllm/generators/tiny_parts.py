"""Parts of tiny random pipelines: tokenizers of single letters, text encoders, a picture autoencoder, schedulers."""

from __future__ import annotations

from typing import Any

WIDTH = 32  # of the text encoders
TEXT = 16  # positions of CLIP-like text encoders


def clip_tokenizer() -> Any:
    """A CLIP tokenizer of single letters."""
    from transformers import CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,?!'-"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TEXT)


def t5_tokenizer() -> Any:
    """A T5 tokenizer of single letters."""
    from transformers import T5Tokenizer

    letters = [*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'-:>"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in letters)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT)


def roberta_tokenizer() -> Any:
    """A RoBERTa tokenizer of single letters."""
    from transformers import RobertaTokenizer

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz0123456789.,?!'-Ġ"]
    return RobertaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TEXT)


def clip_text(projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_text(width: int = WIDTH) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
    )
    return T5EncoderModel(config).eval()


def clip(projection: bool = False) -> tuple[Any, Any]:
    """A CLIP text encoder and its tokenizer."""
    return clip_text(projection), clip_tokenizer()


def t5(width: int = WIDTH) -> tuple[Any, Any]:
    """A T5 encoder and its tokenizer."""
    return t5_text(width), t5_tokenizer()


def texts(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    """Text encoders and their tokenizers under the names that pipelines have for them."""
    names = [(f"text_encoder{end}", f"tokenizer{end}") for end in ("", "_2", "_3")]
    return {name: part for pair, both in zip(pairs, names, strict=False) for name, part in zip(both, pair, strict=True)}


def vae(latent_channels: int = 4, channels: int = 3, shift: float | None = None) -> Any:
    """The autoencoder of Stable Diffusion: halves both sides."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8, 16],
        norm_num_groups=4,
        in_channels=channels,
        out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=latent_channels,
        sample_size=16,
        shift_factor=shift,
    ).eval()


def unet(name: str = "UNet2DConditionModel", **more: Any) -> Any:
    """A U-Net of that diffusers class, with two blocks of which the inner one attends to the text."""
    import diffusers

    numbers = {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
    }
    return getattr(diffusers, name)(**{**numbers, **more}).eval()


def ddim(**more: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **more,
    )


def flow_euler(**more: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)
