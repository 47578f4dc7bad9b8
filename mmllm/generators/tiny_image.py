"""Parts of tiny random text-to-image pipelines, by diffusers class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmllm.generators.tiny_parts import WIDTH, clip, ddim, flow_euler, t5, t5_tokenizer, texts, unet, vae


def _stable_diffusion() -> dict[str, Any]:
    return {
        "vae": vae(),
        **texts(clip()),
        "unet": unet(),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _stable_diffusion_xl() -> dict[str, Any]:
    denoiser = unet(
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    return {"vae": vae(), **texts(clip(), clip(projection=True)), "unet": denoiser, "scheduler": ddim()}


def _stable_diffusion_3() -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=WIDTH * 2,
        pooled_projection_dim=2 * WIDTH,
        out_channels=8,
    )
    return {
        "transformer": transformer.eval(),
        "scheduler": flow_euler(shift=3.0),
        "vae": vae(8, shift=0.06),
        **texts(clip(projection=True), clip(projection=True), t5(2 * WIDTH)),
    }


def _flux() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    return {
        "scheduler": flow_euler(),
        "vae": vae(shift=0.06),
        **texts(clip(), t5()),
        "transformer": transformer.eval(),
    }


def _sana() -> dict[str, Any]:
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        sample_size=32,
    )
    compression = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    text = Gemma2Config(
        head_dim=16,
        hidden_size=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=len(t5_tokenizer()),
        attn_implementation="eager",
    )
    return {
        **texts((Gemma2Model(text).eval(), t5_tokenizer())),
        "vae": compression.eval(),
        "transformer": transformer.eval(),
        "scheduler": flow_euler(shift=3.0),
    }


PIPELINES: dict[str, Callable[[], dict[str, Any]]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
    "SanaPipeline": _sana,
}
