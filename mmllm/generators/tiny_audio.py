"""Parts of tiny random text-to-audio pipelines, by diffusers class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmllm.generators.tiny_parts import TEXT, WIDTH, ddim, roberta_tokenizer, t5, texts, unet, vae

MEL_BINS = 8


def _vocoder() -> Any:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=MEL_BINS,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )
    return SpeechT5HifiGan(config).eval()


def _clap_text_numbers() -> dict[str, Any]:
    return {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "vocab_size": len(roberta_tokenizer()),
        "hidden_size": 8,
        "intermediate_size": 37,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "max_position_embeddings": TEXT + 4,
        "projection_dim": 8,
    }


def _audioldm() -> dict[str, Any]:
    from transformers import ClapTextConfig, ClapTextModelWithProjection

    denoiser = unet(
        sample_size=16,
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=8,
        class_embeddings_concat=True,
    )
    return {
        "vae": vae(channels=1),
        **texts((ClapTextModelWithProjection(ClapTextConfig(**_clap_text_numbers())).eval(), roberta_tokenizer())),
        "unet": denoiser,
        "scheduler": ddim(),
        "vocoder": _vocoder(),
    }


def _audioldm2() -> dict[str, Any]:
    from diffusers import AudioLDM2ProjectionModel
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, GPT2Config, GPT2LMHeadModel

    denoiser = unet(
        "AudioLDM2UNet2DConditionModel",
        norm_num_groups=8,
        sample_size=16,
        cross_attention_dim=((None, 16, WIDTH), (None, 16, WIDTH)),
    )
    audio = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "hidden_size": 16,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embeds_hidden_size": 4,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 2,
        "num_classes": 8,
        "projection_dim": 8,
    }
    language = GPT2Config(
        n_embd=16, n_head=2, n_layer=1, n_positions=99, vocab_size=99, bos_token_id=0, eos_token_id=0, max_new_tokens=8
    )
    clap = ClapConfig(text_config=_clap_text_numbers(), audio_config=audio, projection_dim=16)
    return {
        "vae": vae(channels=1),
        **texts((ClapModel(clap).eval(), roberta_tokenizer()), t5()),
        "projection_model": AudioLDM2ProjectionModel(
            text_encoder_dim=16, text_encoder_1_dim=WIDTH, langauge_model_dim=16
        ).eval(),
        "language_model": GPT2LMHeadModel(language).eval(),
        "feature_extractor": ClapFeatureExtractor(feature_size=8, hop_length=7),
        "unet": denoiser,
        "scheduler": ddim(),
        "vocoder": _vocoder(),
    }


def _stable_audio() -> dict[str, Any]:
    from diffusers import (
        AutoencoderOobleck,
        CosineDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioProjectionModel,
    )

    transformer = StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    autoencoder = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    return {
        "vae": autoencoder.eval(),
        **texts(t5()),
        "projection_model": StableAudioProjectionModel(
            text_encoder_dim=WIDTH, conditioning_dim=4, min_value=0, max_value=32
        ).eval(),
        "transformer": transformer.eval(),
        "scheduler": CosineDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    }


PIPELINES: dict[str, Callable[[], dict[str, Any]]] = {
    "AudioLDMPipeline": _audioldm,
    "AudioLDM2Pipeline": _audioldm2,
    "StableAudioPipeline": _stable_audio,
}
