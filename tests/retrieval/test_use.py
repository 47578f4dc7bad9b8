"""Existing media as answers: a model that has learned colours, its index, the rules, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import squares
import torch
from PIL import Image

import mmllm
from mmllm.assistant import Assistant
from mmllm.chat.session import ChatSession, Sampling
from mmllm.cli import main
from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.errors import CheckpointError, DataError, MediaError, MmllmError
from mmllm.model import MultimodalLM
from mmllm.processing.processor import Processor
from mmllm.retrieval import Found, MediaIndex, Retrieval, build_index, load_index
from mmllm.training.run import train

TURN = 3  # tokens: the signals, and the step that reads the last one's state


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with squares and ``run``: trained to find the square of a named colour, and to retrieve black and white."""
    folder = tmp_path_factory.mktemp("squares")
    squares.write_squares(folder)
    parts = ["backbone.new_tokens", "outputs.image.retrieval"]
    align = squares.stage(train=parts, objectives={"text": 1.0, "contrastive": 1.0}, epochs=120)
    choose = {"train": ["outputs.image.decision"], "objectives": {"decision": 1.0}, "lr": 3e-2, "epochs": 60}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmllm.training.report.plot_losses", lambda rows, file: None)
        train(squares.system(folder, align, squares.stage("decide", **choose)), BuildContext(root=folder))
    return folder


@pytest.fixture(scope="module")
def assistant(trained: Path) -> Assistant:
    return mmllm.load(trained / "run")


@pytest.fixture(scope="module")
def index(trained: Path, assistant: Assistant) -> MediaIndex:
    return build_index(assistant.model, assistant.processor, trained / "squares", batch_size=4)


def ask(colour: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"draw {colour}"}]


def test_the_losses_fell(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    contrastive = [row["losses"]["contrastive"] for row in rows if "contrastive" in row.get("losses", {})]
    assert contrastive[-1] < 0.1 * contrastive[0]
    decision = [row["losses"]["decision"] for row in rows if "decision" in row.get("losses", {})]
    assert decision[-1] < decision[0]


def test_it_answers_with_the_square_of_the_colour(assistant: Assistant, index: MediaIndex, tmp_path: Path) -> None:
    assistant.use_index(index, "retrieve")
    for colour in squares.COLOURS:
        (media,) = assistant.chat(ask(colour), max_new_tokens=TURN).media
        assert media.path is not None
        assert (media.type, media.source, media.path.name) == ("image", "retrieved", f"{colour}.png")
        assert -1 <= (media.similarity or 9) <= 1
        assert media.result(60).getpixel((0, 0)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))  # type: ignore[attr-defined]
        media.save(tmp_path / "copy.png")
        assert (tmp_path / "copy.png").read_bytes() == media.path.read_bytes()
        media.save(tmp_path / "other.bmp")
        with Image.open(tmp_path / "other.bmp") as picture:
            assert picture.format == "BMP"
    together = assistant.generate([ask(colour) for colour in squares.COLOURS], max_new_tokens=TURN)
    assert [reply.media[0].path.stem for reply in together] == list(squares.COLOURS)  # type: ignore[union-attr]


def test_an_index_survives_saving_and_moving(
    assistant: Assistant, index: MediaIndex, trained: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(trained / "squares", tmp_path / "a" / "squares")
    build_index(assistant.model, assistant.processor, tmp_path / "a" / "squares").save(tmp_path / "a" / "squares.index")
    (tmp_path / "a").rename(tmp_path / "b")
    again = load_index(tmp_path / "b" / "squares.index")
    assert sorted(path.name for path in (tmp_path / "b" / "squares.index").iterdir()) == [
        "index.json",
        "index.safetensors",
    ]
    assert (again.modality, again.files) == ("image", index.files)
    assert torch.allclose(again.embeddings, index.embeddings, atol=1e-5)
    assert again.root == (tmp_path / "b" / "squares").resolve()
    assistant.use_index(tmp_path / "b" / "squares.index", "retrieve")
    (media,) = assistant.chat(ask("blue"), max_new_tokens=TURN).media
    assert media.path == tmp_path / "b" / "squares" / "blue.png"
    (tmp_path / "b" / "squares" / "blue.png").unlink()
    with pytest.raises(MediaError, match=r"blue\.png"):
        assistant.chat(ask("blue"), max_new_tokens=TURN).media[0].result(60)


def test_the_rules(assistant: Assistant, index: MediaIndex) -> None:
    def sources(rule: Any, threshold: float = 0.5) -> list[str]:
        assistant.use_index(index, rule, threshold)
        options = {"image": {"steps": 1}}
        replies = assistant.generate([ask(c) for c in squares.COLOURS], max_new_tokens=TURN, media=options)
        return [reply.media[0].source for reply in replies]

    assert set(sources("generate")) == {"generated"}
    assert set(sources("retrieve")) == {"retrieved"}
    assert set(sources("auto", -1.0)) == {"retrieved"}
    assert set(sources("auto", 1.0)) == {"generated"}
    assert sources("trained") == ["generated"] * 4 + ["retrieved"] * 2  # black and white, as in the data


def test_no_medium_comes_twice_in_a_reply(index: MediaIndex) -> None:
    query = index.embeddings[2]
    first = index.nearest(query)
    assert first is not None
    assert first.file == index.files[2]
    assert first.similarity == pytest.approx(1.0, abs=1e-5)
    second = index.nearest(query, {first.file})
    assert isinstance(second, Found)
    assert second.file != first.file
    assert second.similarity <= first.similarity
    assert index.nearest(query, set(index.files)) is None


def test_what_cannot_be_decoded_is_left_out_and_told(assistant: Assistant, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes((trained / "squares" / "red.png").read_bytes())
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".hidden.png").write_text("hello")
    found = build_index(assistant.model, assistant.processor, tmp_path)
    assert found.files == ("red.png",)
    assert [name for name, _ in found.skipped] == ["notes.txt"]
    rows = tmp_path / "list.jsonl"
    rows.write_text('{"path": "red.png"}\n\n"../outside.png"\n"red.png"\n')
    listed = build_index(assistant.model, assistant.processor, rows)
    assert (listed.files, [name for name, _ in listed.skipped]) == (("red.png",), ["../outside.png"])
    rows.write_text('{"file": "red.png"}\n')
    with pytest.raises(DataError, match=r"list\.jsonl:1: expected"):
        build_index(assistant.model, assistant.processor, rows)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="none of 0 files"):
        build_index(assistant.model, assistant.processor, tmp_path / "empty")


def test_refusals(assistant: Assistant, index: MediaIndex, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no index there; make one with `mmllm index`"):
        assistant.use_index(tmp_path)
    with pytest.raises(MmllmError, match=r"rule 'maybe'"):
        assistant.use_index(index, "maybe")  # type: ignore[arg-type]
    with pytest.raises(MmllmError, match="cosine similarity"):
        Retrieval(index, threshold=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(MmllmError, match="needs a folder of its own"):
        index.save(tmp_path / "full")
    index.save(tmp_path / "short")
    told = json.loads((tmp_path / "short" / "index.json").read_text())
    (tmp_path / "short" / "index.json").write_text(json.dumps({**told, "files": told["files"][:1]}))
    with pytest.raises(CheckpointError, match="6 embeddings for 1 files"):
        load_index(tmp_path / "short")
    config = squares.system(trained, output={"decision": None}).model
    torch.manual_seed(9)
    context = BuildContext(dtype=torch.float32)
    other = Assistant(MultimodalLM.from_config(config, context), Processor.from_config(config, context))
    with pytest.raises(MmllmError, match="made with another model"):
        other.use_index(index)
    own = build_index(other.model, other.processor, trained / "squares")
    with pytest.raises(MmllmError, match="no decision head for image"):
        other.use_index(own, "trained")
    stage = squares.stage(train=["outputs.image.projector"])
    plain = squares.system(trained, stage, output={"decision": None, "retrieval": None}).model
    bare = MultimodalLM.from_config(plain, context)
    with pytest.raises(MmllmError, match="this model's: none"):
        build_index(bare, other.processor, trained / "squares")
    with pytest.raises(MmllmError, match="no retrieval heads"):
        Retrieval(index).check(bare)


def test_an_output_that_writes_codes_has_nothing_to_find(trained: Path) -> None:
    codes = {"image": {"generator": {"kind": "vq", "pretrained": "x"}}}
    tree = {"backbone": {"kind": "causal_lm", "pretrained": "x"}, "outputs": codes}
    config = parse({"model": tree}).model.tiny()
    context = BuildContext(dtype=torch.float32)
    model = MultimodalLM.from_config(config, context)
    with pytest.raises(MmllmError, match="this model's: none"):
        build_index(model, Processor.from_config(config, context), trained / "squares")


def test_half_precision_still_knows_its_index(trained: Path, index: MediaIndex) -> None:
    low = mmllm.load(trained / "run", dtype=torch.bfloat16)
    low.use_index(index, "retrieve")
    assert low.chat(ask("blue"), max_new_tokens=TURN).media[0].source == "retrieved"


def test_the_command_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = str(trained / "run"), str(tmp_path / "squares.index")
    assert main(["index", "--model", run, "--data", str(trained / "squares"), "--output", folder]) == 0
    assert "6 files in" in capsys.readouterr().out
    words = ["generate", "--model", run, "--prompt", "draw yellow", "--max-new-tokens", str(TURN), "--json"]
    assert main([*words, "--retrieve", folder, "--decide", "retrieve", "--output", str(tmp_path / "made")]) == 0
    (media,) = json.loads(capsys.readouterr().out)["media"]
    path = tmp_path / "made" / "1-image.png"
    similarity = media.pop("similarity")
    assert media == {"type": "image", "path": str(path), "source": "retrieved"}
    assert -1 <= similarity <= 1
    assert path.read_bytes() == (trained / "squares" / "yellow.png").read_bytes()
    assert main([*words, "--retrieve", folder, "--decide", "retrieve"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["media"][0]["path"] == str((trained / "squares" / "yellow.png").resolve())
    assert "not kept" not in captured.err


def test_a_chat_keeps_what_was_found(assistant: Assistant, index: MediaIndex) -> None:
    assistant.use_index(index, "retrieve")
    session = ChatSession()
    session.add_user("draw lime")
    list(session.reply(assistant, Sampling(max_new_tokens=TURN)))
    (shown,) = [part for part in session.messages[-1]["content"] if part["type"] == "image"]
    assert shown["source"] == "retrieved"
    assert Path(shown["path"]).read_bytes() == (index.root / "lime.png").read_bytes()
    session.add_user("draw blue")  # the history, source and all, is read back
    list(session.reply(assistant, Sampling(max_new_tokens=TURN)))
