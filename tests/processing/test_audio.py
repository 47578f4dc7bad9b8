import io
import json
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import soxr

from mmllm.errors import MediaError
from mmllm.processing.audio import decode_audio
from mmllm.processing.sources import Limits

LIMITS = Limits()


def encoded(samples: np.ndarray, rate: int, format: str = "WAV", subtype: str | None = None) -> bytes:
    """``samples``: (T,) or (T, channels)."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def tone(rate: int, seconds: float = 0.4, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def reference(data: bytes, rate: int) -> np.ndarray:
    samples, own = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), own, rate)


def wav(
    samples: bytes, *, riff: int | None = None, data: int | None = None, rate: int = 16_000, channels: int = 1
) -> bytes:
    """A 16-bit WAV whose size fields can lie."""
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * 2 * channels, 2 * channels, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data"
    body += struct.pack("<I", len(samples) if data is None else data) + samples
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "PCM_32"),
    ("WAV", "PCM_U8"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAV", "ULAW"),
    ("WAV", "IMA_ADPCM"),
    ("WAVEX", "PCM_16"),
    ("RF64", "PCM_16"),
    ("AIFF", "PCM_24"),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_every_format_equals_soundfile_and_soxr(format: str, subtype: str) -> None:
    stereo = np.stack([tone(48_000), tone(48_000, hertz=700.0)], axis=-1)
    data = encoded(stereo, 48_000, format, subtype)
    result = decode_audio(data, 16_000, LIMITS)
    assert result.dtype == np.float32
    assert result.ndim == 1
    assert result.flags.c_contiguous
    assert result.flags.writeable
    np.testing.assert_allclose(result, reference(data, 16_000), atol=1e-6)
    assert abs(result.std() - 0.25) < 0.02  # two sines of amplitude 1/4


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
@pytest.mark.parametrize("target", [16_000, 48_000])
def test_every_rate_keeps_pitch_and_length(rate: int, target: int) -> None:
    result = decode_audio(encoded(tone(rate), rate), target, LIMITS)
    assert len(result) == target * 2 // 5
    spectrum = np.abs(np.fft.rfft(result))
    assert spectrum.argmax() * target / len(result) == 440
    middle = slice(target // 10, -target // 10)
    np.testing.assert_allclose(result[middle], tone(target)[middle], atol=2e-3)


@pytest.mark.parametrize("channels", [1, 2, 6, 8, 64])
def test_channels_are_averaged(channels: int) -> None:
    samples = np.zeros((1600, channels), dtype=np.float32)
    samples[:, -1] = 0.8
    result = decode_audio(encoded(samples, 16_000, subtype="FLOAT"), 16_000, LIMITS)
    np.testing.assert_allclose(result, np.full(1600, 0.8 / channels), atol=1e-6)


def test_long_sounds_are_the_same_in_blocks_as_in_one_piece() -> None:
    samples = (
        np.random.default_rng(0).uniform(-0.5, 0.5, (700_000, 4)).astype(np.float32)
    )  # 2.8 million values: 3 blocks
    data = encoded(samples, 44_100, subtype="FLOAT")
    np.testing.assert_allclose(decode_audio(data, 16_000, LIMITS), reference(data, 16_000), atol=1e-6)


def test_float_values_beyond_full_scale_are_kept() -> None:
    result = decode_audio(encoded(np.full(100, 3.0), 16_000, subtype="FLOAT"), 16_000, LIMITS)
    np.testing.assert_allclose(result, 3.0)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 192_000])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_samples_are_enough(rate: int, count: int) -> None:
    result = decode_audio(encoded(np.full(count, 0.25), rate, subtype="FLOAT"), 16_000, LIMITS)
    assert len(result) >= 1
    assert np.isfinite(result).all()


@pytest.mark.parametrize("format", ["WAV", "AIFF", "FLAC", "OGG"])
def test_a_sound_without_samples_is_refused(format: str) -> None:
    with pytest.raises(MediaError, match=r"empty|cannot be decoded"):
        decode_audio(encoded(np.zeros(0), 16_000, format), 16_000, LIMITS)


def test_an_empty_wav_is_called_empty() -> None:
    with pytest.raises(MediaError, match="empty: it has a header, but no samples"):
        decode_audio(wav(b""), 16_000, LIMITS)
    with pytest.raises(MediaError, match="empty"):
        decode_audio(b"", 16_000, LIMITS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_samples_that_are_no_numbers_are_refused(value: float, subtype: str) -> None:
    samples = np.stack([tone(16_000), tone(16_000)], axis=-1)
    samples[5000, 1] = value
    with pytest.raises(MediaError, match="NaN or infinite"):
        decode_audio(encoded(samples, 16_000, subtype=subtype), 8_000, LIMITS)


def test_samples_that_overflow_are_refused() -> None:
    samples = np.tile(np.array([3.4e38, -3.4e38], dtype=np.float32), 500)
    with pytest.raises(MediaError, match=r"too large|NaN or infinite"):
        decode_audio(encoded(samples, 16_000, subtype="FLOAT"), 44_100, LIMITS)


# Headers that lie, files that end early


@pytest.mark.parametrize("claim", [0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFFFFF - 36])
def test_a_streamed_wav_of_unknown_length_is_read_to_its_end(claim: int) -> None:
    samples = (tone(16_000) * 32767).astype("<i2")
    result = decode_audio(wav(samples.tobytes(), riff=0xFFFFFFFF, data=claim), 16_000, LIMITS)
    np.testing.assert_allclose(result, samples / 32768, atol=1e-6)


def test_a_streamed_flac_of_unknown_length_is_read_to_its_end() -> None:
    data = bytearray(encoded(tone(16_000), 16_000, "FLAC"))
    data[21] &= 0xF0  # STREAMINFO: the 36-bit count of samples, 0 = unknown
    data[22:26] = bytes(4)
    assert len(decode_audio(bytes(data), 16_000, LIMITS)) == 6_400


@pytest.mark.parametrize("claim", [4_000_000_000, 1_000_000, 16_001])
def test_a_wav_that_claims_more_than_it_holds_is_refused(claim: int) -> None:
    with pytest.raises(MediaError, match="truncated"):
        decode_audio(wav(bytes(16_000), data=claim), 16_000, LIMITS)


@pytest.mark.parametrize("format", ["WAV", "AIFF", "FLAC"])
def test_truncated_sounds_are_refused(format: str) -> None:
    data = encoded(np.random.default_rng(0).uniform(-0.5, 0.5, 30_000), 16_000, format)
    for percent in range(1, 100):
        with pytest.raises(MediaError):
            decode_audio(data[: len(data) * percent // 100], 16_000, LIMITS)


@pytest.mark.parametrize("format", ["OGG", "MP3"])
def test_cut_streams_are_refused_or_give_their_beginning(format: str) -> None:
    data = encoded(tone(16_000, seconds=2.0), 16_000, format)
    whole = decode_audio(data, 16_000, LIMITS)
    for percent in range(1, 100):
        try:
            part = decode_audio(data[: len(data) * percent // 100], 16_000, LIMITS)
        except MediaError:
            continue
        assert len(part) <= len(whole)
        same = len(part) - 2_000  # the last frames fade or lack their successors
        np.testing.assert_allclose(part[: max(same, 0)], whole[: max(same, 0)], atol=1e-4)


def test_a_cover_picture_before_the_sound_is_skipped() -> None:
    data = encoded(tone(16_000), 16_000, "MP3")
    picture = b"APIC" + struct.pack(">IH", 300_000, 0) + b"\0image/jpeg\0\3\0".ljust(300_000, b"x")
    size = bytes(len(picture) >> shift & 127 for shift in (21, 14, 7, 0))
    tag = b"ID3\3\0\0" + size + picture
    np.testing.assert_array_equal(decode_audio(tag + data, 16_000, LIMITS), decode_audio(data, 16_000, LIMITS))
    with pytest.raises(MediaError, match="ID3 tag"):
        decode_audio(tag[:-1], 16_000, LIMITS)


# Limits


def test_the_time_limit_is_exact_and_counts_seconds_of_the_source() -> None:
    limits = Limits(max_seconds=2.0)
    assert len(decode_audio(encoded(np.zeros(88_200), 44_100), 16_000, limits)) == 32_000
    with pytest.raises(MediaError, match=r"longer than 2 seconds \(max_seconds\)"):
        decode_audio(encoded(np.zeros(88_201), 44_100), 16_000, limits)


def test_the_byte_limit() -> None:
    data = encoded(tone(16_000), 16_000)
    with pytest.raises(MediaError, match="max_bytes"):
        decode_audio(data, 16_000, Limits(max_bytes=len(data) - 1))


@pytest.mark.parametrize("rate", [1, 100, 999, 768_001, 2_000_000_000])
def test_senseless_rates_are_refused(rate: int) -> None:
    with pytest.raises(MediaError, match="sampling rate"):
        decode_audio(wav(bytes(100), rate=rate), 16_000, LIMITS)


BOUNDED = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
import io
import numpy as np, soundfile
from mmllm.errors import MediaError
from mmllm.processing.audio import decode_audio
from mmllm.processing.sources import Limits

file = io.BytesIO()
with soundfile.SoundFile(file, "w", 96_000, 8, format="FLAC") as sound:  # 800 MB as float32 when decoded whole
    silence = np.zeros((96_000, 8), dtype=np.int16)
    for _ in range(260):
        sound.write(silence)
data = file.getvalue()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
length = len(decode_audio(data, 16_000, Limits()))
try:
    decode_audio(data, 16_000, Limits(max_seconds=60))
except MediaError as error:
    outcome = str(error)
growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps([len(data), length, outcome, growth]))
"""


def test_highly_compressed_sounds_take_bounded_memory() -> None:
    run = subprocess.run([sys.executable, "-c", BOUNDED], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    size, length, outcome, growth = json.loads(run.stdout)
    assert size < 2_000_000
    assert length == 260 * 16_000  # 16 MB, decoded block by block
    assert "longer than 60 seconds" in outcome
    assert growth < 100  # MiB


# Refusals


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\0\0\0\x20ftypM4A \0\0\0\0", "M4A or MP4"),
        (b"\0\0\0\x20ftypisom\0\0\0\0", "M4A or MP4"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(90), "WMA"),
        (b"#!AMR\n" + bytes(90), "AMR"),
        (b"\x1a\x45\xdf\xa3" + bytes(90), "WebM"),
        (b"\xff\xf1\x50\x80" + bytes(90), "AAC"),
        (b"MThd" + bytes(90), "MIDI"),
        (b"<html>", "HTML"),
        (b"some text", "another kind"),
        (b"RIFF\x24\0\0\0WEBPVP8 ", "another kind"),
        (b"RIFF\x24\0\0\0AVI LIST", "another kind"),
        (b"\x93NUMPY\1\0", "another kind"),
        (bytes(1000), "another kind"),
        (b"OggS" + bytes(1000), "cannot be decoded"),
        (b"\xff\xfb", "another kind"),
    ],
)
def test_other_formats_are_refused_by_name_with_the_ones_that_work(data: bytes, found: str) -> None:
    with pytest.raises(MediaError, match=found) as caught:
        decode_audio(data, 16_000, LIMITS)
    assert "WAV, FLAC, MP3, Ogg" in str(caught.value)


def test_containers_that_were_not_asked_for_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    matlab = encoded(tone(16_000), 16_000, "MAT5", "PCM_16")
    monkeypatch.setattr("mmllm.processing.audio._Stream", None)
    with pytest.raises(MediaError, match="another kind"):
        decode_audio(matlab, 16_000, LIMITS)


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_damaged_bytes_raise_media_errors_only(format: str, subtype: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = encoded(np.stack([tone(16_000, 0.1), tone(16_000, 0.1)], axis=-1), 16_000, format, subtype)
    source = random.Random(0)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(source.choice([1, 3, 20])):
            damaged[source.randrange(min(len(data), source.choice([64, len(data)])))] = source.randrange(256)
        try:
            result = decode_audio(bytes(damaged), 16_000, Limits(max_seconds=10))
        except MediaError:
            continue
        assert result.dtype == np.float32
        assert len(result) >= 1
        assert np.isfinite(result).all()
    assert "Traceback" not in capfd.readouterr().err  # nothing escapes through libsndfile's callbacks either


def test_errors_keep_their_cause() -> None:
    data = encoded(tone(16_000), 16_000, "FLAC")
    with pytest.raises(MediaError, match=r"cannot be decoded \(.+\): it is truncated, damaged") as caught:
        decode_audio(data[:60], 16_000, LIMITS)
    assert isinstance(caught.value.__cause__, soundfile.LibsndfileError)
    assert "BytesIO" not in str(caught.value)
