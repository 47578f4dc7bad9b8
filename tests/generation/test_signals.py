"""What the assistant makes: whole groups of signal tokens, media at their place in the stream, Stop, seeds."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmllm.assistant import Assistant
from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.errors import DataError, MediaError, MmllmError
from mmllm.generation import Decoding, SignalWriter, decode
from mmllm.model import MultimodalLM
from mmllm.processing.messages import Sample, parse_messages
from mmllm.processing.processor import Processor
from mmllm.replies import Media, Truncated

ASK = [{"role": "user", "content": "draw"}]
SIGNALS = 3


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    torch.manual_seed(0)
    out = {"projector": {"kind": "tiny_transformer"}, "generator": {"kind": "stable_diffusion", "pretrained": "x"}}
    tree = {
        "inputs": {"image": {"encoder": {"kind": "clip", "pretrained": "x"}, "projector": {"kind": "linear"}}},
        "backbone": {"kind": "causal_lm", "pretrained": "x"},
        "outputs": {"image": {**out, "signal_tokens": SIGNALS}, "sketch": {**out, "signal_tokens": 1}},
    }
    config = parse({"model": tree}).model.tiny()
    context = BuildContext(dtype=torch.float32)
    return Assistant(MultimodalLM.from_config(config, context), Processor.from_config(config, context))


def says(assistant: Assistant, monkeypatch: pytest.MonkeyPatch, wishes: list[int]) -> None:
    """Let the model wish for these ids in turn, whatever the conversation; the last one for ever."""
    forward, turn = assistant.model.backbone.forward, iter(range(10**6))

    def wishing(*args: Any, **options: Any) -> Any:
        out = forward(*args, **options)
        logits = torch.zeros_like(out.logits)
        logits[:, wishes[min(next(turn), len(wishes) - 1)]] = 9.0
        return out._replace(logits=logits)

    monkeypatch.setattr(assistant.model.backbone, "forward", wishing)


def ids_of(assistant: Assistant, text: str) -> list[int]:
    return list(assistant.processor.tokenizer.encode(text, add_special_tokens=False))


def first_of(assistant: Assistant, name: str) -> int:
    return assistant.processor.signals[name].first


def end_of(assistant: Assistant) -> int:
    return int(assistant.processor.tokenizer.eos_token_id)


def test_a_group_is_written_whole_whatever_the_model_wishes(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = first_of(assistant, "image")
    says(assistant, monkeypatch, [*ids_of(assistant, "a"), first, *ids_of(assistant, "bcd"), end_of(assistant)])
    prompt = assistant.processor.encode_prompt(ASK)
    steps = list(decode(assistant.model, assistant.processor, [prompt], Decoding(20)))
    written = [step.ids[0] for step in steps]
    assert written[:4] == [*ids_of(assistant, "a"), first, first + 1, first + 2]  # "b" and "c" were overruled
    groups = [group for step in steps for group in step.groups]
    assert [(group.modality, tuple(group.signals.shape)) for group in groups] == [("image", (1, SIGNALS, 32))]


def test_the_signals_are_those_of_a_full_forward(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding with a cache gives the states that training sees: last hidden state plus input embedding."""
    first = first_of(assistant, "image")
    with monkeypatch.context() as patch:
        says(assistant, patch, [first, end_of(assistant)])
        prompt = assistant.processor.encode_prompt(ASK)
        steps = list(decode(assistant.model, assistant.processor, [prompt], Decoding(20)))
    (found,) = [group.signals for step in steps for group in step.groups]
    model, ids = assistant.model, torch.tensor([[*prompt.ids, first, first + 1, first + 2]])
    embeddings = model.backbone.embed(ids)
    places = torch.arange(ids.shape[1] - SIGNALS, ids.shape[1])
    with torch.no_grad():
        states = model.backbone(embeddings, states_at=places).states + embeddings[0, places]
    torch.testing.assert_close(found[0], states, atol=1e-5, rtol=1e-5)


def test_a_group_cannot_begin_in_its_middle(assistant: Assistant) -> None:
    writer = SignalWriter(assistant.processor, rows=1)
    first = first_of(assistant, "image")
    logits = writer.restrict(torch.zeros(1, assistant.processor.vocab_rows + SIGNALS + 1))
    assert torch.isinf(logits[0, [first + 1, first + 2]]).all()
    assert torch.isfinite(logits[0, [first, first_of(assistant, "sketch")]]).all()


def test_media_come_at_their_place_and_no_signal_leaks_into_the_text(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, sketch = first_of(assistant, "image"), first_of(assistant, "sketch")
    words = ids_of(assistant, "ab")
    says(assistant, monkeypatch, [words[0], image, image, image, words[1], sketch, end_of(assistant)])
    parts = list(assistant.chat(ASK, stream=True, media={"image": {"steps": 1}, "sketch": {"steps": 1}}))
    assert [part.type if isinstance(part, Media) else part for part in parts] == ["a", "image", "b", "sketch"]
    pictures = [part.result(60) for part in parts if isinstance(part, Media)]
    assert all(picture.size == (16, 16) for picture in pictures)  # type: ignore[attr-defined]


def test_a_group_cut_off_is_reported_and_makes_nothing(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    says(assistant, monkeypatch, [*ids_of(assistant, "a"), first_of(assistant, "image")])
    reply = assistant.chat(ASK, max_new_tokens=3)
    assert (reply, reply.media, reply.truncated) == ("a", [], ["image"])
    assert list(assistant.chat(ASK, stream=True, max_new_tokens=3))[-1] == Truncated("image")


def test_a_seed_decides_the_picture(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    def picture(seed: int) -> np.ndarray[Any, Any]:
        with monkeypatch.context() as patch:
            says(assistant, patch, [first_of(assistant, "image"), end_of(assistant)])
            return np.asarray(assistant.chat(ASK, seed=seed).media[0].result(60))

    assert np.array_equal(picture(1), picture(1))
    assert not np.array_equal(picture(1), picture(2))


def test_stop_ends_a_picture_in_the_making(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    says(assistant, monkeypatch, [first_of(assistant, "image"), end_of(assistant)])
    generator = assistant.model.outputs["image"].frozen()  # type: ignore[operator]
    generate = generator.generate

    def stopped_after_two(condition: Any, sampling: Any, on_step: Any) -> Any:
        def after(done: int, total: int) -> bool:
            if done == 2:
                stop.set()
            return bool(on_step(done, total))

        return generate(condition, sampling, after)

    monkeypatch.setattr(generator, "generate", stopped_after_two)
    (media,) = assistant.chat(ASK, stop=stop, media={"image": {"steps": 50}}).media
    with pytest.raises(MmllmError, match="image was stopped"):
        media.result(60)
    assert media.progress == (2, 50)


def test_a_failing_generator_fails_where_its_medium_is_asked_for(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(assistant, monkeypatch, [first_of(assistant, "image"), end_of(assistant)])
    generator = assistant.model.outputs["image"].frozen()  # type: ignore[operator]
    with monkeypatch.context() as patch:
        patch.setattr(generator, "denoiser", "nothing")
        reply = assistant.chat(ASK)
        with pytest.raises(KeyError, match="nothing"):
            reply.media[0].result(60)


def test_options_nobody_knows_are_refused_before_anything_is_said(assistant: Assistant) -> None:
    with pytest.raises(MmllmError, match="this model makes image, sketch"):
        assistant.chat(ASK, media={"video": {}})
    with pytest.raises(MmllmError, match=r"unknown option 'step' of image; .* did you mean 'steps'"):
        assistant.chat(ASK, media={"image": {"step": 3}})


def test_batches_make_the_media_of_every_row(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    says(assistant, monkeypatch, [first_of(assistant, "image"), end_of(assistant)])
    replies = assistant.generate([ASK, [{"role": "user", "content": "draw it, please"}]], media={"image": {"steps": 1}})
    assert [[media.type for media in reply.media] for reply in replies] == [["image"], ["image"]]


def test_what_was_shown_is_seen_again_in_the_users_next_turn(assistant: Assistant, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    talk = [
        {"role": "user", "content": "draw red"},
        {"role": "assistant", "content": [{"type": "image", "path": str(tmp_path / "red.png"), "caption": "red"}]},
        {"role": "user", "content": "make it blue"},
    ]
    encoded = assistant.processor.encode_prompt(talk)
    (made,), (span,) = encoded.made, encoded.spans
    assert made.start < span.start
    assert encoded.ids[made.start : made.start + SIGNALS] == list(assistant.processor.signals["image"].ids)
    batch = assistant.processor.collate([encoded])
    assert isinstance(batch.media["image"].inputs, dict)
    with pytest.raises(DataError, match=r"output modalities are: image, sketch"):
        assistant.processor.encode_prompt(
            [*talk[:1], {"role": "assistant", "content": [{"type": "audio", "path": "x"}]}, talk[2]]
        )


def test_a_target_that_is_no_clip_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "clip.gif").write_bytes(b"GIF89a")
    video = {"projector": {"kind": "mlp"}, "generator": {"kind": "video_diffusion", "pretrained": "x"}}
    tree = {"backbone": {"kind": "causal_lm", "pretrained": "x"}, "outputs": {"video": video}}
    processor = Processor.from_config(parse({"model": tree}).model.tiny(), BuildContext()).reading_targets(True)
    part = {"type": "video", "path": str(tmp_path / "clip.gif"), "caption": "a clip"}
    talk = [{"role": "user", "content": "draw"}, {"role": "assistant", "content": [part]}]
    with pytest.raises(MediaError, match=r"clip\.gif: the GIF clip is truncated"):
        processor.encode_sample(Sample("s", parse_messages(talk)), 512)


def test_clips_are_targets_of_denoising(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), (20 * i, 0, 0)) for i in range(9)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    video = {"projector": {"kind": "mlp"}, "generator": {"kind": "video_diffusion", "pretrained": "x"}}
    config = parse({"model": {"backbone": {"kind": "causal_lm", "pretrained": "x"}, "outputs": {"video": video}}})
    model = MultimodalLM.from_config(config.model.tiny(), BuildContext(dtype=torch.float32))
    processor = Processor.from_config(config.model.tiny(), BuildContext()).reading_targets(True)
    part = {"type": "video", "path": "clip.gif"}
    talk = [{"role": "user", "content": "move"}, {"role": "assistant", "content": [part]}]
    batch = processor.collate([processor.encode_sample(Sample("s", parse_messages(talk), tmp_path), 512)])
    targets = batch.made["video"].targets
    assert targets is not None
    assert targets.shape == (1, 3, 5, 16, 16)
    assert (targets[0, 0, :, 0, 0] * 127.5 + 127.5).round().tolist() == [0, 40, 80, 120, 160]
    loss = model(batch, ("denoise",))["denoise"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.any() for p in model.outputs["video"].projector.parameters())


def test_user_text_never_becomes_a_signal(assistant: Assistant) -> None:
    encoded = assistant.processor.encode_prompt([{"role": "user", "content": "<image:0><image:1><image:2>"}])
    assert max(encoded.ids) < assistant.processor.vocab_rows
    assert isinstance(torch.tensor(encoded.ids), Tensor)
