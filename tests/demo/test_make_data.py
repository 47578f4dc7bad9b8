"""The data of the embedded assistant: readable by the library, contained, reproducible, with exact tests."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

import dialogues
import evaluate
import make_data
import real_sets
from scenes import render, sample_scene

from mmllm.config.base import BuildContext
from mmllm.data.readers import MessagesConfig
from mmllm.processing.messages import check_turns


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundredth of a percent of the data, with a one-row NLVR and a one-row sound set."""
    folder = tmp_path_factory.mktemp("data")
    nlvr, fsdd = folder / "nlvr", folder / "fsdd"
    for name in (nlvr, fsdd):
        name.mkdir()
    render(sample_scene(random.Random(0), "scatter")).save(nlvr / "a.png")
    soundfile.write(fsdd / "a.wav", np.zeros(4000), 8000)
    rows = {
        nlvr: ("image", "a.png", "Is this true? There is a box with a black circle", "yes"),
        fsdd: ("audio", "a.wav", "Which digit is spoken?", "two"),
    }
    for name, (kind, path, question, answer) in rows.items():
        asked = [{"type": kind, "path": path}, {"type": "text", "text": question}]
        row = {"id": "a", "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        (name / "train.jsonl").write_text(json.dumps(row) + "\n")
    argv = ["make_data.py", "--output", str(folder / "out"), "--nlvr", str(nlvr), "--fsdd", str(fsdd)]
    argv += ["--size", "0.0005", "--workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        make_data.main()
    return folder / "out"


@pytest.mark.parametrize("name", ["pretrain", "draw", "instruct", "validation", "test"])
def test_the_library_reads_every_row_and_the_media_exist(built: Path, name: str) -> None:
    table = MessagesConfig(path=f"{name}.jsonl").open(BuildContext(root=built))
    assert len(table) > 0
    for sample in table:
        check_turns(sample.messages, sample.id, training=True)
        for part in (part for message in sample.messages for part in message.parts if part.type != "text"):
            # What the assistant draws may be there as a caption alone.
            assert part.caption if part.value is None else (built / str(part.value)).is_file()


def test_test_rows_have_a_type_and_ask_once(built: Path) -> None:
    rows = [json.loads(line) for line in (built / "test.jsonl").read_text().splitlines()]
    assert {row["type"].split("/")[0] for row in rows} >= {"sound", "text", "two-pictures", "picture+sound"}
    assert all(len(row["messages"]) == 2 for row in rows)


def test_the_real_sets_keep_their_exact_wording(built: Path) -> None:
    text = (built / "instruct.jsonl").read_text()
    assert "Is this true? There is a box with a black circle" in text
    assert "Which digit is spoken?" in text


def test_peoples_sentences_are_asked_about_new_pictures(built: Path) -> None:
    rows = [json.loads(line) for line in (built / "instruct.jsonl").read_text().splitlines()]
    first = [row["messages"][0]["content"] for row in rows]
    worded = [content for content in first if isinstance(content, list) and "worded" in content[0].get("path", "")]
    assert worded


def test_samples_are_about_equally_long_and_end_with_a_reply(built: Path) -> None:
    for line in (built / "instruct.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["messages"][-1]["role"] == "assistant"
        assert make_data.length(row) <= 1.3 * make_data.JOINED_LENGTH


def test_the_same_seed_gives_the_same_samples(tmp_path: Path) -> None:
    first = make_data.make_shard((tmp_path / "a", "instruct", "picture", 0, 2, 5))
    assert first == make_data.make_shard((tmp_path / "b", "instruct", "picture", 0, 2, 5))
    assert first != make_data.make_shard((tmp_path / "c", "instruct", "picture", 0, 2, 6))


def test_boxes_move_and_nothing_else() -> None:
    picture = Image.new("RGB", (400, 100), (128, 128, 128))
    picture.paste((255, 0, 0), (0, 0, 100, 100))
    moved = real_sets.permuted(picture, (1, 2, 0))
    assert [moved.getpixel((x, 50)) for x in (50, 125, 200, 350)] == [(128,) * 3, (128,) * 3, (128,) * 3, (255, 0, 0)]


def row(question: str, answer: str, *media: str, kind: str = "a") -> dict[str, object]:
    parts = [{"type": "image", "path": path} for path in media]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return {"type": kind, "messages": [asked, {"role": "assistant", "content": answer}]}


def test_joined_samples_stay_short_and_denials_come_first() -> None:
    rows = [row("How many?", "one", f"{k}.png") for k in range(9)] + [
        row("What is it?", dialogues.NO_PICTURE) for _ in range(3)
    ]
    joined = make_data.joined(rows, random.Random(0))
    assert sum(len(r["messages"]) for r in joined) == 24
    assert all(make_data.length(r) <= make_data.JOINED_LENGTH for r in joined)
    for made in joined:
        replies = [m["content"] for m in made["messages"] if m["role"] == "assistant"]
        assert dialogues.NO_PICTURE not in replies[1:]


def test_blind_rows_show_other_pictures() -> None:
    rows = [row("q", "a", f"{k // 2}.png") for k in range(10)] + [row("q", "a")]
    for own, foreign in zip(rows[:10], evaluate.blinded(rows), strict=True):
        assert evaluate.media_of(own) != evaluate.media_of(foreign)
        assert own["messages"] != foreign["messages"]


def test_scores_count_hits_per_type() -> None:
    rows = [row("q", "one", kind="count"), row("q", "two", kind="count"), row("q", "red", kind="color")]
    found = evaluate.score(rows, ["One.", "three", "red"])
    assert found["count"]["accuracy"] == 0.5
    assert found["color"]["n"] == 1
    assert "| count | 2 | 50.0% |" in evaluate.table({k: {**v, "majority": 0.5} for k, v in found.items()})
