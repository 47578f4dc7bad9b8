"""Rows D16 to D25 of the faults that data have: what is in a sample, and where it lands."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_faults import PROCESSOR, saved, tiny_model, tiny_processor
from data_rows import row
from PIL import Image

from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.config.run import DataSource
from mmllm.data.dataset import SampleStream
from mmllm.data.mixture import StageData
from mmllm.data.readers import MessagesConfig
from mmllm.data.validate import run_validate
from mmllm.errors import ConfigError, SampleTooLong
from mmllm.processing.messages import Sample, parse_messages
from mmllm.processing.sources import content_key

Write = Callable[..., Path]


def stream(path: Path, seed: int = 0) -> SampleStream:
    return SampleStream(StageData([DataSource(reader=MessagesConfig(path=str(path)))], seed))


def picture(name: str, kind: str = "image") -> dict[str, Any]:
    return {"type": kind, "path": name}


LLAVA = {"id": "x", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}


def conversation(tmp_path: Path, count: int = 2) -> Sample:
    """Pictures before, between and behind words, a sound, two replies."""
    saved(tmp_path / "noise.png")
    saved(tmp_path / "tone.wav")
    turns: list[dict[str, Any]] = []
    for number in range(count):
        content = [picture("noise.png"), {"type": "text", "text": f"and {number}"}, picture("tone.wav", "audio")]
        turns += [{"role": "user", "content": content}, {"role": "assistant", "content": f"reply {number}"}]
    return Sample("long", parse_messages(turns), tmp_path)


def test_D16_a_sample_is_whole_or_refused_at_every_length(tmp_path: Path) -> None:
    processor, sample = tiny_processor(), conversation(tmp_path)
    whole = processor.encode_sample(sample, 10_000)
    length = len(whole.ids)
    for limit in range(1, length + 2):
        if limit < length:
            with pytest.raises(SampleTooLong, match=f"long: {length} tokens, max_length is {limit}"):
                processor.encode_sample(sample, limit)
            continue
        encoded = processor.encode_sample(sample, limit)
        assert encoded.ids == whole.ids
        for span in encoded.spans:
            placeholder = processor.modalities[span.modality].placeholder
            assert encoded.ids[span.start : span.start + span.count] == [placeholder] * span.count
        batch = processor.collate([encoded])
        assert sum(len(media.positions) for media in batch.media.values()) == sum(span.count for span in encoded.spans)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no user message"),
        ([{"role": "system", "content": "S"}], "no user message"),
        ([{"role": "assistant", "content": "first"}], "turn 0 is from 'assistant'"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": " \n"}], "reply is empty"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": None}], "content is NoneType"),
        ([{"role": "user", "content": "q"}], "without an assistant reply"),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], "content is NoneType"),
    ],
)
def test_D19_conversations_that_cannot_be_learned_from_are_named_by_row(
    write: Write, messages: list[dict[str, Any]], message: str
) -> None:
    path = write(row("good"), {"messages": messages})
    loaded = SampleStream(StageData([DataSource(reader=MessagesConfig(path=str(path)))], 0)).load(
        1, tiny_processor(), 512
    )
    assert loaded.encoded.id == "good"
    assert message in loaded.failures[0].message
    assert "data.jsonl:2" in loaded.failures[0].where + loaded.failures[0].message


def test_D19_ten_thousand_turns() -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"{i}"} for i in range(10_000)]
    began = time.process_time()
    encoded = tiny_processor().encode_sample(Sample("many", parse_messages(turns)), 10**6)
    assert len(encoded.replies) == 5_000
    assert time.process_time() - began < 60


@pytest.mark.parametrize(
    "text",
    ["👩‍👩‍👧‍👦 family", "שלום ‎abc‏", "e\u0301 ñ Å", "a\x00b", "\u202eevil", "x" * 1_000_000],
    ids=["emoji", "right to left", "combining", "NUL", "override", "a megabyte"],
)
def test_D20_any_text_comes_back(write: Write, text: str) -> None:
    path = write(row("t", text, text[:1000]))
    began = time.process_time()
    sample = StageData([DataSource(reader=MessagesConfig(path=str(path)))], 0)[0]
    assert sample.messages[0].text == text
    processor = tiny_processor()
    encoded = processor.encode_sample(sample, 4_000_000)
    supervised = [id for id, flag in zip(encoded.ids, encoded.supervised, strict=True) if flag]
    assert processor.text(supervised) == text[:1000].strip()
    assert text in processor.tokenizer.decode(encoded.ids)
    assert time.process_time() - began < 60


def test_D20_half_a_character_is_a_fault_of_its_row(write: Write) -> None:
    path = write(row("good"), '{"id": "half", "messages": [{"role": "user", "content": "\\ud83d"}]}')
    failure = stream(path).load(1, PROCESSOR, 50).failures[0]
    assert failure.where == f"{path}:2"
    assert "surrogate" in failure.message


def test_D21_validate_names_file_and_line_of_every_fault(
    media: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    (media / "folder.png").mkdir()
    good = row("ok", [picture("red.png"), {"type": "text", "text": "?"}])
    path = write(
        good, row("gone", [picture("none.png")]), row("dir", [picture("folder.png")]), LLAVA, "trailing garbage"
    )
    assert run_validate(str(path)) == 1
    printed = capsys.readouterr().out
    assert all(f"{path}:{line}: " in printed for line in (2, 3, 4, 5))
    assert f"{path}:1: " not in printed
    marked = media / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps(good).encode() + b"\r\n")
    assert run_validate(str(marked)) == 1
    assert f"{marked}:1: " in capsys.readouterr().out
    assert run_validate(str(write(good, name="good.jsonl"))) == 0


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "much"])
def test_D22_a_weight_that_means_nothing_is_a_config_error(weight: Any) -> None:
    stage = {
        "name": "s",
        "train": ["backbone"],
        "lr": 0.1,
        "data": [{"reader": {"kind": "messages", "path": "x"}, "weight": weight}],
    }
    with pytest.raises(ConfigError, match=r"stages\.0\.data\.0\.weight"):
        parse({"model": tiny_model(), "stages": [stage]})


def test_D23_features_land_at_the_placeholders_of_their_own_medium(tmp_path: Path) -> None:
    """One colour each, an encoder that gives the colour itself: in every order, in rows of a batch, words between."""
    import torch

    from mmllm.model import MultimodalLM

    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (120, 130, 140)]
    for number, colour in enumerate(colours):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{number}.png")
    config = parse({"model": tiny_model()}).model
    model, processor = MultimodalLM.from_config(config, BuildContext()), tiny_processor()
    rows = [[0, "then", 1, 2], ["first", 3], [2, 0]]

    def said(parts: list[Any]) -> Sample:
        content = [picture(f"{p}.png") if isinstance(p, int) else {"type": "text", "text": p} for p in parts]
        return Sample(
            "s", parse_messages([{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]), tmp_path
        )

    encoded = [processor.encode_sample(said(parts), 512) for parts in rows]
    batch = processor.collate(encoded)
    pixels = batch.media["image"].inputs["pixels"].mean(dim=(2, 3))  # (N, 3)
    features = torch.zeros(len(pixels), batch.media["image"].width, model.backbone.hidden_dim)
    features[:, :, :3] = pixels[:, None]
    spliced = model.splice(batch.ids, batch.media, {"image": features})
    numbers = [number for parts in rows for number in parts if isinstance(number, int)]
    places = [(at, span) for at, one in enumerate(encoded) for span in one.spans]
    assert len(numbers) == len(places) == 6
    for number, (at, span) in zip(numbers, places, strict=True):
        own = processor.load(
            parse_messages([{"role": "user", "content": [picture(str(tmp_path / f"{number}.png"))]}])[0].parts[0], None
        )
        wanted = own["pixels"].mean(dim=(1, 2))
        found = spliced[at, span.start : span.start + span.count, :3]
        assert torch.allclose(found, wanted.expand_as(found), atol=1e-5)


def test_D24_what_looks_alike_has_keys_of_its_own() -> None:
    """The same pixel bytes in another shape or mode, another palette, another number of frames; another modality."""
    pixels = bytes(range(48))

    def png(image: Image.Image, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, "PNG", **options)
        return file.getvalue()

    shapes = [Image.frombytes("RGB", size, pixels) for size in ((4, 4), (2, 8), (8, 2))]
    modes = [Image.frombytes("L", (16, 3), pixels), Image.frombytes("P", (16, 3), pixels)]
    palettes = []
    for shade in (10, 20):
        image = Image.frombytes("P", (16, 3), pixels)
        image.putpalette([shade] * 768)
        palettes.append(image)
    frames = [Image.new("L", (4, 4), shade) for shade in (0, 50, 100)]
    clips = [png(frames[0], save_all=True, append_images=frames[1:count]) for count in (1, 2, 3)]
    files = [*map(png, [*shapes, *modes, *palettes]), *clips]
    keys = {content_key(data, kind) for data in files for kind in ("image", "video")}
    assert len(keys) == 2 * len(files)
    assert content_key(files[0], "image") in keys


def test_D25_a_sample_has_the_same_loss_alone_among_others_and_packed(tmp_path: Path) -> None:
    import torch

    from mmllm.model import MultimodalLM

    config = parse({"model": tiny_model()}).model
    torch.manual_seed(0)
    model, processor = MultimodalLM.from_config(config, BuildContext()).eval(), tiny_processor()
    texts = [("a", "b"), ("a longer question", "yes yes yes"), ("?", "a rather long reply to it")]
    encoded = [
        processor.encode_sample(
            Sample(q, parse_messages([{"role": "user", "content": q}, {"role": "assistant", "content": a}])), 512
        )
        for q, a in texts
    ] + [processor.encode_sample(conversation(tmp_path, 1), 512)]
    with torch.no_grad():
        alone = [float(model(processor.collate([one]))["text"]) for one in encoded]
        together = float(model(processor.collate(encoded))["text"])
        backwards = float(model(processor.collate(encoded[::-1]))["text"])
        packed = float(model(processor.collate(encoded, pack=True))["text"])
    assert together == pytest.approx(sum(alone), rel=1e-5)
    assert backwards == pytest.approx(sum(alone), rel=1e-5)
    assert packed == pytest.approx(sum(alone), rel=1e-5)
