"""Where media bytes come from: bytes, ``data:`` URLs and contained paths; the limits they are read under."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from mmllm.errors import MediaError

DECODER_VERSION = 1
"""Raised whenever a rule of a decoder (``mmllm.processing.reading.DECODERS``) changes what the same bytes decode to."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")  # two or more characters: one letter and a colon is a drive
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """The largest media that are opened. Each limit is checked before the memory it guards is taken.

    ``max_bytes``: encoded size of one medium, in bytes (default 256 MiB: 25 minutes of CD-quality WAV).
    ``max_pixels``: width x height of one picture, from its header (default 40 million: four times a 4K frame and more).
    ``max_seconds``: playing time of one sound, at its own sampling rate, or clip (default 1800: half an hour).
    ``max_frames``: pictures of one clip, in the file and asked for (default 108,000: half an hour at 60 a second).
    ``max_vertices``, ``max_faces``: of one point cloud or mesh, all its parts together (default 2 million each).
    """

    max_bytes: int = 256 * 1024 * 1024
    max_pixels: int = 40_000_000
    max_seconds: float = 1800.0
    max_frames: int = 108_000
    max_vertices: int = 2_000_000
    max_faces: int = 2_000_000

    def __post_init__(self) -> None:
        for name, value in (
            ("max_bytes", self.max_bytes),
            ("max_pixels", self.max_pixels),
            ("max_seconds", self.max_seconds),
            ("max_frames", self.max_frames),
            ("max_vertices", self.max_vertices),
            ("max_faces", self.max_faces),
        ):
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be greater than 0")


def read_media(source: bytes | str | Path, *, root: Path | None, limits: Limits) -> bytes:
    """The encoded bytes of one picture, sound or clip.

    ``source`` is one of: the bytes themselves; a ``data:...;base64,...`` URL (its media type is ignored, the bytes
    decide); a path. With ``root`` the path must be relative, free of ``..``, and lie in ``root`` after symbolic links
    are followed; percent signs are ordinary characters. Without ``root`` (the caller's own path) any regular file is
    read. Other URLs are refused. Raises ``MediaError`` for each of these and for more than ``limits.max_bytes`` bytes.
    """
    if isinstance(source, bytes):
        _check_bytes(len(source), limits, "the media bytes")
        return source
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return _data_url(source, limits)
        _refuse_url(source)
    return _read_file(_contained(source, root) if root is not None else _own(source), source, limits)


def content_key(data: bytes, kind: str) -> str:
    """Cache key of one medium: 64 hexadecimal digits. ``kind`` is the modality's name (``"image"``, ``"audio"``).

    The hash is over the *encoded* bytes, so two media whose decoded bytes happen to agree (a 2x8 and a 4x4 picture, a
    grey and a palette picture, one frame of an animation and a still) never share a key: shape, mode, palette and
    frame count are part of the encoding. ``kind`` keeps a file that opens as two modalities apart, and
    ``DECODER_VERSION`` keeps features made under older decoding rules apart. Settings that change the decoded tensor
    (background colour, sampling rate, preprocessing) belong in the cache's own key beside this one.
    """
    name = kind.encode()
    digest = hashlib.sha256(f"mmllm-media {DECODER_VERSION} {len(name)} ".encode())
    digest.update(name)  # its length stands before it, so no kind can run over into the data
    digest.update(data)
    return digest.hexdigest()


def _check_bytes(size: int, limits: Limits, what: str) -> None:
    if size > limits.max_bytes:
        raise MediaError(
            f"{what}: {size:,} bytes, the limit is {limits.max_bytes:,}; use a smaller or compressed file, "
            "or raise max_bytes"
        )


def _data_url(source: str, limits: Limits) -> bytes:
    header = _DATA_URL.match(source)
    if header is None:
        raise MediaError(f"{_shown(source)}: a data URL must read data:<media type>;base64,<data>")
    payload = source[header.end() :]
    # Four characters hold three bytes, less the padding: the size is known before decoding.
    _check_bytes(len(payload) * 3 // 4 - payload[-2:].count("="), limits, "the data URL")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{_shown(source)}: the data URL's base64 is invalid ({error}); encode it again") from error


def _refuse_url(source: str) -> None:
    scheme = _SCHEME.match(source)
    if scheme is None:
        return
    name = scheme.group()[:-1].lower()
    if name in ("http", "https"):
        raise MediaError(f"{_shown(source)}: URLs are not fetched; download the file and give its path")
    if name == "file" or source[scheme.end() :].startswith("//"):
        raise MediaError(f"{_shown(source)}: {name}: URLs are not opened; give a plain path")


def _own(source: str | Path) -> Path:
    _check_name(source)
    return Path(source)


def _contained(source: str | Path, root: Path) -> Path:
    _check_name(source)
    text = str(source)
    windows = PureWindowsPath(text)
    if PurePosixPath(text).is_absolute() or windows.drive or windows.root:
        raise MediaError(f"{_shown(source)}: this path is absolute; media paths are relative to the data file's folder")
    if "\\" in text:
        raise MediaError(f"{_shown(source)}: media paths are written with forward slashes, this one has a backslash")
    if ".." in PurePosixPath(text).parts:
        raise MediaError(f"{_shown(source)}: media paths must stay in the data file's folder, this one has '..'")
    try:
        base = root.resolve(strict=True)
        path = (base / text).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        raise MediaError(f"{_shown(source)}: no such file in the data file's folder") from error
    if not path.is_relative_to(base):
        raise MediaError(f"{_shown(source)}: the path leads out of the data file's folder through a symbolic link")
    return path


def _check_name(source: str | Path) -> None:
    text = str(source)
    if not text:
        raise MediaError("the media path is empty")
    if "\0" in text:
        raise MediaError(f"{_shown(source)}: a path cannot hold a NUL character")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise MediaError(f"{_shown(source)}: not a file name on this system ({error.reason})") from error


def _read_file(path: Path, source: str | Path, limits: Limits) -> bytes:
    name = _shown(source)
    try:
        status = path.stat()
    except OSError as error:
        raise MediaError(f"{name}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):  # before open(): opening a named pipe would wait for its writer
        raise MediaError(f"{name}: not a regular file but {_file_type(status.st_mode)}")
    _check_bytes(status.st_size, limits, name)
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)  # a file may grow, and some report a size of 0
    except OSError as error:
        raise MediaError(f"{name}: cannot be read ({error.strerror})") from error
    _check_bytes(len(data), limits, name)
    return data


def _file_type(mode: int) -> str:
    names = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in names if test(mode)), "a device")


def _shown(source: str | Path) -> str:
    """The source as an error message quotes it: escaped, and short even when it is a long data URL."""
    text = repr(str(source))
    return text if len(text) <= 120 else f"{text[:117]}..."
