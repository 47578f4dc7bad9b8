"""Decode every file of a zip in this process under a memory and a time limit, beside an independent reference.

    python decode_pack.py image|audio FILE.zip

Prints one JSON line per file: name, outcome (``equal``, ``different``, ``refused``), detail, seconds, growth in MiB.
"""

import io
import json
import resource
import signal
import sys
import time
import zipfile

import numpy as np
import soundfile
import soxr
from PIL import Image, ImageOps

from mmllm.errors import MediaError
from mmllm.processing.audio import decode_audio
from mmllm.processing.images import decode_image
from mmllm.processing.sources import Limits

SECONDS = 20


def image(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data, Limits()))


def image_reference(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as opened:
        picture = ImageOps.exif_transpose(opened)
    key = picture.info.get("transparency")
    if picture.mode in ("I;16", "I;16B", "I", "F"):
        values = np.asarray(picture).astype(float)
        low, high = (values.min(), values.max()) if picture.mode == "F" else (0, 65535)
        grey = 255 * (values - low) / (high - low)
        if key is not None:
            grey[values == key] = 255
        return np.repeat(grey[..., None], 3, axis=-1)
    if picture.mode in ("RGBA", "LA", "PA") or key is not None:
        values = np.asarray(picture.convert("RGBA")).astype(float)
        alpha = values[..., 3:] / 255
        return values[..., :3] * alpha + 255 * (1 - alpha)
    return np.asarray(picture.convert("RGB")).astype(float)


def audio(data: bytes) -> np.ndarray:
    return decode_audio(data, 16_000, Limits())


def audio_reference(data: bytes) -> np.ndarray:
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), rate, 16_000)


def compare(found: np.ndarray, expected: np.ndarray, tolerance: float) -> tuple[str, str]:
    if found.shape != expected.shape:
        return "different", f"shape {found.shape}, expected {expected.shape}"
    error = float(np.abs(found.astype(float) - expected).max())
    return "equal" if error <= tolerance else "different", f"error {error:.3g}"


def main(kind: str, path: str) -> None:
    decode, reference, tolerance = {"image": (image, image_reference, 2), "audio": (audio, audio_reference, 1e-6)}[kind]
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    with zipfile.ZipFile(path) as pack:
        files = {name: pack.read(name) for name in pack.namelist() if not name.endswith("/")}
    results = {}
    for name, data in files.items():  # all of them before the first reference, whose memory would hide a growth
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        signal.alarm(SECONDS)  # ends the process
        try:
            found, detail = decode(data), ""
        except MediaError as error:
            found, detail = None, str(error)
        signal.alarm(0)
        seconds = time.perf_counter() - start
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        results[name] = found, detail, seconds, growth
    for name, (found, detail, seconds, growth) in results.items():
        outcome = "refused"
        if found is not None:
            outcome, detail = compare(found, reference(files[name]), tolerance)
        print(json.dumps([name, outcome, detail, seconds, growth]))


main(*sys.argv[1:])
