"""The D rows of the faults that data have: each as it meets a training, a file check or a question."""

from __future__ import annotations

import io
import time
import wave
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from data_faults import LIMITS, PROCESSOR, bomb, decoded, film, saved, silent_film, tiny_model, tiny_processor
from data_rows import row
from PIL import Image

from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.config.run import DataSource
from mmllm.data.dataset import MAX_FAILURES, SampleStream, SkipLog
from mmllm.data.mixture import StageData
from mmllm.data.readers import LlavaConfig, MessagesConfig
from mmllm.errors import ConfigError, DataError, MediaError
from mmllm.processing.audio import decode_audio
from mmllm.processing.images import decode_image
from mmllm.processing.messages import Sample, parse_messages
from mmllm.processing.video import decode_video

Write = Callable[..., Path]


def stream(path: Path, seed: int = 0) -> SampleStream:
    return SampleStream(StageData([DataSource(reader=MessagesConfig(path=str(path)))], seed))


def picture(name: str, kind: str = "image") -> dict[str, Any]:
    return {"type": kind, "path": name}


@pytest.mark.parametrize("name", ["noise.jpg", "noise.png", "tone.wav", "tone.flac", "film.mp4"])
def test_D01_cut_files_are_skipped_counted_and_replaced_by_rule(write: Write, tmp_path: Path, name: str) -> None:
    kind = {"jpg": "image", "png": "image", "wav": "audio", "flac": "audio", "mp4": "video"}[name.partition(".")[2]]
    saved(tmp_path / name)
    whole, shares = (tmp_path / name).read_bytes(), (1, 10, 25, 50, 75, 90, 99)
    for share in shares:
        (tmp_path / f"{share}-{name}").write_bytes(whole[: max(len(whole) * share // 100, 1)])
    bad = [row(f"bad{share}", [picture(f"{share}-{name}", kind)]) for share in shares]
    path = write(*chain(*([row(f"good{i}", [picture(name, kind)]), one] for i, one in enumerate([*bad, *bad]))))
    runs = []
    for _ in range(2):
        samples, log = stream(path), SkipLog(max_share=0.9)
        order = samples.data.order(0)
        loaded = [samples.load(index, PROCESSOR, 50, order[at // 4 * 4 :][:4]) for at, index in enumerate(order)]
        for one in loaded:
            log.add(one)
        runs.append([one.encoded.id for one in loaded])
        assert len(loaded) == len(order) == 28
        assert set(log.reasons) == {"MediaError"}
        assert len(log.met) + 1 >= 14, "every cut file was met, but for one that may have lost nothing"
        followers = [one.encoded.id == f"good{one.failures[0].index // 2 + 1}" for one in loaded if one.failures]
        assert followers.count(True) < len(followers) / 2, "a replacement is not just the next row"
    assert runs[0] == runs[1]
    assert all(id.startswith("good") for id in runs[0] if not id.startswith("bad99"))


def test_D02_a_ruined_file_ends_the_run_with_its_first_causes(write: Write, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    path = write(*(row(str(i), [picture("cut.png")]) for i in range(300)))
    began = time.process_time()
    with pytest.raises(DataError, match=f"{MAX_FAILURES} samples in a row cannot be used") as caught:
        stream(path).load(7, PROCESSOR, 50)
    assert time.process_time() - began < 20
    assert str(caught.value).count("header is damaged") == 5
    assert f"{path}:8: " in str(caught.value)


@pytest.mark.parametrize(("limit", "met"), [(0.1, 100), (0.0, 1), (0.6, None)])
def test_D02_a_ruined_file_among_good_ones_ends_it_by_its_share(write: Write, limit: float, met: int | None) -> None:
    """Two sources, one of which holds nothing but faults: a replacement comes from the same source, so it ends at once; rows
    between good ones end it where the stage says."""
    good = write(*(row(f"g{i}") for i in range(200)), name="good.jsonl")
    ruined = write(*["{broken"] * 200, name="ruined.jsonl")
    sources = [DataSource(reader=MessagesConfig(path=str(path))) for path in (good, ruined)]
    both = SampleStream(StageData(sources, 0))
    first = next(index for index in both.data.order(0) if both.data.source_of(index) == 1)
    with pytest.raises(DataError, match=r"in a row cannot be used; the first causes:\n.*ruined\.jsonl"):
        both.load(first, PROCESSOR, 50)
    mixed = stream(write(*("{broken" if i % 2 else row(f"{i}") for i in range(400))))
    log = SkipLog(max_share=limit)

    def run() -> None:
        for index in mixed.data.order(0):
            log.add(mixed.load(index, PROCESSOR, 50))

    if met is None:
        run()
        return
    with pytest.raises(DataError, match=rf"the limit is {limit:.0%} \(`max_skipped`\)"):
        run()
    assert met <= log.used + log.skipped < met + 10


def test_D03_a_pixel_bomb_is_refused_from_its_header() -> None:
    data = bomb(20_000)
    assert len(data) < 100_000
    Image.init()
    process = psutil.Process()
    before, began = process.memory_info().rss, time.process_time()
    with pytest.raises(MediaError, match="pixels"):
        decode_image(data, LIMITS)
    assert process.memory_info().rss - before < 100e6
    assert time.process_time() - began < 1


def test_D05_eight_orientations_are_one_tensor(tmp_path: Path) -> None:
    """For training (a file of the data's folder) and for a question (bytes) alike."""
    processor = tiny_processor()
    seen = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    stored = {
        1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1],
        5: seen.transpose(1, 0, 2), 6: seen.transpose(1, 0, 2)[::-1],
        7: seen.transpose(1, 0, 2)[::-1, ::-1], 8: seen.transpose(1, 0, 2)[:, ::-1],
    }  # fmt: skip
    found = []
    for orientation, pixels in stored.items():
        block = Image.Exif()
        block[274] = orientation
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"{orientation}.png", exif=block)
        data = (tmp_path / f"{orientation}.png").read_bytes()
        turns = [{"role": "user", "content": [picture(f"{orientation}.png")]}, {"role": "assistant", "content": "x"}]
        trained = processor.encode_sample(Sample("s", parse_messages(turns), tmp_path), 512)
        asked = processor.encode_prompt([{"role": "user", "content": [{"type": "image", "data": data}]}])
        found += [encoded.spans[0].item["pixels"].numpy() for encoded in (trained, asked)]
    assert len(found) == 16
    assert all(np.array_equal(one, found[0]) for one in found)
    assert found[0].std() > 0


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 60)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P with tRNS", "L with tRNS", "RGB with tRNS"])
def test_D06_what_is_transparent_shows_the_background(mode: str, background: tuple[int, int, int]) -> None:
    options: dict[str, Any] = {}
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (2, 1), (200, 200, 200, 255) if mode == "RGBA" else (200, 255))
        image.putpixel((1, 0), (7, 7, 7, 0) if mode == "RGBA" else (7, 0))
    elif mode == "PA":
        image = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
        image.putpixel((1, 0), (7, 7, 7, 0))
        image = image.quantize(4)
    else:
        image = Image.new(mode[0] if mode[0] != "R" else "RGB", (2, 1))
        if mode[0] == "P":
            image.putpalette([200, 200, 200, 7, 7, 7])
            image.putpixel((1, 0), 1)
            options["transparency"] = 1
        else:
            image.putpixel((0, 0), 200 if mode[0] == "L" else (200, 200, 200))
            image.putpixel((1, 0), 7 if mode[0] == "L" else (7, 7, 7))
            options["transparency"] = 7 if mode[0] == "L" else (7, 7, 7)
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    left, right = decoded(file.getvalue(), background=background)[0].tolist()
    assert np.allclose(left, 200, atol=2)
    assert right == list(background)


def ramp(mode: str) -> tuple[Image.Image, np.ndarray, str]:
    """A picture of a mode, what it is in 8-bit RGB, and a format that holds it."""
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257), rgb, "PNG"
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255), rgb, "TIFF"
    if mode == "1":
        return Image.fromarray(grey > 127).convert("1"), np.where(rgb > 127, 255, 0), "PNG"
    if mode == "P":
        return Image.fromarray(grey).convert("P"), rgb, "PNG"
    if mode == "CMYK":
        inverted = np.zeros((8, 8, 4), np.uint8)
        inverted[..., 3] = 255 - grey  # black ink alone
        return Image.fromarray(inverted, "CMYK"), rgb, "TIFF"
    return Image.fromarray(grey), rgb, "PNG"


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "F", "1", "P", "L"])
def test_D07_every_mode_becomes_the_same_grey_ramp(mode: str) -> None:
    image, expected, format = ramp(mode)
    file = io.BytesIO()
    image.save(file, format)
    found = decoded(file.getvalue())
    assert found.shape == (8, 8, 3)
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize(
    "data",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"%PDF-1.7\n",
        b"<!doctype html><p>",
        b"MZ\x90",
    ],
    ids=["svg", "eps", "pdf", "html", "exe"],
)
def test_D09_the_bytes_count_and_not_the_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "picture.png").write_bytes(data)
    question = [{"role": "user", "content": [{"type": "image", "path": str(tmp_path / "picture.png")}]}]
    with pytest.raises(MediaError, match=r"^picture\.png: "):
        tiny_processor().encode_prompt(question)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "real.jpg")
    (tmp_path / "real.jpg").rename(tmp_path / "picture.png")
    assert tiny_processor().encode_prompt(question).spans


def wav(samples: np.ndarray, rate: int, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(
    ("rate", "channels", "subtype"),
    [(8_000, 1, "PCM_16"), (192_000, 1, "PCM_16"), (16_000, 8, "PCM_16"), (44_100, 2, "PCM_24")],
)
def test_D10_any_sound_becomes_one_channel_at_the_rate_that_is_wanted(rate: int, channels: int, subtype: str) -> None:
    wave_ = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)
    found = decode_audio(
        wav(np.repeat(wave_[:, None], channels, axis=1), rate, subtype), limits=LIMITS, sample_rate=16_000
    )
    assert found.dtype == np.float32
    assert found.shape == (8_000,)
    spectrum = np.abs(np.fft.rfft(found))
    assert abs(int(spectrum.argmax()) * 2 - 440) <= 2
    assert np.abs(found[1000:7000]).max() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    "samples", [np.zeros(0), np.array([0.25]), np.array([0.1, np.nan, 0.1]), np.array([0.1, np.inf])]
)
def test_D10_no_sound_one_sample_or_no_number(samples: np.ndarray) -> None:
    data = wav(samples, 16_000, "FLOAT")
    if len(samples) == 1:
        assert np.isfinite(decode_audio(data, limits=LIMITS, sample_rate=16_000)).all()
        return
    with pytest.raises(MediaError):
        decode_audio(data, limits=LIMITS, sample_rate=16_000)


def test_D10_a_header_that_claims_four_gigabytes() -> None:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(bytes(3200))
    data = bytearray(file.getvalue())
    data[40:44] = (0xF0000000).to_bytes(4, "little")
    before = psutil.Process().memory_info().rss
    with pytest.raises(MediaError):
        decode_audio(bytes(data), limits=LIMITS, sample_rate=16_000)
    assert psutil.Process().memory_info().rss - before < 100e6


def test_D12_clips_that_are_none_or_broken_or_short(write: Write, tmp_path: Path) -> None:
    whole = film(21)
    middle = bytearray(whole)
    middle[len(whole) // 3 : 2 * len(whole) // 3] = bytes(
        len(whole) // 3 + (2 * len(whole) // 3 - 2 * (len(whole) // 3))
    )
    refused = {"only sound": silent_film(), "nothing": b"", "cut": whole[: len(whole) // 2], "head": whole[:40]}
    for name, data in refused.items():
        with pytest.raises(MediaError):
            decode_video(data, LIMITS, frames=4)
        (tmp_path / f"{name}.mp4").write_bytes(data)
    assert len(decode_video(film(1), LIMITS, frames=4)) == 4, "of one frame a clip is made by repeating it"
    with suppress(MediaError):  # this or a clip; another error would be none that is documented
        assert len(decode_video(bytes(middle), LIMITS, frames=4)) == 4
    (tmp_path / "good.mp4").write_bytes(whole)
    rows = [row(name, [picture(f"{name}.mp4", "video")]) for name in refused]
    rows += [row(f"good{i}", [picture("good.mp4", "video")]) for i in range(8)]
    samples = stream(write(*rows))
    assert all(samples.load(i, PROCESSOR, 50).encoded.id.startswith("good") for i in range(len(rows)))


@pytest.mark.parametrize("count", [10**9, 2**63, 0, -1])
def test_D13_a_huge_number_of_frames_is_refused_before_anything_is_made(count: int) -> None:
    before, began = psutil.Process().memory_info().rss, time.process_time()
    with pytest.raises(MediaError, match="possible are 1 to"):
        decode_video(film(3), LIMITS, frames=count)
    encoder = {"kind": "frames", "encoder": {"kind": "clip", "arch": "ViT-B-32"}, "frames": count}
    tree = {
        "inputs": {"video": {"encoder": encoder, "projector": {"kind": "linear"}}},
        "backbone": tiny_model()["backbone"],
    }
    with pytest.raises(ConfigError, match=r"model\.inputs\.video\.encoder\.frames"):
        parse({"model": tree})
    assert psutil.Process().memory_info().rss - before < 100e6
    assert time.process_time() - began < 5


LLAVA = {"id": "x", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "1 <image>, but the row gives 0"),
        ({"image": ["a.png", "b.png"]}, "1 <image>, but the row gives 2"),
        ({"audio": "a.wav"}, "1 <image>, but the row gives 0"),
        (
            {"image": "a.png", "conversations": [{"from": "human", "value": "Which?"}, LLAVA["conversations"][1]]},
            "0 <image>",
        ),
    ],
    ids=["fewer", "more", "another modality", "none in the text"],
)
def test_D14_placeholders_and_media_that_do_not_agree_are_named_by_row(
    write: Write, change: dict[str, Any], message: str
) -> None:
    path = write({**LLAVA, "image": "a.png"}, {**LLAVA, **change})
    table = LlavaConfig(path=str(path)).open(BuildContext())
    assert len(table[0].messages) == 2
    with pytest.raises(DataError, match=message) as caught:
        table[1]
    assert f"{path}:2" in str(caught.value)


def test_D14_a_modality_that_the_model_lacks_is_named() -> None:
    turns = [{"role": "user", "content": [picture("a.mp4", "video")]}, {"role": "assistant", "content": "x"}]
    with pytest.raises(
        DataError, match="row-9: a part of type 'video', but this model's input modalities are: image, audio"
    ):
        tiny_processor().encode_sample(Sample("row-9", parse_messages(turns)), 512)
