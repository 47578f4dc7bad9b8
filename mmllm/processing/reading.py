"""From a part of a message to what an encoder or a generator takes of its medium."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmllm.errors import MediaError
from mmllm.processing.audio import decode_audio
from mmllm.processing.images import decode_image
from mmllm.processing.messages import Part
from mmllm.processing.point_clouds import decode_point_cloud
from mmllm.processing.sources import Limits, read_media
from mmllm.processing.video import decode_video

if TYPE_CHECKING:
    from mmllm.config.families import Preprocessor, Target

DECODERS: dict[str, Callable[..., Any]] = {
    "image": decode_image,
    "audio": decode_audio,
    "video": decode_video,
    "point_cloud": decode_point_cloud,
}


def read(part: Part, root: Path | None, limits: Limits) -> bytes:
    """The encoded bytes of a part's medium. Raises ``MediaError``."""
    if part.value is None:
        raise MediaError(f"a {part.type} with a caption but no file; it cannot be looked at")
    return read_media(part.value, root=root, limits=limits)


def decoded(part: Part, data: bytes, reader: Preprocessor | Target, limits: Limits) -> Any:
    """The medium with the encoded bytes ``data`` as ``reader`` wants it decoded. Raises ``MediaError``."""
    if reader.media not in DECODERS:
        raise MediaError(f"{reader.media} cannot be read from files, only {', '.join(DECODERS)}")
    try:
        return DECODERS[reader.media](data, limits=limits, **reader.decode_options)
    except MediaError as error:
        raise _named(error, part) from error


def prepared(part: Part, data: bytes, preprocessor: Preprocessor, limits: Limits) -> dict[str, Tensor]:
    """What an encoder takes of the medium with the encoded bytes ``data``, without a batch axis. Raises ``MediaError``."""
    medium = decoded(part, data, preprocessor, limits)
    try:
        # Samples of replies are drawn inside a training run's autocast; what is prepared must not depend on that.
        with torch.autocast("cpu", enabled=False):
            return preprocessor(medium)
    except MediaError as error:
        raise _named(error, part) from error


def _named(error: MediaError, part: Part) -> MediaError:
    """The error with the file's name: of several files the reader wants to know which. Bytes and data URLs have none."""
    named = isinstance(part.value, str) and not part.value.startswith("data:")
    return MediaError(f"{Path(str(part.value)).name}: {error}" if named else str(error))
