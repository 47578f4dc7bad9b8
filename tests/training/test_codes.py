"""Training and use of an assistant that writes pictures and sounds as codes: from the file to the picture and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch.nn import functional as F

import mmllm
from mmllm.assistant import Assistant
from mmllm.cli import main
from mmllm.config.base import BuildContext
from mmllm.config.load import dump, parse
from mmllm.config.run import RunConfig
from mmllm.data.mixture import StageData
from mmllm.errors import MediaError, MmllmError
from mmllm.generation import SignalWriter
from mmllm.model import MultimodalLM
from mmllm.processing.messages import Sample, parse_messages
from mmllm.processing.processor import Processor
from mmllm.replies import Media, Truncated
from mmllm.training.run import train

COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230)}
PICTURE, SOUND = 16 + 2, 8 * 2 + 2  # tokens of a group: 4 x 4 codes; 8 positions of 2 codebooks
IMAGE_ROWS, AUDIO_ROWS = 16 + 2, 2 * 16 + 2


def write_data(folder: Path) -> Path:
    """In turn red, blue, and a sound."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        noise = rng.integers(-20, 20, (8, 8, 3)) + np.array(colour)
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
    soundfile.write(folder / "hum.wav", np.sin(np.arange(160) * 0.2).astype(np.float32), 8000)
    parts = [{"type": "image", "path": f"{name}.png", "caption": name} for name in COLOURS]
    parts.append({"type": "audio", "path": "hum.wav"})
    rows = []
    for i in range(12):
        part = parts[i % 3]
        content = [part] if part["type"] == "image" else [{"type": "text", "text": "Here:"}, part]
        ask = part.get("caption", "hum")
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": content}]
        rows.append(json.dumps({"id": f"s{i:02}", "messages": turns}))
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "data.jsonl"


def system(folder: Path, **stage: Any) -> RunConfig:
    first = {
        "name": "make",
        "train": ["backbone", "backbone.new_tokens"],
        "lr": 1e-2,
        "data": [str(write_data(folder))],
        "batch_size": 6,
        "micro_batch_size": 6,
        "samples": 0,
    }
    outputs = {"image": {"generator": {"kind": "vq"}}, "audio": {"generator": {"kind": "audio_codec"}}}
    tree = {
        "output": str(folder / "run"),
        "trackers": [],
        "model": {"backbone": {"kind": "causal_lm", "pretrained": "x"}, "outputs": outputs},
        "stages": [first | stage],
    }
    config = parse(tree)
    return config.model_copy(update={"model": config.model.tiny()})


def parts_of(config: RunConfig) -> tuple[MultimodalLM, Processor]:
    torch.manual_seed(config.seed)
    context = BuildContext(dtype=torch.float32)
    return MultimodalLM.from_config(config.model, context).eval(), Processor.from_config(config.model, context)


def test_every_target_stands_in_the_sequence_as_its_codes(tmp_path: Path) -> None:
    config = system(tmp_path)
    model, processor = parts_of(config)
    data = StageData(config.stages[0].data, config.seed, BuildContext())
    samples = [processor.encode_sample(data[i], 512) for i in range(4)]
    assert len({len(sample.ids) for sample in samples}) > 1, "rows of unequal length"
    for left in (False, True):
        plain = processor.collate(samples, pad_left=left)
        batch = model.with_codes(plain)
        for row, sample in enumerate(samples):
            (made,) = sample.made
            signals, generator = processor.signals[made.modality], model.outputs[made.modality].frozen()  # type: ignore[operator]
            offset = batch.ids.shape[1] - len(sample.ids) if left else 0
            group = batch.ids[row, offset + made.start :][: signals.count].tolist()
            codes = generator.encode(made.target[None])[0].tolist()  # type: ignore[index]
            books = generator.codes.codebooks
            expected = [signals.first + 1 + (i % books) * 16 + code for i, code in enumerate(codes)]
            assert group == [signals.first, *expected, signals.stop - 1]
            # The rest of the row is as it was.
            others = torch.ones(batch.ids.shape[1], dtype=torch.bool)
            others[offset + made.start :][: signals.count] = False
            assert torch.equal(batch.ids[row, others], plain.ids[row, others])
        assert torch.equal(batch.targets, batch.ids.flatten()[batch.predict + 1])
        assert batch.tokens == plain.tokens
    assert plain.made == {}
    assert set(plain.codes) == {"image", "audio"}


def test_the_loss_is_the_cross_entropy_of_text_and_codes(tmp_path: Path) -> None:
    config = system(tmp_path)
    model, processor = parts_of(config)
    data = StageData(config.stages[0].data, config.seed, BuildContext())
    sample = processor.encode_sample(data[0], 512)
    batch = processor.collate([sample])
    found = model(batch)
    assert set(found) == {"text"}
    ids = model.with_codes(batch).ids
    logits = model.backbone(model.backbone.embed(ids)).logits[0]
    assert logits.shape[1] == processor.vocab_rows + IMAGE_ROWS + AUDIO_ROWS
    places = [i for i, wanted in enumerate(sample.supervised) if wanted]
    assert len(places) >= PICTURE
    expected = F.cross_entropy(logits[[i - 1 for i in places]], ids[0, places], reduction="sum")
    torch.testing.assert_close(found["text"], expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Assistant]:
    folder = tmp_path_factory.mktemp("trained")
    final = train(system(folder, epochs=60))
    return folder, mmllm.load(final)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_what_was_learned_is_what_the_codes_of_the_file_give(trained: tuple[Path, Assistant]) -> None:
    folder, assistant = trained
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.1 * losses[0]
    pictures = []
    for name in COLOURS:
        reply = assistant.chat(ask(name))
        (media,) = reply.media
        signals = assistant.processor.signals["image"]
        generator: Any = assistant.model.outputs["image"].frozen()  # type: ignore[operator]
        target = signals.target(Image.open(folder / f"{name}.png"))  # type: ignore[misc]
        (expected,) = generator.generate(generator.encode(target[None]))
        assert np.array_equal(np.asarray(media.result(60)), np.asarray(expected)), name
        pictures.append(np.asarray(expected))
    assert not np.array_equal(*pictures)
    reply = assistant.chat(ask("hum"))
    (sound,) = reply.media
    assert (reply, sound.type) == ("Here:", "audio")
    assert len(sound.result(60).samples) == 160  # type: ignore[attr-defined]


def test_text_and_media_come_in_order_and_no_code_is_text(trained: tuple[Path, Assistant]) -> None:
    _, assistant = trained
    for temperature, seed in ((0.0, None), (1.5, 1), (3.0, 2)):
        parts = list(assistant.chat(ask("blue"), stream=True, temperature=temperature, seed=seed, max_new_tokens=90))
        text = "".join(part for part in parts if isinstance(part, str))
        assert not any(mark in text for mark in ("<image", "<audio"))
        for part in parts:
            if isinstance(part, Media):
                part.result(60)
    # The ids behind the table are never given to the tokenizer.
    ids = [*range(assistant.processor.vocab_rows, assistant.processor.vocab_rows + IMAGE_ROWS + AUDIO_ROWS)]
    assert assistant.processor.text(ids) == "[image] [audio]"


def test_a_group_cut_off_is_reported_and_makes_nothing(trained: tuple[Path, Assistant]) -> None:
    _, assistant = trained
    whole = assistant.chat(ask("red"))
    assert (len(whole.media), whole.truncated) == (1, [])
    for length in (3, PICTURE):
        reply = assistant.chat(ask("red"), max_new_tokens=length)
        assert (reply.media, reply.truncated) == ([], ["image"])
    assert list(assistant.chat(ask("red"), stream=True, max_new_tokens=5))[-1] == Truncated("image")


def test_a_model_of_codes_has_no_options_to_change(trained: tuple[Path, Assistant]) -> None:
    with pytest.raises(MmllmError, match="unknown option 'steps' of image; known: none"):
        trained[1].chat(ask("red"), media={"image": {"steps": 3}})


def test_decoding_is_kept_to_codes_within_a_group_and_to_its_first_token_outside(
    trained: tuple[Path, Assistant],
) -> None:
    _, assistant = trained
    processor = assistant.processor
    image, audio = processor.signals["image"], processor.signals["audio"]
    width = processor.vocab_rows + IMAGE_ROWS + AUDIO_ROWS
    writer = SignalWriter(processor, rows=2)

    def allowed(row: int, logits: torch.Tensor) -> list[int]:
        return [int(id) for id in writer.restrict(logits)[row].isfinite().nonzero()]

    text = [*range(processor.vocab_rows), image.first, audio.first]
    assert allowed(0, torch.zeros(2, width)) == text
    chosen = [audio.first, 5]
    for place in range(1, SOUND):
        writer.written(chosen)
        assert writer.read(torch.full((2, 4), float(place))) == []
        logits = torch.randn(2, width)
        book = (place - 1) % 2
        codes = range(audio.first + 1 + 16 * book, audio.first + 17 + 16 * book)
        assert allowed(0, logits) == (list(codes) if place < SOUND - 1 else [audio.stop - 1])
        assert allowed(1, logits) == text, "the other reply goes on with text"
        restricted = writer.restrict(logits)
        kept = restricted.isfinite()
        assert torch.equal(restricted[kept], logits[kept]), "the model's own choice among them"
        chosen = [int(restricted[0].argmax()), 5]
    writer.written(chosen)
    (group,) = writer.read(torch.zeros(2, 4))
    assert (group.row, group.modality, group.signals.shape, group.signals.dtype) == (0, "audio", (1, 16), torch.int64)
    assert int(group.signals.min()) >= 0
    assert int(group.signals.max()) < 16
    assert allowed(0, torch.zeros(2, width)) == text


def test_pictures_shown_before_are_read_as_their_codes(trained: tuple[Path, Assistant]) -> None:
    folder, assistant = trained
    shown = {"type": "image", "path": str(folder / "red.png")}
    talk = [*ask("red"), {"role": "assistant", "content": [shown]}, {"role": "user", "content": "blue"}]
    encoded = assistant.processor.encode_prompt(talk)
    (made,) = encoded.made
    assert not any(encoded.supervised[made.start : made.start + PICTURE])
    batch = assistant.model.with_codes(assistant.processor.collate([encoded], pad_left=True))
    first = assistant.processor.signals["image"].first
    codes = batch.ids[0][(batch.ids[0] > first) & (batch.ids[0] < first + 17)]
    assert len(codes) == 16
    assert len(codes.unique()) > 1
    assert isinstance(assistant.chat(talk, max_new_tokens=40), str)


def test_a_caption_alone_cannot_be_learned_from(tmp_path: Path) -> None:
    _, processor = parts_of(system(tmp_path))
    talk = [*ask("red"), {"role": "assistant", "content": [{"type": "image", "caption": "red"}]}]
    with pytest.raises(MediaError, match="a image with a caption but no file"):
        processor.encode_sample(Sample("s", parse_messages(talk)), 512)


def test_micro_batches_and_resumes_change_nothing(tmp_path: Path) -> None:
    import shutil

    whole = train(system(tmp_path / "whole", epochs=2, save_every=2))
    train(system(tmp_path / "cut", epochs=2, save_every=2))
    shutil.rmtree(max((tmp_path / "cut" / "run" / "checkpoints").iterdir()))
    again = train(system(tmp_path / "cut", epochs=2, save_every=2), resume=True)
    first, second = (mmllm.load(folder).model.state_dict() for folder in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    train(system(tmp_path / "small", epochs=2, micro_batch_size=1))
    losses = [
        [row["loss"] for row in map(json.loads, (tmp_path / name / "run" / "metrics.jsonl").open()) if "loss" in row]
        for name in ("whole", "small")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_in_bf16_the_model_of_codes_stays_exact(tmp_path: Path) -> None:
    config = system(tmp_path, epochs=1).model_copy(update={"precision": "bf16"})
    final = train(config)
    exact, _ = parts_of(config)
    loaded = mmllm.load(final, dtype=torch.bfloat16).model
    for name, value in exact.outputs.state_dict().items():
        assert torch.equal(loaded.outputs.state_dict()[name], value), name


def test_the_plan_counts_rows_and_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = system(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert main(["plan", str(file), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["outputs"]["image"]["signal_tokens"] == PICTURE
    assert plan["outputs"]["audio"] | {"condition": {}} == {
        "projector": None,
        "generator": "audio_codec",
        "signal_tokens": SOUND,
        "rows": AUDIO_ROWS,
        "condition": {},
    }
    # Embedding and head of every new token.
    assert plan["parameters"]["backbone.new_tokens"] == 2 * (IMAGE_ROWS + AUDIO_ROWS) * plan["hidden_dim"]
    assert main(["plan", str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"{SOUND} for each, {AUDIO_ROWS} in the table" in shown
    assert main(["plan", str(file), f"stages.0.max_length={PICTURE}"]) == 2
    assert "one image (as the assistant writes it) takes 18" in capsys.readouterr().err
