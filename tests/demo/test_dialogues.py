"""The language half of the embedded assistant: its dialogues, its tokenizer, its text worlds."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

import dialogues
import drills
import joint_questions
import llm_parts
import text_worlds
import train_llm
from scene_model import Item, Scene, sample_scene
from sounds import Sound


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    rng = random.Random(0)
    texts = [message["content"] for _ in range(300) for message in train_llm.make_sample(rng, None)]
    return llm_parts.build_tokenizer([text.replace(text_worlds.PATCHES, "") for text in texts])


TEXTS = ["Is this true? There are 12 red circles.", "  two  spaces\n\ttab ", "Größe 你好 🙂 \x01", "3-4=?", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


def test_a_word_is_the_same_token_in_the_plural_and_at_the_beginning_of_a_reply(tokenizer: Any) -> None:
    asked = tokenizer.tokenize("How many circles and crosses?")
    reply = tokenizer.tokenize(
        tokenizer.apply_chat_template([{"role": "assistant", "content": "circle"}], tokenize=False)
    )
    assert reply[1:2] == tokenizer.tokenize(" circle") == asked[2:3]
    assert asked[3:] == ["s", *tokenizer.tokenize(" and cross"), "es", "?"]


def test_the_template_marks_the_reply_and_its_end(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
    ]
    found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    reply = [token for token, inside in zip(found["input_ids"], found["assistant_masks"], strict=True) if inside]
    assert tokenizer.decode(reply) == " Hi!<|end|>"
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True).endswith(
        "<|assistant|>"
    )


def test_encoding_equals_the_template(tokenizer: Any) -> None:
    messages = dialogues.to_messages(
        [("Hello", "Hi!"), ("Thanks", "You are welcome!")], random.Random(0), system_chance=1.0
    )
    sample = llm_parts.Encoder(tokenizer)(messages)
    assert tokenizer.decode(sample.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    full = [token for token, weight in zip(sample.ids, sample.weights, strict=True) if weight == 1.0]
    assert tokenizer.decode(full) == " Hi!<|end|> You are welcome!<|end|>"


def test_a_patch_is_one_position_and_the_sum_of_its_words(tokenizer: Any) -> None:
    content = f"{text_worlds.PATCHES}big red circle\nblue{text_worlds.PATCHES}How many?"
    encoder = llm_parts.Encoder(tokenizer)
    sample = encoder([{"role": "user", "content": content}])
    assert sample.ids[1:3] == [encoder.word("big")[0], encoder.word("blue")[0]]
    model = llm_parts.build_model(tokenizer)
    _, embeddings, _ = llm_parts.embed(model, [sample], len(sample.ids), False, "cpu")
    table = model.get_input_embeddings().weight
    words = [token for word in ("big", "red", "circle") for token in encoder.word(word)]
    assert (embeddings[0, 1] - table[words].sum(0)).abs().max() < 1e-6
    assert (embeddings[0, 3] - table[sample.ids[3]]).abs().max() == 0


def test_held_out_phrasings_are_never_trained_on() -> None:
    held_out = {text.lower().rstrip("?.!") for _, text, _ in dialogues.held_out_exchanges()}
    phrasings = [text for asked, _ in dialogues.INTENTS.values() for text in dialogues.split_phrasings(asked, False)]
    trained = {text.lower().rstrip("?.!") for text in phrasings}
    assert len(held_out) > 30
    assert len(held_out & trained) < 3  # "Hi!" and "Hi" are the same greeting


@pytest.mark.parametrize("seed", range(5))
def test_sums_are_right(seed: int) -> None:
    rng = random.Random(seed)
    for question, answer in (exchange for _ in range(30) for exchange in dialogues.sums(rng)):
        numbers = [int(number) for number in "".join(c if c.isdigit() else " " for c in question).split()]
        if "plus" in question or "+" in question:
            assert int(answer) == sum(numbers)
        if "minus" in question:
            assert int(answer) == numbers[0] - numbers[1]


def test_drills_tell_the_truth() -> None:
    for seed in range(200):
        items, exchanges = drills.drill(random.Random(seed), 8)
        words = " ".join(items).split()
        for question, answer in exchanges:
            if question.startswith("Is there"):
                assert (question[9:-1] in words) == (answer == "yes")
            if question.startswith("After"):
                assert items[items.index(question[6:-1]) + 1] == answer
            if question == "How many?":
                assert answer == drills.NUMBERS[len(items)]


def test_dense_drills_tell_the_truth() -> None:
    for seed in range(200):
        items, exchanges = drills.dense_drill(random.Random(seed), 8)
        words = " ".join(items).split()
        for question, answer in exchanges:
            told = [part.rsplit(" ", 1) for part in answer.split(", ")]
            if question == "Say all.":
                assert answer == ", ".join(items)
            if question.startswith("Say the"):
                assert answer.split(", ") == [item for item in items if question[8:-1] in item.split()]
            if question.startswith("Is there"):
                assert [(w in words) for w, _ in told] == [t == "yes" for _, t in told]
            if question.startswith("Count"):
                assert [drills.NUMBERS[words.count(word)] for word, _ in told] == [number for _, number in told]
            if question.startswith("What color"):
                assert all(any(item.endswith(f"{color} {shape}") for item in items) for shape, color in told)
            if question.startswith("What follows"):
                assert all(part in " ".join(items) for part in answer.split(", "))


@pytest.mark.parametrize("ease", [0.0, 1.0])
def test_dialogues_about_two_things_show_both_before_they_ask(ease: float) -> None:
    contexts = set()
    for seed in range(60):
        messages = [m for m in text_worlds.joint_dialogue(random.Random(seed), ease) if m["role"] != "system"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        parts = messages[0]["content"].split(text_worlds.PATCHES)
        pictures = len(parts) // 2
        assert pictures < 2 or parts[2] == "\n"  # between two pictures, as between real ones
        contexts.add(pictures)
    assert contexts >= {1, 2}


def test_thinned_scenes_keep_towers_standing() -> None:
    rng = random.Random(0)
    for _ in range(50):
        scene = drills.thinned(sample_scene(rng, "tower"), rng, 2)
        for x in (0, 150, 300):
            levels = sorted(item.y for item in scene.items if x <= item.x < x + 100)
            assert 1 <= len(levels) <= 2
            assert levels[-1] == 80


def scene(*items: tuple[str, str]) -> Scene:
    drawn = tuple(Item(shape, color, 20, 30 * k, 10, (0, 0, 0)) for k, (color, shape) in enumerate(items))
    return Scene("canvas", 300, 100, (255, 255, 255), ((0, 0, 300, 100),), drawn)


def test_tallies_count_every_word_in_every_part() -> None:
    first, second = scene(("red", "circle"), ("red", "star")), scene(("blue", "star"))
    for seed in range(100):
        request, answer = drills.tally([first, second], random.Random(seed))
        counts = {word: numbers for word, *numbers in (part.split() for part in answer.split(", "))}
        parts = {"Count in the first:": [0], "Count in the second:": [1]}.get(request.rpartition(":")[0] + ":", [0, 1])
        truth = {"red": ("two", "zero"), "star": ("one", "one"), "circle": ("one", "zero"), "blue": ("zero", "one")}
        for word, numbers in counts.items():
            assert numbers == [truth.get(word, ("zero", "zero"))[part] for part in parts]


def test_questions_about_two_pictures_have_exact_answers() -> None:
    first, second = (
        scene(("red", "circle"), ("red", "star")),
        scene(("red", "circle"), ("blue", "star"), ("blue", "cross")),
    )
    answers = {}
    for seed in range(200):
        answers |= {q: a for _, q, a in joint_questions.two_picture_questions(first, second, random.Random(seed), 8)}
    assert answers["Which picture has more red shapes?"] == "the first"
    assert answers["Which picture has fewer shapes?"] == "the first"
    assert answers["Which picture has more circles?"] == "the same"
    assert answers["How many stars are there in both pictures together?"] == "two"
    assert answers["Which picture shows a blue shape?"] == "the second"
    assert answers["Do both pictures show a cross?"] == "no"
    assert answers["How many blue shapes are there in the second picture?"] == "two"


def test_questions_about_a_picture_and_a_sound_have_exact_answers() -> None:
    shown, heard = scene(("red", "circle"), ("red", "star")), Sound("beeps", count=2, pitch="high", loudness="loud")
    answers = {}
    for seed in range(200):
        answers |= {q: a for _, q, a in joint_questions.picture_sound_questions(shown, heard, random.Random(seed), 8)}
    assert answers["Are there as many red shapes as beeps?"] == "yes"
    assert answers["Are there more circles than beeps?"] == "no"
    assert answers["Do you see a circle and hear a beep?"] == "yes"
    assert answers["Do you see a circle and hear a siren?"] == "no"
