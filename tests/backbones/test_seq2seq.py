"""Encoder-decoders: where a conversation is cut, several replies in one, the template, and a whole system in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.assistant import load as load_assistant
from mmllm.backbones.causal_lm import TEMPLATES, byte_tokenizer
from mmllm.backbones.seq2seq import Seq2SeqConfig
from mmllm.backbones.seq2seq_module import Seq2Seq, cut_replies
from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.config.run import ModelConfig
from mmllm.processing.messages import Sample, parse_messages
from mmllm.processing.processor import Processor
from mmllm.training.run import train
from tests.training.systems import MODEL, write_data

NUMBERS = {"model_type": "t5", "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3, "vocab_size": 272}


def backbone(**keys: Any) -> Seq2Seq:
    torch.manual_seed(0)
    config = Seq2SeqConfig.model_validate({"architecture": NUMBERS, **keys})
    return config.build(BuildContext(dtype=torch.float32, weights=False), num_new_tokens=2).eval()


def test_a_conversation_is_cut_before_each_reply() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]]).bool()
    cut = cut_replies(real, torch.tensor([[0, 4, 5], [0, 6, 8], [1, 2, 5]]))
    before = [row[keep].tolist() for row, keep in zip(cut.before, cut.mask, strict=True)]
    assert before == [[2, 3], [2, 3, 4, 5], [8, 9]]  # flat: the second row begins at 8
    assert [cut.reply[0, 0].item(), *cut.reply[1, :2].tolist(), *cut.reply[2].tolist()] == [4, 6, 7, 10, 11, 12]
    # Each reply takes four outputs, the first at the start token: what predicts position p stands at p - 1.
    places = {3: 0, 4: 1, 5: 4, 6: 5, 7: 6, 9: 8, 10: 9, 11: 10, 12: 11}
    assert {place: int(to) for place, to in enumerate(cut.place) if to >= 0} == places


def test_two_replies_of_one_row_are_what_each_is_alone() -> None:
    model, ids = backbone(), torch.randint(0, 270, (1, 9))
    embedded = model.embed(ids).detach()
    with torch.no_grad():
        both = model(embedded, replies=torch.tensor([[0, 2, 5], [0, 7, 9]])).logits[0]
        first = model(embedded[:, :5], replies=torch.tensor([[0, 2, 5]])).logits[0]
        second = model(embedded, replies=torch.tensor([[0, 7, 9]])).logits[0]
        theirs = model.model(
            input_ids=ids[:, :7], decoder_input_ids=torch.tensor([[model.start_token, *ids[0, 7:].tolist()]])
        ).logits[0]
    torch.testing.assert_close(both[1:5], first[1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(both[6:9], second[6:], atol=1e-5, rtol=0)
    torch.testing.assert_close(second[6:], theirs, atol=1e-5, rtol=0)
    assert not both[0].any()  # nothing is replied there
    assert not both[5].any()


def test_the_processor_names_every_supervised_reply() -> None:
    tokenizer = byte_tokenizer()
    config = ModelConfig.model_validate({"backbone": {"kind": "seq2seq", "architecture": NUMBERS}})
    processor = Processor.from_config(config, BuildContext(weights=False))
    turns = [("user", "a"), ("assistant", "bc"), ("user", "d"), ("assistant", "efg")]
    messages = parse_messages([{"role": role, "content": text} for role, text in turns], "s")
    one = processor.encode_sample(Sample("s", messages, Path()), 1000)
    for left in (False, True):
        batch = processor.collate(
            [one, processor.encode_prompt([{"role": "user", "content": "x" * 90}])], pad_left=left
        )
        assert batch.replies is not None
        spans = [(row, tokenizer.decode(batch.ids[row, first:behind])) for row, first, behind in batch.replies.tolist()]
        assert spans == [(0, "bc<|im_end|>"), (0, "efg<|im_end|>")]


def test_the_template_ends_messages_and_begins_replies() -> None:
    tokenizer = byte_tokenizer()
    template = (TEMPLATES / "seq2seq.jinja").read_text()
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}]

    def rendered(**tokens: str) -> Any:
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template(
            conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **tokens
        )

    t5, spans = rendered(eos_token="</s>")
    assert t5 == ["what?</s>a cat</s>"]
    assert [t5[0][slice(*span)] for span in spans[0]] == ["a cat</s>"]
    bart, spans = rendered(bos_token="<s>", eos_token="</s>")  # whose decoder writes <s> first
    assert bart == ["<s>what?</s><s>a cat</s>"]
    assert [bart[0][slice(*span)] for span in spans[0]] == ["<s>a cat</s>"]
    assert tokenizer.chat_template != template


@pytest.mark.parametrize("adapter", [{"kind": "lora", "rank": 2}, {"kind": "adapter", "dim": 4}])
def test_a_system_trains_saves_loads_and_answers(adapter: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    data = write_data(tmp_path / "data", 8)
    parts = {**MODEL, "backbone": {"kind": "seq2seq", "architecture": NUMBERS, "adapter": adapter}}
    stage = {"name": "instruct", "train": ["inputs.*.projector", "backbone.adapter", "backbone.new_tokens"], "lr": 1e-2}
    stage |= {"data": [str(data)], "batch_size": 4, "micro_batch_size": 2, "max_steps": 12, "epochs": 8, "samples": 1}
    run = {"model": parts, "stages": [stage], "output": str(tmp_path / "run"), "trackers": []}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    folder = train(load(tmp_path / "run.yaml"), BuildContext(root=tmp_path))
    first, second = load_assistant(folder), load_assistant(folder)
    content = [{"type": "image", "path": str(tmp_path / "data" / "red.png")}, {"type": "text", "text": "what?"}]
    question = [[{"role": "user", "content": content}], [{"role": "user", "content": "hello, who are you?"}]]
    both = first.generate(question, max_new_tokens=6)
    assert [str(reply) for reply in both] == [str(second.chat(one, max_new_tokens=6)) for one in question]
