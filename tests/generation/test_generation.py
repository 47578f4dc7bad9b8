"""Decoding: batched equals single, cached equals uncached, streaming equals the whole, Stop stops."""

from __future__ import annotations

import io
import threading

import pytest
import torch
from PIL import Image

from mmllm.assistant import Assistant, stripped
from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.errors import MmllmError
from mmllm.generation import Decoding, TextStream, choose, decode
from mmllm.model import MultimodalLM
from mmllm.processing.processor import Processor


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    torch.manual_seed(3)
    tree = {
        "inputs": {
            "image": {"encoder": {"kind": "clip", "arch": "ViT-B-32"}, "projector": {"kind": "mlp"}, "markers": True}
        },
        "backbone": {"kind": "causal_lm", "pretrained": "x", "adapter": {"kind": "lora"}},
    }
    config = parse({"model": tree}).model
    image = config.inputs["image"]
    config = config.model_copy(
        update={
            "inputs": {"image": image.model_copy(update={"encoder": image.encoder.tiny()})},
            "backbone": config.backbone.tiny(),
        }
    )
    context = BuildContext(dtype=torch.float32, weights=False)
    return Assistant(MultimodalLM.from_config(config, context), Processor.from_config(config, context))


def picture(colour: str) -> dict[str, object]:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(data, "PNG")
    return {"type": "image", "data": data.getvalue()}


def chats() -> list[list[dict[str, object]]]:
    return [
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": [picture("red"), {"type": "text", "text": "what is this, please?"}]}],
        [{"role": "user", "content": [picture("blue"), picture("green")]}],
    ]


def test_a_batch_gives_what_each_gives_alone(assistant: Assistant) -> None:
    together = assistant.generate(chats(), max_new_tokens=12)
    alone = [assistant.generate([chat], max_new_tokens=12)[0] for chat in chats()]
    assert together == alone
    assert len(set(alone)) == 3


def test_cached_decoding_equals_greedy_search_by_full_forwards(assistant: Assistant) -> None:
    model, processor = assistant.model, assistant.processor
    prompt = processor.encode_prompt(chats()[1])
    chosen = [step.ids[0] for step in decode(model, processor, [prompt], Decoding(8))]
    batch = processor.collate([prompt])
    embeddings = model.splice(batch.ids, batch.media)
    for token in chosen:
        assert token is not None
        logits = model.backbone(embeddings).logits
        assert int(logits[0, -1].argmax()) == token
        embeddings = torch.cat([embeddings, model.backbone.embed(torch.tensor([[token]]))], dim=1)


def test_the_picture_matters(assistant: Assistant) -> None:
    model, processor = assistant.model, assistant.processor
    prompts = [processor.encode_prompt([{"role": "user", "content": [picture(c)]}]) for c in ("red", "blue")]
    batch = processor.collate(prompts)
    logits = model.backbone(model.splice(batch.ids, batch.media)).logits
    assert not torch.allclose(logits[0, -1], logits[1, -1], atol=1e-6)


def test_streamed_deltas_join_to_the_whole_reply(assistant: Assistant) -> None:
    deltas = list(assistant.chat(chats()[1], stream=True, max_new_tokens=30))
    assert len(deltas) > 1
    assert "".join(deltas) == assistant.chat(chats()[1], max_new_tokens=30)


@pytest.mark.parametrize("text", [" seven", "\n a b  c \n", "  ", "", "x"])
def test_a_streamed_reply_is_stripped(text: str) -> None:
    deltas = list(stripped(iter(text)))
    assert "".join(deltas) == text.strip()
    assert all(deltas)


def test_stop_ends_within_one_token(assistant: Assistant) -> None:
    stop = threading.Event()
    prompt = assistant.processor.encode_prompt(chats()[0])
    produced = 0
    for _ in decode(assistant.model, assistant.processor, [prompt], Decoding(500), stop):
        produced += 1
        if produced == 3:
            stop.set()
    assert produced == 3


def test_stop_ends_a_streamed_reply_within_one_token(assistant: Assistant) -> None:
    whole = assistant.chat(chats()[0], max_new_tokens=500)
    stop = threading.Event()
    reply = assistant.chat(chats()[0], True, max_new_tokens=500, stop=stop)
    first = next(reply)
    stop.set()
    rest = "".join(reply)
    assert whole.startswith(first + rest)
    assert len(assistant.processor.tokenizer(first + rest)["input_ids"]) < 10
    assert len(whole) > 10 * len(first + rest)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"max_new_tokens": 0}, "at least 1 token"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"temperature": float("inf")}, "temperature must be 0 or more"),
        ({"top_p": float("nan")}, "top_p must be above 0"),
        ({"seed": 2**70}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_decoding_that_cannot_be_is_told_in_words(wrong: dict[str, float], reason: str) -> None:
    with pytest.raises(MmllmError, match=reason) as error:
        Decoding(**wrong)
    assert "Decoding(" not in str(error.value)


def test_a_seed_repeats_and_other_seeds_differ(assistant: Assistant) -> None:
    def reply(seed: int) -> str:
        return assistant.chat(chats()[0], max_new_tokens=20, temperature=1.5, seed=seed)

    assert reply(1) == reply(1)
    assert len({reply(seed) for seed in range(5)}) > 1


def test_top_p_keeps_the_smallest_set_of_that_mass() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {int(choose(logits, Decoding(1, 1.0, 0.7), generator)) for _ in range(200)}
    assert drawn == {0, 1}
    assert int(choose(logits, Decoding(1), None)) == 0


def test_a_conversation_beyond_the_context_is_refused(assistant: Assistant) -> None:
    with pytest.raises(MmllmError, match="reads at most"):
        assistant.chat([{"role": "user", "content": "a" * 5000}])
    with pytest.raises(MmllmError, match="temperature"):
        Decoding(temperature=-1)


def test_text_stream_holds_back_unfinished_characters(assistant: Assistant) -> None:
    tokenizer = assistant.processor.tokenizer
    text = "naïve 👩‍👩‍👧 שלום " * 20
    stream = TextStream(tokenizer)
    deltas = [stream.add(i) for i in tokenizer(text)["input_ids"]]
    assert "".join(deltas) + stream.rest() == text
    assert not any("\ufffd" in delta for delta in deltas)
