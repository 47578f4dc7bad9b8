"""LLaVA, LLaMA-Factory and NExT-GPT rows: where media land, what is refused, which layout a row has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_rows import row

from mmllm.config.base import BuildContext
from mmllm.data.layouts import guess
from mmllm.data.readers import FileReaderConfig, LlavaConfig, NextGPTConfig, ShareGPTConfig
from mmllm.errors import DataError
from mmllm.processing.messages import Part, Sample

Write = Callable[..., Path]
HUMAN, GPT = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}


def read(reader: type[FileReaderConfig], write: Write, *rows: Any, **options: Any) -> list[Sample]:
    path = write(json.dumps(list(rows)), name="data.json")
    return list(reader(path=str(path), kind=reader.model_fields["kind"].default, **options).open(BuildContext()))


def parts(sample: Sample) -> list[tuple[str, list[tuple[str, str | bytes]]]]:
    return [(message.role, [(part.type, part.value) for part in message.parts]) for message in sample.messages]


def test_llava_conversations(write: Write) -> None:
    one, many, text = read(
        LlavaConfig,
        write,
        {"id": "1", "image": "a.jpg", "conversations": [HUMAN, GPT], "source": "x"},
        {"id": 2, "image": ["a.jpg", "b.jpg"], "conversations": [{**HUMAN, "value": "<image> or <image>?"}, GPT]},
        {"id": "3", "conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}, GPT]},
    )
    assert parts(one) == [
        ("user", [("image", "a.jpg"), ("text", "\nWhat is it?")]),
        ("assistant", [("text", "A cat.")]),
    ]
    assert (one.id, one.tags) == ("1", {"source": "x"})
    assert parts(many)[0][1] == [("image", "a.jpg"), ("text", " or "), ("image", "b.jpg"), ("text", "?")]
    assert [role for role, _ in parts(text)] == ["system", "user", "assistant"]


def test_llava_questions_and_captions(write: Write) -> None:
    rows = (
        {"question_id": 4, "image": "a.jpg", "text": "What?", "category": "conv"},
        {"id": "5", "image": "b.jpg", "captions": ["A dog.", "A brown dog."], "instances": []},
    )
    question, caption = read(LlavaConfig, write, *rows, prompt="Say what you see.")
    assert parts(question) == [("user", [("image", "a.jpg"), ("text", "\nWhat?")])]
    assert (question.id, question.tags) == ("4", {"category": "conv"})
    assert parts(caption) == [
        ("user", [("image", "b.jpg"), ("text", "\nSay what you see.")]),
        ("assistant", [("text", "A dog.")]),
    ]


def test_sharegpt_media_are_used_up_in_order_over_the_turns(write: Write) -> None:
    turns = [
        {"role": "user", "content": "<image>Who? <audio>"},
        {"role": "assistant", "content": "Kim."},
        {"role": "user", "content": "And here?<image>"},
        {"role": "assistant", "content": "Lee."},
    ]
    (sample,) = read(ShareGPTConfig, write, {"messages": turns, "images": ["1.jpg", "2.jpg"], "audios": ["a.wav"]})
    assert parts(sample)[0] == ("user", [("image", "1.jpg"), ("text", "Who? "), ("audio", "a.wav")])
    assert parts(sample)[2] == ("user", [("text", "And here?"), ("image", "2.jpg")])
    assert sample.id == "data.json:1"


def test_sharegpt_style_with_system_and_video(write: Write) -> None:
    turns = [{"from": "human", "value": "<video>Funny?"}, {"from": "gpt", "value": "Yes."}]
    row = {"conversations": turns, "videos": ["v.mp4"], "system": "Be brief.", "tools": ""}
    (sample,) = read(ShareGPTConfig, write, row)
    assert parts(sample)[:2] == [
        ("system", [("text", "Be brief.")]),
        ("user", [("video", "v.mp4"), ("text", "Funny?")]),
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "value": "a.jpg"},
        {"type": "image_url", "image_url": {"url": "a.jpg"}},
        {"type": "image", "path": "a.jpg"},
        {"type": "image"},
    ],
)
def test_content_parts_in_their_spellings(write: Write, part: dict[str, Any]) -> None:
    content = [part, {"type": "text", "value": "Who?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "Kim."}]
    (sample,) = read(ShareGPTConfig, write, {"messages": turns, "images": ["a.jpg"] if len(part) == 1 else []})
    assert sample.messages[0].parts == (Part("image", "a.jpg"), Part("text", "Who?"))


def test_nextgpt_pairs_lie_in_the_modalitys_folder(write: Write) -> None:
    turns = [{"from": "human", "value": "<audio>\nWhat is heard?"}, {"from": "gpt", "value": "A train."}]
    rows = (
        {"input_audio": "7.wav", "conversations": turns},
        {"id": "8", "image_name": "8.jpg", "caption": "A cat."},
        {"audio_id": 9, "audio_name": "9.wav", "caption": "Rain."},
    )
    heard, seen, named = read(NextGPTConfig, write, *rows, prompt="Describe.", folders={"image": "pics"})
    assert parts(heard)[0] == ("user", [("audio", "audios/7.wav"), ("text", "\nWhat is heard?")])
    assert parts(seen) == [
        ("user", [("image", "pics/8.jpg"), ("text", "\nDescribe.")]),
        ("assistant", [("text", "A cat.")]),
    ]
    assert (named.messages[0].parts[0], named.tags) == (Part("audio", "audios/9.wav"), {"audio_id": 9})
    (converted,) = read(NextGPTConfig, write, rows[0], suffix=".flac")
    assert converted.messages[0].parts[0] == Part("audio", "audios/7.flac")


@pytest.mark.parametrize(
    ("reader", "bad", "message"),
    [
        (LlavaConfig, {"image": "a", "conversations": [GPT]}, "the text has 0 <image>, but the row gives 1"),
        (LlavaConfig, {"conversations": [HUMAN, GPT]}, "the text has 1 <image>, but the row gives 0"),
        (LlavaConfig, {"image": ["a", "b"], "conversations": [HUMAN, GPT]}, "has 1 <image>, but the row gives 2"),
        (LlavaConfig, {"audio": "a", "conversations": [HUMAN, GPT]}, "1 <image>, but the row gives 0"),
        (LlavaConfig, {"image": 3, "conversations": [HUMAN, GPT]}, "image: found 3, expected the path of a file"),
        (LlavaConfig, {"image": [""], "conversations": [HUMAN, GPT]}, "image: found '', expected the path"),
        (LlavaConfig, {"conversations": [{"from": "human", "value": None}]}, "conversations[0]: value is NoneType"),
        (LlavaConfig, {"conversations": [{"from": "tool", "value": "x"}]}, "conversations[0]: from is 'tool'"),
        (LlavaConfig, {"conversations": "x"}, "conversations: expected a list of turns, found str"),
        (LlavaConfig, {"conversations": [7]}, "conversations[0]: expected a mapping, found int"),
        (LlavaConfig, {"question_id": 1, "text": "An answer."}, "question_id without a picture"),
        (LlavaConfig, {"id": "x"}, 'expected "conversations", or "question_id" and "text"; found keys id'),
        (ShareGPTConfig, {"conversations": [], "chosen": GPT, "rejected": GPT}, "a preference pair"),
        (ShareGPTConfig, {"instruction": "x", "output": "y"}, "an instruction/input/output row"),
        (ShareGPTConfig, {"messages": [], "tools": "[...]"}, "tool use is not supported"),
        (ShareGPTConfig, {"conversations": [{"from": "function_call", "value": "{}"}]}, "from is 'function_call'"),
        (ShareGPTConfig, {"text": "x"}, 'expected "messages" or "conversations"'),
        (ShareGPTConfig, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a text part whose value"),
        (ShareGPTConfig, {"messages": [{"role": "user", "content": [1]}]}, "turn 0, part 0: expected"),
        (
            NextGPTConfig,
            {"output_image": "a.jpg", "conversations": [GPT]},
            "the text has 0 <image>, but the row gives 1",
        ),
        (NextGPTConfig, {"image_name": "a.jpg"}, "caption: found NoneType, expected text"),
        (NextGPTConfig, {"caption": "x"}, 'expected "input_image", "output_image", "image_captions" or "image_name"'),
    ],
)
def test_what_a_row_lacks_is_said(
    write: Write, reader: type[FileReaderConfig], bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as error:
        read(reader, write, bad)
    assert "data.json:1: " in str(error.value)
    assert message in str(error.value)


def test_nextgpts_generation_half_gives_what_the_assistant_makes(write: Write) -> None:
    pair = {
        "output_image": "a.jpg",
        "image_captions": "a dog",
        "image_caption_embeddings": "a.npy",
        "conversations": [
            {"from": "human", "value": "draw a dog"},
            {"from": "gpt", "value": "Here it is <image>"},
        ],
    }
    (sample,) = read(NextGPTConfig, write, pair)
    text, made = sample.messages[1].parts
    assert (text.value, made.type, made.caption) == ("Here it is ", "image", "a dog")
    assert str(made.value).endswith("a.jpg")


def test_nextgpts_instruction_data_make_what_the_captions_say(write: Write) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog. It sounds so: <audio>"},
        {"from": "human", "value": "Show me two more, and <video>"},
        {"from": "gpt", "value": "<image> and <image>, moving: <video>"},
    ]
    row = {
        "input_image": "seen.jpg",
        "input_video": "seen.mp4",
        "output_video": "made.mp4",
        "image_captions": ["a poodle", "a terrier"],
        "audio_captions": "barking",
        "video_captions": ["a dog runs"],
        "image_caption_embeddings": ["x.npy", "y.npy"],
        "conversations": turns,
    }
    (sample,) = read(NextGPTConfig, write, row)
    media = [[(p.type, p.value, p.caption) for p in m.parts if p.type != "text"] for m in sample.messages]
    assert media == [
        [("image", "images/seen.jpg", None)],
        [("audio", None, "barking")],
        [("video", "videos/seen.mp4", None)],
        [("image", None, "a poodle"), ("image", None, "a terrier"), ("video", "videos/made.mp4", "a dog runs")],
    ]
    assert sample.messages[3].text == " and , moving: "
    with pytest.raises(DataError, match="1 more image_captions than <image> of the assistant"):
        read(NextGPTConfig, write, {**row, "output_image": ["a.jpg", "b.jpg"], "image_captions": ["a", "b", "c"]})
    with pytest.raises(DataError, match="the text has 2 <image>, but the row gives 1"):
        read(NextGPTConfig, write, {**row, "image_captions": ["a poodle"]})


def test_mosit_dialogues_have_media_on_both_sides(write: Write) -> None:
    row = {
        "image_list": [
            {"image_name": "mosit_i_0_00.jpg", "data_source": "mosit", "caption": "a waterfall"},
            {"image_name": "mosit_i_0_01.jpg", "data_source": "mosit", "caption": "a camera"},
        ],
        "video_list": [],
        "audio_list": [{"audio_name": "mosit_a_0_00.wav", "caption": "water"}],
        "conversation": [
            {
                "from": "human",
                "value": "What is this? <Image>mosit_i_0_01.jpg</Image> And <Video>a film of rain</Video>?",
            },
            {"from": "gpt", "value": "A camera. <Image>mosit_i_0_00.jpg</Image> Hear: <Audio>mosit_a_0_00.wav</Audio>"},
            {"from": "human", "value": "A film?"},
            {"from": "gpt", "value": "<Video>a waterfall in spring</Video>"},
        ],
    }
    (sample,) = read(NextGPTConfig, write, row, suffix=None)
    assert [[(p.type, p.value, p.caption) for p in m.parts] for m in sample.messages] == [
        [
            ("text", "What is this? ", None),
            ("image", "images/mosit_i_0_01.jpg", None),
            ("text", " And ", None),
            ("text", "?", None),
        ],
        [
            ("text", "A camera. ", None),
            ("image", "images/mosit_i_0_00.jpg", "a waterfall"),
            ("text", " Hear: ", None),
            ("audio", "audios/mosit_a_0_00.wav", "water"),
        ],
        [("text", "A film?", None)],
        [("video", None, "a waterfall in spring")],
    ]
    row["conversation"][1]["value"] = "<Audio>lost.wav</Audio>"
    with pytest.raises(DataError, match=r"turn 1: 'lost.wav' is not in audio_list"):
        read(NextGPTConfig, write, row)
    with pytest.raises(DataError, match="image_list: expected a list"):
        read(NextGPTConfig, write, {**row, "image_list": ["a.jpg"]})


def test_nextgpts_turns_may_say_their_modality(write: Write) -> None:
    made = [
        {"from": "human", "value": "Make thunder.", "input_modality": "text"},
        {"from": "gpt", "value": "Here.", "caption": "thunder and rain", "output_modality": "audio"},
    ]
    seen = [
        {"from": "human", "value": "What is it?", "input_modality": "image"},
        {"from": "gpt", "value": "A cat.", "caption": "", "output_modality": "text"},
        {"from": "human", "value": "Big?", "input_modality": "image"},
        {"from": "gpt", "value": "No.", "caption": "", "output_modality": "text"},
    ]
    rows = ({"mm_name": "t2x0.wav", "conversation": made}, {"image_name": "c.jpg", "conversation": seen})
    first, second = read(NextGPTConfig, write, *rows)
    assert first.messages[1].parts == (Part("text", "Here."), Part("audio", None, "thunder and rain"))
    assert first.tags == {"mm_name": "t2x0.wav"}
    assert parts(second) == [
        ("user", [("image", "images/c.jpg"), ("text", "What is it?")]),
        ("assistant", [("text", "A cat.")]),
        ("user", [("text", "Big?")]),
        ("assistant", [("text", "No.")]),
    ]


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (row("a"), "messages"),
        ({"messages": [], "images": []}, "sharegpt"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "value": "x"}]}]}, "sharegpt"),
        ({"conversations": [], "videos": []}, "sharegpt"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "sharegpt"),
        ({"instruction": "", "output": ""}, "sharegpt"),
        ({"id": "1", "image": "a", "conversations": []}, "llava"),
        ({"id": "1", "conversations": []}, "llava"),
        ({"question_id": 1, "image": "a", "text": "?"}, "llava"),
        ({"id": "1", "image": "a", "captions": []}, "llava"),
        ({"input_audio": "a", "conversations": []}, "nextgpt"),
        ({"output_image": "a", "conversations": []}, "nextgpt"),
        ({"image_name": "a", "caption": "b"}, "nextgpt"),
        ({"image_captions": ["a"], "conversations": []}, "nextgpt"),
        ({"image_list": [], "conversation": []}, "nextgpt"),
        ({"text": "x"}, None),
    ],
)
def test_the_layout_is_told_by_the_keys(keys: dict[str, Any], kind: str | None) -> None:
    assert guess(keys) == kind
