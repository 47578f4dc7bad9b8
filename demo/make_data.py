"""Make the embedded assistant's training and test data: pictures, sounds and dialogues about them.

    python demo/make_data.py --output data/embedded --nlvr data/nlvr --fsdd data/fsdd --esc10 data/esc10 [--size 1.0]

The three real sets are folders written by `training/prepare_*.py`. Written to the output folder, in messages JSONL:

* `pretrain.jsonl` (MM-PT): exact captions of whole pictures, of their parts, and of sounds;
* `draw.jsonl` (MM-PT and MM-IT of what it makes): requests for drawings, sounds and clips, all of them as captions;
* `instruct.jsonl` (MM-IT): dialogues about pictures, sounds, both, neither; the real sets in their exact form;
* `validation.jsonl`: a few dialogues like those of `instruct.jsonl`;
* `test.jsonl`: single questions, each with its question `type`, from seeds no training sample comes from;
* `images/`, `audio/`, `videos/`: the media. `done.json`: counts, written last.

`--size` scales the number of procedural samples (1.0: about 40,000 pictures and 9,000 sounds).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import dialogues
import drawing_data
import joint_questions
import moving_data
import sound_data
import text_worlds
from dialogues import Exchange
from drills import tally
from real_sets import SHARD, Part, Row, Writer, conversation, nlvr_rows, sound_rows
from real_wordings import WordedScenes, read_written
from scene_model import Scene
from scenes import caption, describe, questions, render, sample_scene
from sounds import Sound, sample_sound, synthesize
from sounds import caption as sound_caption
from sounds import questions as sound_questions

# What the procedural part of each file is made of: {file: {maker: samples at --size 1}}.
AMOUNTS: dict[str, dict[str, int]] = {
    "pretrain": {"picture_captions": 7_000, "sound_captions": 2_000, "seen_drawing": 800},
    "instruct": {"picture": 26_000, "two_pictures": 7_000, "picture_sound": 3_000, "sound": 5_000, "text": 4_000}
    | {"drawing": 5_000, "drawing_words": 6_000, "seen_drawing": 2_000, "redrawn": 1_500, "drawing_by_ear": 800}
    | {"sounding": 2_500, "echoed": 1_500, "said_count": 2_000, "drawn_and_said": 800}
    | {"animation_words": 2_500, "drawn_and_animated": 800, "animated_and_drawn": 800},
    "draw": {"drawing_words": 32_000, "drawing_changes": 20_000, "sounding": 12_000, "animation_words": 10_000},
    "validation": {"picture": 120, "two_pictures": 20, "picture_sound": 20, "sound": 60, "text": 20, "drawing": 30}
    | {"sounding": 15, "animation_words": 15},
    "test": {
        "test_picture": 900,
        "test_two_pictures": 400,
        "test_picture_sound": 300,
        "test_sound": 800,
        "test_text": 300,
    },
}
TRAINING = ("pretrain", "draw", "instruct")
WORDED_PICTURES = 8_000  # at --size 1, with NLVR's sentences
STATEMENTS = 8  # about each of them
FSDD, ESC10 = (2, 0.0), (6, 0.35)  # copies of each recording, and how much of it may be cut off
ECHOED_SHARE = 0.5  # of the recorded digits
KINDS = {"canvas": 0.3, "scatter": 0.5, "tower": 0.2}  # of pictures


def pick_kind(rng: random.Random) -> str:
    return rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]


def described(scene: Scene, rng: random.Random) -> Exchange:
    """A request for a description, and the complete one."""
    return dialogues.vary(rng.choice(text_worlds.DESCRIBE_PICTURE), rng, 0.15), describe(scene)


def heard(sound: Sound, rng: random.Random) -> Exchange:
    """A request for a description of a sound, and one."""
    request = dialogues.vary(rng.choice(text_worlds.DESCRIBE_SOUND), rng, 0.15)
    return request, sound_caption(sound, text_worlds.numpy_rng(rng))


def make_sound(writer: Writer, rng: random.Random) -> tuple[Sound, Part]:
    numbers = text_worlds.numpy_rng(rng)
    sound = sample_sound(numbers)
    return sound, writer.audio(synthesize(sound, numbers))


# --- one sample of each kind -------------------------------------------------------------------------------------------


def picture_captions(rng: random.Random, writer: Writer) -> Row:
    scene = sample_scene(rng, pick_kind(rng))
    exchanges = [*text_worlds.part_exchanges(scene, rng, 6), tally([scene], rng)]
    if rng.random() < 0.5:
        exchanges.append(described(scene, rng))
    else:
        exchanges.append((rng.choice(("Caption:", "Write a caption.")), caption(scene, rng)))
    rng.shuffle(exchanges)
    return {"messages": conversation([writer.image(render(scene))], exchanges, rng, 0.0)}


def sound_captions(rng: random.Random, writer: Writer) -> Row:
    sound, part = make_sound(writer, rng)
    return {
        "messages": conversation([part], [("Sound:", text_worlds.describe_sound(sound)), heard(sound, rng)], rng, 0.0)
    }


def picture(rng: random.Random, writer: Writer) -> Row:
    scene, exchanges = text_worlds.scene_and_statement(rng, pick_kind(rng))
    exchanges += text_worlds.picture_exchanges(scene, rng, rng.randint(9, 13))
    exchanges += [tally([scene], rng) for _ in range(rng.randint(0, 2))]
    rng.shuffle(exchanges)
    if rng.random() < 0.12:
        exchanges.insert(rng.randint(0, 2), described(scene, rng))
    if rng.random() < 0.06:
        exchanges += dialogues.small_talk(rng)
    return {"messages": conversation([writer.image(render(scene))], exchanges, rng)}


def two_pictures(rng: random.Random, writer: Writer) -> Row:
    scenes = text_worlds.two_scenes(rng)
    asked = joint_questions.two_picture_questions(scenes[0], scenes[1], rng, rng.randint(6, 9))
    exchanges = [tally(scenes, rng)] + [(question, reply) for _, question, reply in asked]
    rng.shuffle(exchanges)
    return {"messages": conversation([writer.image(render(scene)) for scene in scenes], exchanges, rng)}


def picture_sound(rng: random.Random, writer: Writer) -> Row:
    scene = sample_scene(rng, pick_kind(rng))
    sound, part = make_sound(writer, rng)
    exchanges = text_worlds.scene_and_sound_exchanges(scene, sound, rng)
    media = [writer.image(render(scene)), part]
    rng.shuffle(media)
    return {"messages": conversation(media, exchanges, rng)}


def sound(rng: random.Random, writer: Writer) -> Row:
    made, part = make_sound(writer, rng)
    exchanges = text_worlds.sound_exchanges(made, rng, 5)
    if rng.random() < 0.3:
        exchanges.insert(0, heard(made, rng))
    if rng.random() < 0.08:
        exchanges += dialogues.small_talk(rng)
    return {"messages": conversation([part], exchanges, rng)}


def worded_rows(nlvr: Path, output: Path, rng: random.Random, count: int) -> list[Row]:
    """New pictures, each with statements that people wrote for NLVR about others like it."""
    worded, rows = WordedScenes(read_written(nlvr), rng), []
    for index in range(count):
        if index % SHARD == 0:
            writer = Writer(output, f"worded-{index // SHARD:03d}")
        scene, exchanges = worded.invented(STATEMENTS)
        rows.append({"messages": conversation([writer.image(render(scene))], exchanges, rng, 0.0)})
    return rows


def text(rng: random.Random, writer: Writer) -> Row:
    if rng.random() < 0.3:
        return {"messages": text_worlds.question_without_media(rng, [])}
    talk = dialogues.sums(rng) if rng.random() < 0.2 else dialogues.small_talk(rng)
    return {"messages": dialogues.to_messages(talk, rng)}


# --- one test sample: a single question with its type ------------------------------------------------------------------


def _test(kind: str, media: list[Part], question: str, reply: str) -> Row:
    asked = {"role": "user", "content": [*media, {"type": "text", "text": question}]}
    return {"type": kind, "messages": [asked, {"role": "assistant", "content": reply}]}


def test_picture(rng: random.Random, writer: Writer) -> list[Row]:
    scene, statements = text_worlds.scene_and_statement(rng, rng.choice(tuple(KINDS)))
    media = [writer.image(render(scene))]
    rows = [_test(f"{scene.kind}/{kind}", media, question, reply) for kind, question, reply in questions(scene, rng, 4)]
    return rows + [_test(f"{scene.kind}/statement", media, *exchange) for exchange in statements]


def test_two_pictures(rng: random.Random, writer: Writer) -> list[Row]:
    scenes = [sample_scene(rng, "canvas") for _ in range(2)]
    media = [writer.image(render(scene)) for scene in scenes]
    return [
        _test(*item[:1], media, *item[1:])
        for item in joint_questions.two_picture_questions(scenes[0], scenes[1], rng, 2)
    ]


def test_picture_sound(rng: random.Random, writer: Writer) -> list[Row]:
    scene = sample_scene(rng, pick_kind(rng))
    made, part = make_sound(writer, rng)
    media = [writer.image(render(scene)), part]
    return [_test(*item[:1], media, *item[1:]) for item in joint_questions.picture_sound_questions(scene, made, rng, 2)]


def test_sound(rng: random.Random, writer: Writer) -> list[Row]:
    made, part = make_sound(writer, rng)
    asked = sound_questions(made, text_worlds.numpy_rng(rng), 3)
    return [_test(f"sound/{kind}", [part], question, reply) for kind, question, reply in asked]


def test_text(rng: random.Random, writer: Writer) -> list[Row]:
    roll = rng.random()
    if roll < 0.4:
        _, question, answers = rng.choice(dialogues.held_out_exchanges())
        return [_test("text/small talk, new wording", [], question, answers[0])]
    if roll < 0.7:
        return [_test("text/sums", [], *dialogues.sum_question(rng))]
    scene = sample_scene(rng)
    return [_test("text/no picture", [], questions(scene, rng, 1)[0][1], dialogues.NO_PICTURE)]


MAKERS: dict[str, Callable[[random.Random, Writer], Row | list[Row]]] = {
    maker.__name__: maker
    for maker in (
        picture_captions, sound_captions, picture, two_pictures, picture_sound, sound, text,
        drawing_data.drawing, drawing_data.drawing_words, drawing_data.drawing_changes, drawing_data.seen_drawing,
        drawing_data.redrawn, drawing_data.drawing_by_ear,
        sound_data.sounding, sound_data.echoed, sound_data.said_count, sound_data.drawn_and_said,
        moving_data.animation, moving_data.animation_words, moving_data.drawn_and_animated, moving_data.animated_and_drawn,
        test_picture, test_two_pictures, test_picture_sound, test_sound, test_text,
    )
}  # fmt: skip

# --- all of it ---------------------------------------------------------------------------------------------------------


# Replies that are only right at the beginning of a conversation.
FIRST_ONLY = (dialogues.NO_PICTURE, dialogues.NO_SOUND, dialogues.NO_NAME)
JOINED_LENGTH = 320  # tokens, about: short samples are joined up to this length, long ones lose their last questions


def length(row: Row) -> int:
    """About how many tokens a sample has: 100 a picture, 15 a sound, one for every three letters and a half."""
    total = 0.0
    for message in row["messages"]:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            total += {"image": 100, "audio": 15}.get(part["type"], len(part.get("text", "")) / 3.5)
        total += 2
    return round(total)


def shortened(row: Row) -> Row:
    """The sample without its last questions, as many as make it too long."""
    messages = list(row["messages"])
    while len(messages) > 4 and length({"messages": messages}) > JOINED_LENGTH:
        messages = messages[:-2]
    return {**row, "messages": messages}


def joined(rows: list[Row], rng: random.Random) -> list[Row]:
    """The samples, short ones put together into longer conversations with several pictures or sounds.

    Each question then means the picture or sound that came last, as in a chat. It also makes the samples of a batch about
    equally long, so that little is padded.
    """
    rng.shuffle(rows)
    result: list[Row] = []
    open_row: Row | None = None
    for row in rows:
        first_only = any(
            message["role"] == "assistant" and message["content"] in FIRST_ONLY for message in row["messages"]
        )
        if open_row is None or first_only or length(open_row) + length(row) > JOINED_LENGTH:
            if open_row is not None:
                result.append(open_row)
            open_row = row
        else:
            more = [message for message in row["messages"] if message["role"] != "system"]
            open_row = {"messages": open_row["messages"] + more}
    return result if open_row is None else [*result, open_row]


def make_shard(task: tuple[Path, str, str, int, int, int]) -> list[Row]:
    """`count` samples of one maker; the random numbers depend on the seed, file, maker and shard only."""
    output, split, maker, shard, count, seed = task
    rng = random.Random(f"{seed}/{split}/{maker}/{shard}")
    writer = Writer(output, f"{split}-{maker}-{shard:04d}")
    rows: list[Row] = []
    for _ in range(count):
        made = MAKERS[maker](rng, writer)
        rows += made if isinstance(made, list) else [made]
    return rows


def build(arguments: argparse.Namespace) -> dict[str, int]:
    """Write everything; returns the number of rows per file."""
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{arguments.seed}/real sets")
    rows: dict[str, list[Row]] = {split: [] for split in AMOUNTS}
    tasks = []
    for split, makers in AMOUNTS.items():
        size = arguments.size if split in TRAINING else min(1.0, arguments.size)
        for maker, amount in makers.items():
            left, shard = max(1, round(amount * size)), 0
            while left > 0:
                tasks.append((output, split, maker, shard, min(SHARD, left), arguments.seed))
                left, shard = left - SHARD, shard + 1
    begin = time.monotonic()
    with multiprocessing.get_context("fork").Pool(arguments.workers) as pool:
        for done, (task, made) in enumerate(zip(tasks, pool.imap(make_shard, tasks), strict=True), 1):
            rows[task[1]] += made
            if done % 20 == 0 or done == len(tasks):
                seconds = time.monotonic() - begin
                print(
                    f"{done}/{len(tasks)} shards, {seconds:.0f} s, ETA {seconds / done * (len(tasks) - done):.0f} s",
                    flush=True,
                )
    if arguments.nlvr:
        rows["instruct"] += nlvr_rows(Path(arguments.nlvr), output, rng, arguments.orders)
        rows["instruct"] += worded_rows(Path(arguments.nlvr), output, rng, round(WORDED_PICTURES * arguments.size))
    for folder, changes in ((arguments.fsdd, FSDD), (arguments.esc10, ESC10)):
        if folder:
            real = sound_rows(Path(folder), output, rng, *changes)
            rows["instruct"] += real
            rows["pretrain"] += real
    if arguments.fsdd:
        rows["instruct"] += sound_data.echoed_digits(Path(arguments.fsdd), output, rng, ECHOED_SHARE)
    counts = {}
    for split, made in rows.items():
        if split in TRAINING:
            made = [shortened(row) for row in made]
            short = [row for row in made if length(row) < 0.7 * JOINED_LENGTH]
            made = [row for row in made if length(row) >= 0.7 * JOINED_LENGTH] + joined(short, rng)
            rng.shuffle(made)
        lines = (json.dumps({"id": f"{split}-{index}", **row}, ensure_ascii=False) for index, row in enumerate(made))
        (output / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        counts[split] = len(made)
    counts["turns to learn from"] = sum(m["role"] == "assistant" for row in rows["instruct"] for m in row["messages"])
    types = Counter(row["type"] for row in rows["test"])
    (output / "done.json").write_text(
        json.dumps({"counts": counts, "test types": types, "seed": arguments.seed}, indent=1)
    )
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--nlvr", default="", help="folder written by training/prepare_nlvr.py")
    parser.add_argument("--fsdd", default="", help="folder written by training/prepare_fsdd.py")
    parser.add_argument("--esc10", default="", help="folder written by training/prepare_esc10.py")
    parser.add_argument("--size", type=float, default=1.0, help="scale of the procedural part")
    parser.add_argument("--orders", type=int, default=1, help="orders of the boxes of each NLVR picture, 1 to 6")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    for folder in ("images", "audio", "videos"):
        shutil.rmtree(Path(arguments.output) / folder, ignore_errors=True)
    print(json.dumps(build(arguments)))


if __name__ == "__main__":
    main()
