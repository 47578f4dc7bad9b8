"""Samples that cannot be used: skipped, counted, replaced by a rule; a ruined file ends the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from data_rows import row
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mmllm.config.base import BuildContext
from mmllm.config.run import DataSource, StageConfig
from mmllm.data.dataset import MAX_FAILURES, Failure, Loaded, SampleStream, SkipLog, open_stage
from mmllm.data.mixture import StageData
from mmllm.data.readers import MessagesConfig
from mmllm.errors import ConfigError, DataError, SampleTooLong
from mmllm.processing.batch import Encoded
from mmllm.processing.images import decode_image
from mmllm.processing.messages import Sample
from mmllm.processing.processor import Processor
from mmllm.processing.sources import Limits, read_media

Write = Callable[..., Path]


class FakeProcessor:
    """Token ids are the question's characters; pictures are decoded, as the real processor does."""

    def encode_sample(self, sample: Sample, max_length: int) -> Encoded:
        text = sample.messages[0].text
        if len(text) > max_length:
            raise SampleTooLong(f"{sample.id}: {len(text)} tokens, max_length is {max_length}")
        for part in sample.messages[0].parts:
            if part.type == "image":
                decode_image(read_media(part.value, root=sample.root, limits=Limits()), Limits())
        return Encoded(sample.id, [ord(char) for char in text], [True] * len(text), [])


PROCESSOR = cast(Processor, FakeProcessor())


def stage(path: Path, batch_size: int = 4) -> StageConfig:
    source = DataSource(reader=MessagesConfig(path=str(path)))
    return StageConfig(name="s", train=["backbone"], lr=1e-3, data=[source], batch_size=batch_size)


def stream(path: Path) -> SampleStream:
    return SampleStream(StageData(stage(path).data, seed=0))


def picture(name: str) -> dict[str, Any]:
    return {"type": "image", "path": name}


def test_every_kind_of_bad_sample_is_replaced_and_named(write: Write, tmp_path: Path) -> None:
    Image.linear_gradient("L").save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:100])
    good = [row(f"g{i}", [picture("good.png"), {"type": "text", "text": "ok"}]) for i in range(20)]
    bad = [row("cut", [picture("cut.png")]), "{not json", row("long", "x" * 100), row("gone", [picture("no.png")])]
    path = write(*bad, *good)
    samples = stream(path)
    for index, reason in enumerate(("MediaError", "DataError", "SampleTooLong", "MediaError")):
        loaded = samples.load(index, PROCESSOR, 50)
        assert loaded.encoded.id.startswith("g")
        assert (loaded.failures[0].index, loaded.failures[0].reason) == (index, reason)
        assert loaded.failures[0].where == f"{path}:{index + 1}"
    assert samples.load(4, PROCESSOR, 50) == Loaded(Encoded("g0", [111, 107], [True, True], []))


@pytest.mark.parametrize("percent", [1, 20, 50, 80, 99])
def test_truncated_pictures_never_stop_an_epoch(write: Write, tmp_path: Path, percent: int) -> None:
    for kind in ("jpg", "png"):
        Image.effect_noise((64, 48), 90).save(tmp_path / f"good.{kind}")
        data = (tmp_path / f"good.{kind}").read_bytes()
        (tmp_path / f"bad.{kind}").write_bytes(data[: len(data) * percent // 100])
    names = ["good.jpg", "bad.jpg", "good.png", "bad.png", "good.png"] * 4
    samples = stream(write(*(row(f"{i}", [picture(name)]) for i, name in enumerate(names))))
    log = SkipLog(max_share=0.9)
    for index in samples.data.order(0):
        log.add(samples.load(index, PROCESSOR, 50))
    assert log.used == 20
    assert log.reasons["MediaError"] >= 8
    assert set(log.reasons) == {"MediaError"}


def test_neighbours_do_not_fall_on_the_same_next_sample(write: Write) -> None:
    path = write(*("bad" if i % 2 else row(f"{i}") for i in range(2000)))
    samples = stream(path)
    ids = [samples.load(index, PROCESSOR, 50).encoded.id for index in range(1, 201, 2)]
    assert len(set(ids)) > 90
    assert [id == f"{i + 1}" for i, id in zip(range(1, 201, 2), ids, strict=True)].count(True) < 3


def test_the_replacement_is_not_in_the_batch(write: Write) -> None:
    path = write("bad", *(row(f"{i}") for i in range(1, 12)))
    batch = list(range(11))
    assert stream(path).load(0, PROCESSOR, 50, batch).encoded.id == "11"
    # With nothing left outside the batch, a sample comes twice rather than the run ending.
    assert stream(path).load(0, PROCESSOR, 50, range(12)).encoded.id in {f"{i}" for i in range(1, 12)}


class ById(Dataset[str]):
    def __init__(self, samples: SampleStream, order: list[int]) -> None:
        self.samples, self.order = samples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> str:
        batch = self.order[place // 4 * 4 : place // 4 * 4 + 4]
        return self.samples.load(self.order[place], PROCESSOR, 50, batch).encoded.id


def test_workers_and_processes_change_nothing(write: Write) -> None:
    samples = stream(write(*("bad" if i % 5 == 0 else row(f"{i}") for i in range(40))))
    order = samples.data.order(1)
    expected = [ById(samples, order)[place] for place in range(40)]
    for workers in (1, 2):
        loader = DataLoader(ById(samples, order), batch_size=None, num_workers=workers)
        assert list(loader) == expected
    ranks = [[ById(samples, order)[place] for place in range(rank, 40, 2)] for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == sorted(expected)


def test_a_ruined_file_is_fatal_with_its_first_causes(write: Write) -> None:
    path = write(*(["{broken"] * 500))
    with pytest.raises(DataError) as error:
        stream(path).load(3, PROCESSOR, 50)
    text = str(error.value)
    assert f"{MAX_FAILURES} samples in a row cannot be used" in text
    assert text.count("not valid JSON") == 5
    assert f"{path}:4: not valid JSON" in text


def test_a_file_of_one_bad_row_ends_too(write: Write) -> None:
    with pytest.raises(DataError, match="in a row cannot be used"):
        stream(write("bad")).load(0, PROCESSOR, 50)


def test_too_large_a_share_of_bad_samples_is_fatal() -> None:
    log = SkipLog(max_share=0.1)
    bad = Loaded(Encoded("x", [], [], []), (Failure(5, "f:6", "MediaError", "'a.png': no such file"),))
    assert [f.index for f in log.add(bad)] == [5]
    assert log.add(bad) == []
    while log.used + log.skipped < MAX_FAILURES - 2:
        log.add(bad)
    with pytest.raises(DataError, match="the limit is 10%") as error:
        log.add(bad)
    assert log.used + log.skipped == MAX_FAILURES
    assert "  f:6: 'a.png': no such file" in str(error.value)


def test_no_bad_sample_is_too_much_where_none_is_allowed() -> None:
    log = SkipLog(max_share=0)
    log.add(Loaded(Encoded("x", [], [], [])))
    with pytest.raises(DataError, match="1 of 3 samples cannot be used, the limit is 0%"):
        log.add(Loaded(Encoded("x", [], [], []), (Failure(5, "f:6", "MediaError", "no such file"),)))


def test_a_share_below_the_limit_goes_on() -> None:
    log = SkipLog(max_share=0.1)
    failures = (Failure(0, "f:1", "SampleTooLong", "long"),)
    for number in range(1000):
        log.add(Loaded(Encoded("x", [], [], []), failures if number % 20 == 0 else ()))
    assert log.reasons == {"SampleTooLong": 50}


def test_data_that_does_not_fill_a_batch_is_a_config_error(write: Write) -> None:
    path = write(*(row(f"{i}") for i in range(7)))
    assert open_stage(stage(path, 7), 0, BuildContext()).epoch_size(0) == 7
    with pytest.raises(ConfigError, match=r"stages.s.batch_size: is 8, but an epoch has only 7 samples"):
        open_stage(stage(path, 8), 0, BuildContext())
