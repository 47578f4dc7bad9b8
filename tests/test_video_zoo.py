"""Video systems of the zoo have the trained parts of the published code, and real clips go all the way through."""

from __future__ import annotations

import os
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from mmllm.cli import CONFIG_FOLDERS
from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.config.run import ModelConfig
from mmllm.model import MultimodalLM
from mmllm.plan import Plan, make_plan
from mmllm.processing.batch import MediaBatch
from mmllm.processing.processor import Processor
from tests.needs import needed

CLIPS = Path(os.environ.get("MMLLM_VIDEO_CLIPS", Path(__file__).parents[2] / "shared" / "data" / "video-clips"))


def plan(name: str) -> Plan:
    return make_plan(load(CONFIG_FOLDERS[1] / "zoo" / f"{name}.yaml"), BuildContext(weights=False))


def q_former(layers: int, every: int, features: int, queries: int, width: int = 768) -> int:
    """Parameters of LAVIS' ``Qformer.bert`` without what reads text, and of its queries: BERT's numbers."""
    linear, norm = width * width + width, 2 * width
    attention = 4 * linear + norm
    crossing = 2 * linear + 2 * (features * width + width) + norm
    feed_forward = 2 * 4 * width * width + 4 * width + width + norm
    crossed = -(-layers // every)
    return layers * (attention + feed_forward) + crossed * crossing + norm + queries * width


def test_video_chatgpt_trains_its_linear_layer_and_two_marks() -> None:
    """100 temporal and 256 spatial tokens (arXiv 2306.05424, section 3.1), ``mm_projector`` and the rows of the marks."""
    found = plan("video-chatgpt-7b")
    assert found.inputs["video"].tokens == {"640x360": 100 + 256 + 2}
    assert found.stages[0].trainable == 1024 * 4096 + 4096 + 2 * 4096


def test_video_llava_has_the_published_tokens_and_projectors() -> None:
    """A clip is 2056 tokens in transformers' Video-LLaVA (``video_seq_length``), a picture 256."""
    found = plan("video-llava-7b")
    assert set(found.inputs["image"].tokens.values()) == {256}
    assert found.inputs["video"].tokens == {"640x360": 2056}
    assert found.parameters["inputs.video.projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096


def test_videochat_trains_new_queries_norm_and_linear_layer() -> None:
    found = plan("videochat-7b")
    assert found.inputs["video"].tokens == {"640x360": 32 + 64}
    linear, norm = 768 * 4096 + 4096, 2 * 1408
    assert found.stages[0].parts == {
        "inputs.video.projector.modules.extra_query_tokens": 64 * 768,
        "inputs.video.projector.modules.norm": norm,
        "inputs.video.projector.modules.language_projection": linear,
    }
    assert found.parameters["inputs.video.projector"] == q_former(12, 2, 1408, 32 + 64) + norm + linear
    # transformers' Blip2VisionModel has 985,952,256: with the norm behind it, and a bias of the keys in each of 39 blocks.
    assert found.parameters["inputs.video.encoder"] == 985_952_256 - norm - 39 * 1408


def test_video_llama_trains_what_the_published_code_trains() -> None:
    """``video_Qformer``, its queries, ``video_frame_position_embedding`` and ``llama_proj``; the same for sounds, which has
    ImageBind's width and, here only, a norm.
    """
    found = plan("video-llama-7b")
    assert found.inputs["video"].tokens == {"640x360": 32}
    assert set(found.inputs["audio"].tokens.values()) == {8}
    linear = 768 * 4096 + 4096
    video = q_former(2, 1, 768, 32) + 32 * 768 + linear
    audio = q_former(2, 1, 1024, 8) + 8 * 1024 + linear
    assert (video, audio) == (22_104_064, 22_855_680)  # the numbers in the file's header
    assert found.parameters["inputs.video.projector"] == video + q_former(12, 2, 1408, 32) + 2 * 1408
    assert found.parameters["inputs.audio.projector"] == audio + 2 * 1024
    assert found.stages[0].trainable == found.stages[1].trainable == video + audio + 2 * 1024


# Real clips --------------------------------------------------------------------------------------------------------------
VIT = {"kind": "vit", "pretrained": "google/vit-base-patch16-224"}
ENCODERS = {
    "frames": ({"kind": "frames", "frames": 8, "encoder": VIT}, {"kind": "linear"}, 8 * 16),
    "mean": ({"kind": "frames", "frames": 8, "encoder": VIT, "pooling": "mean"}, {"kind": "mlp"}, 16),
    "video-chatgpt": (
        {"kind": "frames", "frames": 8, "spread": "middles", "encoder": VIT, "pooling": "spatio_temporal"},
        {"kind": "linear"},
        8 + 16,
    ),
    "video-llama": (
        {"kind": "frames", "frames": 8, "encoder": VIT, "spatial_stride": 2},
        {"kind": "temporal_qformer", "frame": {"num_queries": 3}},
        4,
    ),
    "videomae": ({"kind": "videomae", "pretrained": "MCG-NJU/videomae-base"}, {"kind": "qformer"}, 4),
    "vjepa2": ({"kind": "vjepa2", "pretrained": "facebook/vjepa2-vitl-fpc64-256"}, {"kind": "temporal_qformer"}, 4),
}


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the clips are not at hand (MMLLM_VIDEO_CLIPS names their folder)")
@pytest.mark.parametrize("name", ENCODERS)
def test_real_clips_are_decoded_and_read(name: str, tmp_path: Path) -> None:
    """MPEG-1 and MP4, of several sizes, decoded, encoded and projected in one batch; what differs in them is seen."""
    needed("av")
    encoder, projector, count = ENCODERS[name]
    config = ModelConfig.model_validate(
        {"inputs": {"video": {"encoder": encoder, "projector": projector}}, "backbone": {"kind": "causal_lm"}}
    ).tiny()
    if encoder["kind"] == "frames":  # the real number of frames
        small = config.inputs["video"].encoder.model_copy(update={"frames": encoder["frames"]})
        video = config.inputs["video"].model_copy(update={"encoder": small})
        config = config.model_copy(update={"inputs": {"video": video}})
    with ZipFile(CLIPS / "clips.zip") as archive:
        files = [archive.extract(name, tmp_path) for name in ("grid/bbaf2n.mpg", "gradio/b.mp4", "llama-factory/4.mp4")]
    context = BuildContext(weights=False)
    processor, model = Processor.from_config(config, context), MultimodalLM.from_config(config, context).eval()
    with torch.no_grad():  # as they start, Q-Formers look at everything alike
        for value in model.inputs["video"].projector.parameters():  # type: ignore[union-attr, operator]
            value.normal_(std=0.2)
    samples = [
        processor.encode_prompt([{"role": "user", "content": [{"type": "video", "path": file}]}]) for file in files
    ]
    assert [sample.spans[0].count for sample in samples] == [count] * 3
    batch = processor.collate(samples)
    media = batch.media["video"]
    assert isinstance(media, MediaBatch)
    with torch.no_grad():
        embeddings = model.splice(batch.ids, batch.media)
        encoded = model.encode(batch.media)["video"]
    assert embeddings.isfinite().all()
    assert encoded.shape[:2] == (3, media.width)
    spread = torch.cdist(encoded.flatten(1), encoded.flatten(1))
    assert spread[~torch.eye(3, dtype=torch.bool)].min() > 1e-4 * encoded.norm(dim=(1, 2)).mean()
