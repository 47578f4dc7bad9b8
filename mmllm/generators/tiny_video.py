"""Parts of tiny random text-to-video pipelines, by diffusers class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmllm.generators.tiny_parts import WIDTH, clip, ddim, flow_euler, t5, texts, unet, vae


def _text_to_video() -> dict[str, Any]:
    denoiser = unet(
        "UNet3DConditionModel",
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    return {"vae": vae(), **texts(clip()), "unet": denoiser, "scheduler": ddim()}


def _wan() -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    autoencoder = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return {
        **texts(t5()),
        "vae": autoencoder.eval(),
        "transformer": transformer.eval(),
        "scheduler": flow_euler(shift=7.0),
    }


PIPELINES: dict[str, Callable[[], dict[str, Any]]] = {
    "TextToVideoSDPipeline": _text_to_video,
    "WanPipeline": _wan,
}
