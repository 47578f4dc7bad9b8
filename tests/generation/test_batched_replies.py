"""Batches: read in one row as if padded, decoded as each alone, streamed by index; rows that have ended leave."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmllm.assistant import Assistant
from mmllm.backbones.causal_lm import CausalLMConfig, LanguageModelConfig
from mmllm.backbones.layout_module import quicken
from mmllm.backbones.reading_module import GROWTH, PaddedReading, RowReading
from mmllm.backbones.seq2seq import Seq2SeqConfig
from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.errors import DataError, MediaError
from mmllm.generation import Decoding, decode, read
from mmllm.model import MultimodalLM
from mmllm.processing.batch import Encoded
from mmllm.processing.processor import Processor
from mmllm.replies import Media, Truncated

CPU = torch.device("cpu")


def built(backbone: dict[str, Any], **outputs: Any) -> Assistant:
    torch.manual_seed(5)
    image = {"encoder": {"kind": "clip", "pretrained": "x"}, "projector": {"kind": "linear"}, "markers": True}
    tree = {"inputs": {"image": image}, "backbone": backbone, "outputs": outputs}
    config = parse({"model": tree}).model.tiny()
    context = BuildContext(dtype=torch.float32)
    model = MultimodalLM.from_config(config, context)
    for module in model.backbone.model.modules():
        if isinstance(module, nn.Linear):  # larger than it begins, so that what is attended to matters
            nn.init.normal_(module.weight, std=0.3)
    return Assistant(model, Processor.from_config(config, context))


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return built({"kind": "causal_lm", "pretrained": "x", "adapter": {"kind": "lora"}})


@pytest.fixture(scope="module")
def painter() -> Assistant:
    out = {"projector": {"kind": "tiny_transformer"}, "generator": {"kind": "stable_diffusion", "pretrained": "x"}}
    return built({"kind": "causal_lm", "pretrained": "x"}, image={**out, "signal_tokens": 3})


def picture(colour: str) -> dict[str, object]:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(data, "PNG")
    return {"type": "image", "data": data.getvalue()}


def chats() -> list[list[dict[str, Any]]]:
    contents: list[Any] = ["hi", [picture("red"), {"type": "text", "text": "what is this, please?"}]]
    contents += [[picture("blue"), picture("green")], "a", "and a somewhat longer question than the others?"]
    return [[{"role": "user", "content": content}] for content in contents]


def prompts_of(assistant: Assistant) -> list[Encoded]:
    return [assistant.processor.encode_prompt(chat) for chat in chats()]


@torch.inference_mode()
def padded(assistant: Assistant, prompts: list[Encoded]) -> tuple[PaddedReading, Any]:
    batch = assistant.processor.collate(prompts, pad_left=True)
    reading = PaddedReading(assistant.model.backbone, batch.attention_mask)
    return reading, reading.begin(assistant.model.splice(batch.ids, batch.media))


@torch.inference_mode()
def test_prompts_in_one_row_are_read_as_padded_ones_and_go_on_so(assistant: Assistant) -> None:
    prompts = prompts_of(assistant)
    widths = list[torch.Size]()
    hook = assistant.model.backbone.model.get_submodule("base_model.model.model.layers.0").register_forward_pre_hook(
        lambda _, args: widths.append(args[0].shape)
    )
    reading, found = read(assistant.model, assistant.processor, prompts, CPU)
    hook.remove()
    assert isinstance(reading, RowReading)
    assert widths[0][:2] == (1, sum(len(prompt.ids) for prompt in prompts))  # nothing was computed for padding
    other, expected = padded(assistant, prompts)
    for token in (7, 40, 99):
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.states, expected.states, atol=1e-5, rtol=1e-5)
        embeddings = assistant.model.backbone.embed(torch.arange(token, token + len(prompts))[:, None])
        found, expected = reading.step(embeddings), other.step(embeddings)


@torch.inference_mode()
@pytest.mark.parametrize("alike", [False, True])
def test_a_cache_that_grows_holds_what_was_read(assistant: Assistant, alike: bool) -> None:
    prompts = [prompts_of(assistant)[0]] * 2 if alike else prompts_of(assistant)
    reading, found = read(assistant.model, assistant.processor, prompts, CPU)
    other, expected = padded(assistant, prompts)
    for token in range(2 * GROWTH + 3):
        embeddings = assistant.model.backbone.embed(torch.arange(token, token + len(prompts))[:, None])
        found, expected = reading.step(embeddings), other.step(embeddings)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)


FAMILIES: dict[str, type[LanguageModelConfig]] = dict.fromkeys(
    ("llama", "gpt2", "qwen3", "mistral", "bloom", "mamba", "rwkv", "jamba"), CausalLMConfig
)
FAMILIES |= {"t5": Seq2SeqConfig}


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_stay_go_on_as_if_none_had_left(family: str) -> None:
    torch.manual_seed(0)
    config = FAMILIES[family].model_validate({"architecture": {"model_type": family}}).tiny()
    backbone = config.build(BuildContext(dtype=torch.float32, weights=False), num_new_tokens=0).eval()
    lengths = [3, 7, 5]
    embedded = [torch.randn(length, backbone.hidden_dim) for length in lengths]
    mask = torch.tensor([[0] * (7 - length) + [1] * length for length in lengths])
    laid = torch.stack([torch.cat([torch.zeros(7 - len(one), backbone.hidden_dim), one]) for one in embedded])
    readings = [backbone.reading(mask) for _ in range(2)]
    if backbone.reads_rows(lengths):
        readings.append(backbone.row_reading(lengths))
    expected = [reading.begin(laid if i < 2 else torch.cat(embedded)[None]) for i, reading in enumerate(readings)]
    for out in expected[1:]:
        torch.testing.assert_close(out.logits, expected[0].logits, atol=1e-4, rtol=1e-4)
    whole, *fewer = readings
    for reading in fewer:
        reading.keep(torch.tensor([0, 2]))  # the longest leaves, and with it the columns that it alone had
    for _ in range(3):
        given = torch.randn(3, 1, backbone.hidden_dim)
        wanted = whole.step(given).logits[[0, 2]]
        for reading in fewer:
            torch.testing.assert_close(reading.step(given[[0, 2]]).logits, wanted, atol=1e-4, rtol=1e-4)
    if isinstance(readings[-1], RowReading):
        held = readings[-1].cache.buffers[0]
        assert held is not None
        assert held[0].shape[0] == 2
        assert readings[-1].cache.get_seq_length() == 5 + 3
    assert (family in ("llama", "gpt2", "qwen3")) == (len(readings) == 3)


def script(assistant: Assistant, monkeypatch: pytest.MonkeyPatch, wishes: list[list[int]]) -> list[int]:
    """Let conversation i say ``wishes[i]``, told by its prompt's length and what it has read since; sizes of the batches."""
    model, lengths = assistant.model, [len(prompt.ids) for prompt in prompts_of(assistant)]
    assert len(set(lengths)) == len(lengths)
    sizes = list[int]()

    def wishing(reading: RowReading, out: Any) -> Any:
        logits = torch.zeros_like(out.logits)
        read_so_far = reading.places[:, 0].tolist()
        for row, (start, at) in enumerate(zip(starts(reading), read_so_far, strict=True)):
            own = wishes[lengths.index(start)]
            logits[row, own[min(at - start, len(own) - 1)]] = 9.0
        sizes.append(len(logits))
        return out._replace(logits=logits)

    begun: dict[int, list[int]] = {}

    def starts(reading: RowReading) -> list[int]:
        return begun[id(reading)]

    begin, step, keep = RowReading.begin, RowReading.step, RowReading.keep

    def first(self: RowReading, embeddings: Tensor) -> Any:
        begun[id(self)] = list(self.lengths)
        return wishing(self, begin(self, embeddings))

    def fewer(self: RowReading, rows: Tensor) -> None:
        begun[id(self)] = [begun[id(self)][row] for row in rows.tolist()]
        keep(self, rows)

    monkeypatch.setattr(RowReading, "begin", first)
    monkeypatch.setattr(RowReading, "step", lambda self, embeddings: wishing(self, step(self, embeddings)))
    monkeypatch.setattr(RowReading, "keep", fewer)
    assert model.backbone.reads_rows(lengths)
    return sizes


def words(assistant: Assistant, text: str) -> list[int]:
    return [*assistant.processor.tokenizer.encode(text, add_special_tokens=False)]


def test_each_streams_its_own_and_leaves_when_it_has_ended(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = int(assistant.processor.tokenizer.eos_token_id)
    texts = ["one", "", " a b ", "quite a long one", "x"]
    sizes = script(assistant, monkeypatch, [[*words(assistant, text), end] for text in texts])
    parts = list(assistant.chat_batch(chats(), stream=True))
    joined = ["".join(str(part) for index, part in parts if index == row) for row in range(len(texts))]
    assert joined == [text.strip() for text in texts]
    assert [index for index, _ in parts][:3] == [0, 3, 4]  # they come in turn, not one conversation after the other
    assert sizes[0] == 5
    assert sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)
    assert [str(reply) for reply in assistant.chat_batch(chats())] == joined


def test_a_batch_says_what_each_says_alone(assistant: Assistant) -> None:
    alone = [assistant.chat(chat, max_new_tokens=40) for chat in chats()]
    parts = list(assistant.chat_batch(chats(), stream=True, max_new_tokens=40))
    assert ["".join(str(p) for i, p in parts if i == row) for row in range(len(alone))] == alone
    assert assistant.chat_batch(chats(), max_new_tokens=40) == alone
    assert assistant.generate(chats(), max_new_tokens=40) == [
        assistant.generate([chat], max_new_tokens=40)[0] for chat in chats()
    ]
    assert len(set(alone)) > 3
    assert assistant.chat_batch([]) == []


def test_media_of_a_batch_come_with_their_conversation(painter: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    end, first = int(painter.processor.tokenizer.eos_token_id), painter.processor.signals["image"].first
    a, b = words(painter, "ab")
    wishes = [[a, first, first, first, b, end], [end], [first, first, first, first, first], [b, end], [a, a, a, end]]
    script(painter, monkeypatch, wishes)
    parts = list(painter.chat_batch(chats(), stream=True, max_new_tokens=8, media={"image": {"steps": 1}}))
    seen = [[p.type if isinstance(p, Media) else p for i, p in parts if i == row] for row in range(5)]
    assert seen == [["a", "image", "b"], [], ["image", "image", Truncated("image")], ["b"], ["a", "a", "a"]]
    media = [part for _, part in parts if isinstance(part, Media)]
    assert all(medium.result(60).size == (16, 16) for medium in media)  # type: ignore[attr-defined]
    replies = painter.chat_batch(chats(), max_new_tokens=8, media={"image": {"steps": 1}})
    assert (str(replies[0]), len(replies[0].media), replies[0].truncated) == ("ab", 1, [])
    assert (len(replies[2].media), replies[2].truncated) == (2, ["image"])


def test_signals_of_a_batch_are_those_of_each_alone(painter: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    end, first = int(painter.processor.tokenizer.eos_token_id), painter.processor.signals["image"].first
    prompts = prompts_of(painter)
    script(painter, monkeypatch, [[first, end], [end], [7, first, end], [end], [7, 8, 9, first, end]])
    model, processor = painter.model, painter.processor
    together = {g.row: g.signals for s in decode(model, processor, prompts, Decoding(12)) for g in s.groups}
    assert sorted(together) == [0, 2, 4]
    for row, found in together.items():
        (group,) = [g for s in decode(model, processor, [prompts[row]], Decoding(12)) for g in s.groups]
        torch.testing.assert_close(found, group.signals, atol=1e-5, rtol=1e-5)


def test_a_faulty_conversation_of_a_batch_is_named(assistant: Assistant, tmp_path: Path) -> None:
    lost = [{"role": "user", "content": [{"type": "image", "path": str(tmp_path / "none.png")}]}]
    with pytest.raises(MediaError, match="conversation 1"):
        list(assistant.chat_batch([chats()[0], lost], stream=True))
    with pytest.raises(DataError, match="conversation 1"):
        assistant.chat_batch([chats()[0], [{"role": "assistant", "content": "a"}]])


def test_quickened_layers_give_the_same_and_still_learn() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8, bias=False))
    table, head = nn.Embedding(64, 8), nn.Linear(8, 64, bias=False)
    head.weight = table.weight
    given = [torch.randn(1, 1, 8), torch.randn(5, 1, 8), torch.randn(1, 300, 8)]
    with torch.no_grad():
        expected = [head(model(x)) for x in given]
        assert quicken(model, nn.ModuleList([table, head])) == 3
        for x, wanted in zip(given, expected, strict=True):
            torch.testing.assert_close(head(model(x)), wanted, atol=1e-6, rtol=1e-5)
    assert Counter(layer.weight.stride()[0] for layer in (model[0], model[2], head)) == {1: 1, 32: 1, 8: 1}
    model(given[1]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    half = nn.Linear(8, 32).to(torch.bfloat16)
    assert quicken(half) == 0
    assert half.weight.is_contiguous()
