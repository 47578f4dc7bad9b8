"""Encoded sounds to mono float32 at one sampling rate: libsndfile decodes, soxr resamples, memory is bounded."""

from __future__ import annotations

import io
import struct

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from mmllm.errors import MediaError
from mmllm.processing.sources import Limits

FORMATS = "WAV, FLAC, MP3, Ogg (Vorbis, Opus, FLAC), AIFF, AU and CAF"
MIN_RATE, MAX_RATE = 1_000, 768_000
"""Sampling rates that are opened, in hertz. Others are met only in damaged headers."""
_UNKNOWN_FRAMES = 1 << 62  # libsndfile's count for a FLAC whose writer left the length open is above this
_BLOCK = 1 << 20  # samples over all channels decoded at a time: 4 MiB of float32

_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"\x30\x26\xb2\x75", "WMA"),
    (b"#!AMR", "AMR"),
    (b"\x1a\x45\xdf\xa3", "WebM or Matroska"),
    (b"MThd", "MIDI (notes, not sound)"),
    (b"MAC ", "Monkey's Audio"),
    (b"wvpk", "WavPack"),
    (b"DSD ", "DSD"),
    (b".RMF", "RealAudio"),
    (b"FLV", "Flash video"),
    (b"PK\3\4", "a ZIP archive"),
    (b"<", "an HTML or XML text"),
)


class _Bytes(io.BytesIO):
    """Bytes for libsndfile, which at times seeks before the start: that leaves the position, as ``lseek`` does."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.getbuffer().nbytes}[whence]
        return super().seek(base + offset) if base + offset >= 0 else self.tell()


class _Stream(soundfile.SoundFile):  # type: ignore[misc]  # soundfile is untyped
    """Reads from first sample to last. soundfile seeks after each block, which fails where the length is unknown."""

    def seekable(self) -> bool:
        return False


def decode_audio(data: bytes, sample_rate: int, limits: Limits) -> NDArray[np.float32]:
    """Decode one sound to mono float32 ``(T,)`` at ``sample_rate`` hertz; integer formats span [-1, 1).

    The format is told by the first bytes, never by a name; see ``FORMATS``. Channels are averaged, then soxr (quality
    HQ) resamples: ``T = round(frames * sample_rate / source rate)``, at least 1. Float formats keep values beyond
    [-1, 1].

    Raises ``MediaError``, and nothing else, for other formats, sounds without samples, NaN or infinite samples,
    sampling rates outside ``MIN_RATE``..``MAX_RATE``, more than ``limits.max_bytes`` or ``limits.max_seconds``, and
    damaged files. A WAV or AIFF whose header promises more sound than the file holds is truncated and refused, and so
    is a FLAC or Ogg that ends early; a WAV whose length is left open by a streaming writer (0xFFFFFFFF or 0x7FFFFFFF
    and near) is read to its end. MP3 has no binding length: what can be decoded is taken. The time limit counts decoded
    samples, not the header's claim, and decoding stops when it is passed.
    """
    if len(data) > limits.max_bytes:
        raise MediaError(f"the sound has {len(data):,} encoded bytes, the limit is {limits.max_bytes:,} (max_bytes)")
    _check_container(data)
    try:
        with _Stream(_Bytes(data)) as file:
            return _decode(file, sample_rate, limits)
    except MediaError:
        raise
    except Exception as error:  # soundfile and soxr raise RuntimeError, ValueError, TypeError on hostile bytes
        detail = error.error_string if isinstance(error, soundfile.LibsndfileError) else error
        raise MediaError(
            f"the sound cannot be decoded ({str(detail).strip()}): it is truncated, damaged or uses an unknown codec; "
            f"opened are {FORMATS}"
        ) from error


def _check_container(data: bytes) -> None:
    """Refuse what is not a known sound container, and what ends before its header says."""
    if not data:
        raise MediaError("the sound is empty (0 bytes)")
    start = data[:12]
    if start[:4] in (b"RIFF", b"RF64") and start[8:] == b"WAVE":
        _check_chunks(data, "<4sI", b"data")
    elif start[:4] == b"FORM" and start[8:] in (b"AIFF", b"AIFC"):
        _check_chunks(data, ">4sI", b"SSND")
    elif start[:3] == b"ID3" and _tag_end(data) >= len(data):
        raise MediaError("the sound ends inside its ID3 tag: it is truncated; save or download it again")
    elif not (start[:4] in (b"fLaC", b"OggS", b".snd", b"caff") or start[:3] == b"ID3" or _is_mpeg(start)):
        name = _refused_name(data)
        raise MediaError(f"{name} is not opened as a sound; convert it to WAV or FLAC (opened are {FORMATS})")


def _tag_end(data: bytes) -> int:
    """Length in bytes of the ID3v2 tag at the start: a ten-byte header with the rest's length in seven-bit digits."""
    length = 0
    for digit in data[6:10]:
        length = length << 7 | digit
    return 10 + length


def _is_mpeg(start: bytes) -> bool:
    """MPEG audio frame header (ISO 11172-3 2.4.1.3): eleven sync bits; layer 0 is reserved, AAC uses it."""
    return len(start) >= 4 and start[0] == 0xFF and start[1] & 0xE0 == 0xE0 and start[1] & 0x06 != 0


def _refused_name(data: bytes) -> str:
    for magic, name in _REFUSED:
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp":
        return "M4A or MP4"
    if data[:1] == b"\xff" and len(data) > 1 and data[1] & 0xF6 == 0xF0:
        return "AAC"
    return "a file of another kind"


def _check_chunks(data: bytes, layout: str, wanted: bytes) -> None:
    """Walk RIFF or IFF chunks to the samples (``wanted``) and compare their stated size with what is there.

    libsndfile shortens the sound silently instead, and half a recording would pass as a whole one.
    """
    position = 12
    while position + 8 <= len(data):
        name, size = struct.unpack_from(layout, data, position)
        position += 8
        if name == wanted:
            missing = position + size - len(data)
            length_left_open = size & 0x7FFFFF00 == 0x7FFFFF00
            if missing > 0 and not length_left_open:
                raise MediaError(
                    f"the sound is truncated: {missing:,} of {size:,} bytes of samples are missing; "
                    "save or download it again"
                )
            return
        position += size + size % 2


def _decode(file: _Stream, sample_rate: int, limits: Limits) -> NDArray[np.float32]:
    rate = file.samplerate
    if not MIN_RATE <= rate <= MAX_RATE:
        raise MediaError(f"the sound's sampling rate is {rate:,} Hz; opened are {MIN_RATE:,} to {MAX_RATE:,} Hz")
    resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
    frames_per_block = max(1, _BLOCK // file.channels)
    frames, chunks = 0, []
    mono = np.zeros(0, dtype=np.float32)
    while len(block := file.read(frames_per_block, dtype="float32", always_2d=True)):
        frames += len(block)
        if frames > limits.max_seconds * rate:
            raise MediaError(
                f"the sound is longer than {limits.max_seconds:g} seconds (max_seconds); cut it into shorter pieces"
            )
        mono = block.mean(axis=1, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise MediaError("the sound has NaN or infinite samples; export it again")
        chunks.append(resampler.resample_chunk(mono))
    if frames == 0:
        raise MediaError("the sound is empty: it has a header, but no samples")
    if file.format != "MP3" and frames < file.frames < _UNKNOWN_FRAMES:
        raise MediaError(
            f"the sound is truncated: {frames:,} of {file.frames:,} samples can be decoded; save or download it again"
        )
    chunks.append(resampler.resample_chunk(mono[:0], last=True))
    wave = np.concatenate(chunks)
    if not wave.size:  # shorter than one sample at the new rate
        wave = mono.mean(keepdims=True)
    if not np.isfinite(wave).all():
        raise MediaError("the sound's samples are too large for float32 arithmetic; normalise and export it again")
    return wave
