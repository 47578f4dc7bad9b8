"""Media-token expansion, refusals, and batches."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.errors import DataError, MediaError, SampleTooLong
from mmllm.processing.messages import Sample, check_turns, parse_messages
from mmllm.processing.processor import Processor


@pytest.fixture(scope="module")
def processor() -> Processor:
    tree = {
        "inputs": {
            "image": {"encoder": {"kind": "clip", "arch": "ViT-B-32"}, "projector": {"kind": "mlp"}, "markers": True},
            "audio": {"encoder": {"kind": "whisper", "pretrained": "tiny"}, "projector": {"kind": "mlp", "stack": 4}},
        },
        "backbone": {"kind": "causal_lm", "pretrained": "x"},
    }
    config = parse({"model": tree}).model
    inputs = {n: p.model_copy(update={"encoder": p.encoder.tiny()}) for n, p in config.inputs.items()}
    config = config.model_copy(update={"inputs": inputs, "backbone": config.backbone.tiny()})
    return Processor.from_config(config, BuildContext(weights=False))


def picture() -> dict[str, object]:
    data = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(data, "PNG")
    return {"type": "image", "data": data.getvalue()}


def sample(*turns: object) -> Sample:
    roles = ("user", "assistant")
    return Sample("s1", parse_messages([{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]))


def test_spans_hold_exactly_the_announced_placeholders(processor: Processor) -> None:
    encoded = processor.encode_sample(sample([picture(), {"type": "text", "text": "q"}, picture()], "a"), 4096)
    image = processor.modalities["image"]
    assert image.markers is not None
    for span in encoded.spans:
        assert span.count == image.preprocessor.num_tokens(span.item)
        inside = encoded.ids[span.start : span.start + span.count]
        assert inside == [image.placeholder] * span.count
        assert encoded.ids[span.start - 1] == image.markers[0]
        assert encoded.ids[span.start + span.count] == image.markers[1]
    assert encoded.ids.count(image.placeholder) == sum(span.count for span in encoded.spans)
    assert not any(flag for i, flag in zip(encoded.ids, encoded.supervised, strict=True) if i >= 272)


@pytest.mark.parametrize("text", ["<image>", "<image_start>", "<|image|>"])
def test_text_never_becomes_a_placeholder(processor: Processor, text: str) -> None:
    encoded = processor.encode_sample(sample(text, text), 4096)
    assert not encoded.spans
    assert max(encoded.ids) < 272


def test_a_sample_too_long_is_refused_whole_at_every_limit(processor: Processor) -> None:
    whole = sample([picture(), {"type": "text", "text": "q"}], "a")
    length = len(processor.encode_sample(whole, 4096).ids)
    for limit in range(1, length):
        with pytest.raises(SampleTooLong, match=f"s1: {length} tokens, max_length is {limit}"):
            processor.encode_sample(whole, limit)
    assert len(processor.encode_sample(whole, length).ids) == length


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "no user message"),
        (["q"], "without an assistant reply"),
        (["q", " "], "reply is empty"),
        (["q", "a", "q"], "without an assistant reply"),
        ([[{"type": "video", "path": "x.mp4"}], "a"], "input modalities are: image, audio"),
    ],
)
def test_faulty_conversations_are_refused_by_name(processor: Processor, turns: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        processor.encode_sample(sample(*turns), 4096)
    assert "s1" in str(caught.value)


def test_a_broken_picture_is_a_media_error(processor: Processor) -> None:
    with pytest.raises(MediaError):
        processor.encode_sample(sample([{"type": "image", "data": b"no picture"}], "a"), 4096)


def test_of_several_files_the_broken_one_is_named(processor: Processor, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    with pytest.raises(MediaError, match=r"^cut\.png: "):
        processor.encode_prompt(
            [{"role": "user", "content": [picture(), {"type": "image", "path": str(tmp_path / "cut.png")}]}]
        )


def test_assistant_first_and_repeated_roles_are_refused() -> None:
    with pytest.raises(DataError, match="turn 0 is from 'assistant'"):
        check_turns(parse_messages([{"role": "assistant", "content": "a"}]))
    with pytest.raises(DataError, match="turn 1 is from 'user'"):
        check_turns(parse_messages([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]))


@pytest.mark.parametrize(
    "messages",
    [
        "text",
        [1],
        [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image"}]}],
    ],
)
def test_malformed_messages_name_their_place(messages: object) -> None:
    with pytest.raises(DataError, match="row 7"):
        parse_messages(messages, "row 7")  # type: ignore[arg-type]


def test_batches_supervise_the_same_tokens_on_either_side_of_the_padding(processor: Processor) -> None:
    samples = [
        processor.encode_sample(s, 4096) for s in (sample("hello", "a"), sample([picture()], "bcd"), sample("x", "ef"))
    ]
    for pad_left in (False, True):
        batch = processor.collate(samples, pad_left=pad_left)
        assert batch.tokens == sum(s.num_supervised for s in samples)
        assert processor.tokenizer.decode(batch.targets) == "a<|im_end|>bcd<|im_end|>ef<|im_end|>"
        flat = batch.ids.flatten()
        assert torch.equal(flat[batch.predict + 1], batch.targets)
        media = batch.media["image"]
        assert (flat[media.positions] == processor.modalities["image"].placeholder).all()
        assert media.sources.tolist() == list(range(media.width))
        assert batch.attention_mask.sum() == sum(len(s.ids) for s in samples)


def test_the_processor_survives_pickling(processor: Processor) -> None:
    copy = pickle.loads(pickle.dumps(processor))
    conversation = sample([picture(), {"type": "text", "text": "q"}], "a")
    assert copy.encode_sample(conversation, 4096).ids == processor.encode_sample(conversation, 4096).ids


def test_media_are_prepared_in_full_precision_whatever_the_callers_autocast(
    processor: Processor, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, 16_000)
    chat = [{"role": "user", "content": [picture(), {"type": "audio", "path": str(tmp_path / "a.wav")}]}]
    plain = processor.encode_prompt(chat)
    with torch.autocast("cpu", torch.bfloat16):
        inside = processor.encode_prompt(chat)
    for a, b in zip(plain.spans, inside.spans, strict=True):
        assert all(torch.equal(a.item[key], b.item[key]) for key in a.item)
