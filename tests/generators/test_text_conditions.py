"""The cache of text conditions: every caption encoded once, never an old or a damaged value, the same bits as without."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.config.base import BuildContext, component_class
from mmllm.generators.base import Condition, Generator
from mmllm.generators.text_conditions import STALE, Store, TextConditions
from mmllm.generators.tiny import PIPELINES

CAPTIONS = ["a red circle", "two blue stars", "a red circle"]
GIGABYTE = 10**9


def generator_of(kind: str = "stable_diffusion", **more: Any) -> Generator:
    config = component_class("generator", kind).model_validate({"kind": kind, **more})
    generator: Generator = config.tiny().build(BuildContext(dtype=torch.float32))  # type: ignore[attr-defined]
    return generator


def count(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions that the generator's text encoder is asked for, as they come."""
    encode, asked = generator.encode_text, list[str]()

    def counting(captions: Sequence[str]) -> Condition:
        asked.extend(captions)
        return encode(captions)

    monkeypatch.setattr(generator, "encode_text", counting)
    return asked


def assert_equal(found: Condition, expected: Condition) -> None:
    assert found.streams.keys() == expected.streams.keys()
    assert found.masks.keys() == expected.masks.keys()
    for name, value in expected.streams.items():
        assert torch.equal(found.streams[name], value)
        assert found.streams[name].dtype == value.dtype
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())


KINDS = {name: kind for kind in ("stable_diffusion", "audio_diffusion", "video_diffusion") for name in PIPELINES
         if name in component_class("generator", kind).families}  # type: ignore[attr-defined]  # fmt: skip


@pytest.mark.parametrize("name", list(KINDS))
def test_every_family_gives_the_same_bits_from_the_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = generator_of(KINDS[name], architecture={"pipeline": name})
    plain = TextConditions(generator)(CAPTIONS)
    asked = count(generator, monkeypatch)
    assert_equal(TextConditions(generator, Store(tmp_path, GIGABYTE))(CAPTIONS), plain)
    assert asked == CAPTIONS[:2], "each caption once, alone"
    # The same generator made again, as another process or a resumed run makes it.
    again = generator_of(KINDS[name], architecture={"pipeline": name})
    asked = count(again, monkeypatch)
    assert_equal(TextConditions(again, Store(tmp_path, GIGABYTE))(CAPTIONS[::-1]), plain)
    assert asked == []


def test_a_condition_does_not_depend_on_the_captions_beside_it(tmp_path: Path) -> None:
    generator = generator_of("audio_diffusion", architecture={"pipeline": "AudioLDM2Pipeline"})
    for store in (None, Store(tmp_path, GIGABYTE)):
        both, alone = (TextConditions(generator, store)(captions) for captions in (CAPTIONS, CAPTIONS[1:2]))
        assert_equal(both.at(torch.tensor([1])), alone)


def alter_weight(generator: Any) -> None:
    generator.pipeline.text_encoder.get_input_embeddings().weight.data[5] += 1e-3


def alter_other_weight(generator: Any) -> None:
    next(generator.pipeline.unet.parameters()).data.mul_(2.0)


def alter_dtype(generator: Any) -> None:
    generator.bfloat16()


def alter_config(generator: Any) -> None:
    generator.pipeline.text_encoder.config.hidden_act = "relu"


def alter_tokenizer(generator: Any) -> None:
    generator.pipeline.tokenizer.model_max_length = 8


@pytest.mark.parametrize("alter", [alter_weight, alter_other_weight, alter_dtype, alter_config, alter_tokenizer])
def test_an_altered_generator_never_gets_an_old_value(
    alter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TextConditions(generator_of(), Store(tmp_path, GIGABYTE))(CAPTIONS)
    other = generator_of()
    alter(other)
    asked = count(other, monkeypatch)
    TextConditions(other, Store(tmp_path, GIGABYTE))(CAPTIONS)
    assert asked == CAPTIONS[:2]


def test_a_change_in_place_is_noticed_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator: Any = generator_of()
    conditions = TextConditions(generator, Store(tmp_path, GIGABYTE))
    before = conditions(CAPTIONS)
    with torch.no_grad():
        generator.pipeline.text_encoder.get_input_embeddings().weight.mul_(1.5)
    assert not torch.equal(conditions(CAPTIONS)["text"], before["text"])


def test_autocast_has_conditions_of_its_own(tmp_path: Path) -> None:
    generator = generator_of()
    plain = TextConditions(generator, Store(tmp_path, GIGABYTE))(CAPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        expected = TextConditions(generator)(CAPTIONS)
        assert_equal(TextConditions(generator, Store(tmp_path, GIGABYTE))(CAPTIONS), expected)
    assert not torch.equal(plain["text"].float(), expected["text"].float())


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "words"])
def test_a_damaged_file_is_made_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = generator_of()
    store = Store(tmp_path, GIGABYTE)
    plain = TextConditions(generator, store)(CAPTIONS[:1])
    (path,) = tmp_path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes({"cut": data[:-9], "flipped": data, "empty": b"", "words": b"\x09" * 40}[damage])
    asked = count(generator, monkeypatch)
    for _ in range(2):
        assert_equal(TextConditions(generator, store)(CAPTIONS[:1]), plain)
    assert asked == CAPTIONS[:1], "once, and then it is whole again"


def write_for_ever(folder: Path) -> None:
    store = Store(folder, GIGABYTE)
    for turn in range(10**6):
        store.put(f"{turn % 7:064x}", {"stream.text": torch.full((1, 300, 300), float(turn % 7))})


def test_writers_killed_half_way_leave_nothing_half(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("spawn")
    writers = [fork.Process(target=write_for_ever, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 600
    while len(list(tmp_path.rglob("*.safetensors"))) < 7 and time.monotonic() < deadline:
        time.sleep(0.02)
    for writer in writers:
        writer.kill()
        writer.join()
    # What a kill can leave behind, and the file of a writer that is still at work.
    for name, age in (("old", 2 * STALE), ("new", 0.0)):
        half = tmp_path / "unfinished" / name
        half.write_bytes(b"half")
        os.utime(half, (time.time() - age,) * 2)
    store = Store(tmp_path, GIGABYTE)
    for number in range(7):
        kept = store.get(f"{number:064x}")
        assert kept is not None
        assert torch.equal(kept["stream.text"], torch.full((1, 300, 300), float(number)))
    names = {path.name for path in (tmp_path / "unfinished").iterdir()}
    assert "new" in names
    assert "old" not in names


def test_the_limit_holds_over_all_processes_and_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    piece = {"stream.text": torch.zeros(250)}  # 1000 bytes
    for store in (Store(tmp_path, 10_000, processes=2), Store(tmp_path, 10_000, processes=2)):
        for _ in range(20):
            store.put(os.urandom(32).hex(), piece)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 10_000
    assert caplog.text.count("the limit") == 2, "said once by each"


def test_a_disk_that_refuses_costs_the_cache_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmllm.generators.text_conditions.os.replace", full)
    generator = generator_of()
    store = Store(tmp_path, GIGABYTE)
    assert_equal(TextConditions(generator, store)(CAPTIONS), TextConditions(generator)(CAPTIONS))
