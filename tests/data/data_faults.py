"""Files with faults, and processors to meet them with."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import soundfile
from PIL import Image

from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.processing.batch import Encoded
from mmllm.processing.images import decode_image
from mmllm.processing.messages import Sample
from mmllm.processing.processor import Processor
from mmllm.processing.reading import DECODERS
from mmllm.processing.sources import Limits, read_media

LIMITS = Limits()
OPTIONS: dict[str, dict[str, Any]] = {"image": {}, "audio": {"sample_rate": 16_000}, "video": {"frames": 4}}


class Decoding:
    """A processor that decodes all media as the real one does, and makes nothing of them."""

    def encode_sample(self, sample: Sample, max_length: int) -> Encoded:
        for part in sample.messages[0].parts:
            if part.type != "text":
                data = read_media(cast(str, part.value), root=sample.root, limits=LIMITS)
                DECODERS[part.type](data, limits=LIMITS, **OPTIONS[part.type])
        return Encoded(sample.id, [0], [True], [])


PROCESSOR = cast(Processor, Decoding())


def tiny_model() -> dict[str, Any]:
    """A model configuration with pictures and sounds."""
    clip = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    whisper = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    llama = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"kind": "clip", "architecture": {**clip, "image_size": 32, "patch_size": 16}}
    audio = {"kind": "whisper", "architecture": {**whisper, "num_mel_bins": 16, "max_source_positions": 50}}
    text = {"model_type": "llama", **llama, "num_key_value_heads": 2, "vocab_size": 272}
    return {
        "inputs": {
            "image": {"encoder": image, "projector": {"kind": "linear"}},
            "audio": {"encoder": audio, "projector": {"kind": "linear"}, "markers": True},
        },
        "backbone": {"kind": "causal_lm", "chat_template": "chatml", "architecture": text},
    }


@cache
def tiny_processor() -> Processor:
    """Its processor."""
    return Processor.from_config(parse({"model": tiny_model()}).model, BuildContext())


def saved(path: Path) -> None:
    """A picture of noise, a tone or a clip, by the name's ending."""
    if path.suffix in (".png", ".jpg"):
        Image.effect_noise((64, 48), 90).convert("RGB").save(path)
    elif path.suffix == ".mp4":
        path.write_bytes(film(21))
    else:
        tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000) + 0.05 * np.random.default_rng(0).normal(
            size=8000
        )
        soundfile.write(path, tone.astype(np.float32), 16_000)


def film(count: int) -> bytes:
    """An MP4 of so many frames of noise."""
    import av

    out, noise = io.BytesIO(), np.random.default_rng(0)
    with av.open(out, "w", format="mp4") as file:
        stream: Any = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(count):
            pixels = noise.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    return out.getvalue()


def silent_film() -> bytes:
    """An MP4 of sound alone."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream: Any = file.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of one bit a pixel: few bytes, many pixels."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG", optimize=True)
    return file.getvalue()


def decoded(data: bytes, **options: Any) -> np.ndarray:
    """(H, W, 3) int64."""
    return np.asarray(decode_image(data, LIMITS, **options)).astype(int)
