"""Runs with a cache of features and latents: the same losses, nothing computed twice, and nothing old or damaged used."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import captioned
import pytest
import systems
import test_outputs
import torch
from systems import Killed, final_state, kill_after
from test_resume import KILLS

from mmllm.cache import media, store
from mmllm.config.base import BuildContext
from mmllm.config.run import CacheConfig, RunConfig
from mmllm.encoders.clip_module import VitTower
from mmllm.encoders.whisper_module import WhisperEncoder
from mmllm.errors import TrainingError
from mmllm.generators.diffusion_module import LatentDiffusion
from mmllm.processing import reading
from mmllm.training.filling import fill
from mmllm.training.run import train

KEEP = {"features": True}
TOLERANCE = 2e-6  # relative; what is computed together with a medium decides about the last bits of its features


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOOK_EVERY", 0.0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many pictures were decoded, and how many media the encoders and autoencoders were given."""
    count = dict.fromkeys(("decoded", "image", "audio", "latents"), 0)

    def counted(owner: Any, name: str, key: str, size: Callable[[Any], int]) -> None:
        real = getattr(owner, name)

        def wrapper(self: Any, given: Any) -> Any:
            count[key] += size(given)
            return real(self, given)

        monkeypatch.setattr(owner, name, wrapper)

    # On the meta device a tower is asked how many features it has.
    counted(VitTower, "forward", "image", lambda batch: 0 if batch["pixels"].is_meta else len(batch["pixels"]))
    counted(WhisperEncoder, "forward", "audio", lambda batch: len(batch["mask"]))
    counted(LatentDiffusion, "encode_targets", "latents", len)
    real = reading.DECODERS["image"]

    @functools.wraps(real)  # a decoder's identity is its name
    def decode(*given: Any, **options: Any) -> Any:
        count["decoded"] += 1
        return real(*given, **options)

    monkeypatch.setitem(reading.DECODERS, "image", decode)
    return count


def losses(folder: Path, **changes: Any) -> list[float]:
    return [row["loss"] for row in run(folder, **changes)]


def run(folder: Path, *stages: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    config, context = systems.system(folder, *(stages or (systems.stage(epochs=4),)), **changes)
    train(config, context)
    return systems.rows(folder)


def told(folder: Path) -> dict[str, dict[str, Any]]:
    """What the run says of its caches."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return next(row["cache"] for row in reversed(rows) if "cache" in row)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Four epochs, 20 steps, without a cache."""
    return losses(tmp_path_factory.mktemp("plain"))


def test_twenty_steps_have_the_losses_of_a_run_without_it(
    plain: list[float], tmp_path: Path, calls: dict[str, int]
) -> None:
    found = losses(tmp_path, cache=KEEP)
    assert found == pytest.approx(plain, rel=TOLERANCE)
    # Of three pictures and two sounds; a step asks for the media of both its micro-batches before it computes any.
    assert calls["image"] <= 6
    assert calls["audio"] <= 4
    assert calls["decoded"] <= 7, "a picture that is known is not decoded"
    row = told(tmp_path)
    assert row["inputs.image"]["made"] == calls["image"]
    assert row["inputs.image"]["read"] + row["inputs.image"]["made"] == 4 * 6
    text = (tmp_path / "run" / "run.md").read_text()
    assert f"Cache of `inputs.image`: {calls['image']} media computed" in text
    assert "times as fast" in text


def test_workers_and_a_second_run_read_the_same_bits(tmp_path: Path, calls: dict[str, int]) -> None:
    shared = {"features": True, "folder": str(tmp_path / "kept")}
    first = losses(tmp_path / "a", cache=shared)
    with_workers = [systems.stage(epochs=4, num_workers=2)]
    assert [row["loss"] for row in run(tmp_path / "c", *with_workers, cache=KEEP)] == first
    calls["image"] = calls["audio"] = 0
    again = losses(tmp_path / "b", cache=shared)
    assert calls["image"] == calls["audio"] == 0
    assert again == pytest.approx(first, rel=TOLERANCE)
    assert losses(tmp_path / "d", cache=shared) == again


@pytest.mark.parametrize("forward", [KILLS[name] for name in ("mid-accumulation", "first step of epoch two")])
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: int) -> None:
    """Whatever the killed run left in the cache: media of one step are there together, or not at all."""
    stage = systems.stage(save_every=1)
    run(tmp_path / "whole", stage, cache=KEEP, keep_last=50)
    config, context = systems.system(tmp_path / "killed", stage, cache=KEEP, keep_last=50)
    with monkeypatch.context() as patch:
        kill_after(patch, forward)
        with pytest.raises(Killed):
            train(config, context)
    train(config, context, resume=True)
    assert final_state(tmp_path / "killed" / "run") == final_state(tmp_path / "whole" / "run")


@pytest.mark.parametrize(("storage", "bound"), [("float16", 2e-3), ("bfloat16", 1e-2), ("int8", 1e-2)])
def test_narrower_storage_changes_the_losses_a_little(
    plain: list[float], tmp_path: Path, storage: str, bound: float
) -> None:
    found = losses(tmp_path, cache={"features": True, "storage": storage})
    assert found == pytest.approx(plain, rel=bound)
    assert found != pytest.approx(plain, rel=1e-9), "it was rounded, also where it was computed"


def test_only_what_is_constant_is_kept(tmp_path: Path, calls: dict[str, int]) -> None:
    """Not an encoder that trains, nor one with an adapter; after its training, its new features."""
    learning = systems.stage("first", train=["inputs.image.encoder", "inputs.*.projector"], epochs=1)
    then = systems.stage("then", epochs=1)
    stages = [learning, then]
    reference = [row["loss"] for row in run(tmp_path / "plain", *stages)]
    found = [row["loss"] for row in run(tmp_path / "kept", *stages, cache=KEEP)]
    assert found == pytest.approx(reference, rel=TOLERANCE)
    rows = [json.loads(line) for line in (tmp_path / "kept" / "run" / "metrics.jsonl").read_text().splitlines()]
    caches = {row["stage"]: set(row["cache"]) for row in rows if "cache" in row}
    assert caches == {"first": {"inputs.audio"}, "then": {"inputs.image", "inputs.audio"}}
    model = json.loads(json.dumps(systems.MODEL))
    model["inputs"]["image"]["encoder"]["adapter"] = {"kind": "lora", "rank": 2}
    with_adapter = {"model": model, "cache": KEEP}
    run(tmp_path / "adapter", systems.stage(epochs=1), **with_adapter)
    assert set(told(tmp_path / "adapter")) == {"inputs.audio"}


def test_other_weights_and_other_preparation_find_nothing(tmp_path: Path, calls: dict[str, int]) -> None:
    shared = {"features": True, "folder": str(tmp_path / "kept")}
    run(tmp_path / "a", systems.stage(epochs=1), cache=shared)
    made = calls["image"]
    run(tmp_path / "b", systems.stage(epochs=1), cache=shared, seed=1)
    assert calls["image"] == 2 * made, "random weights of another seed"
    model = json.loads(json.dumps(systems.MODEL))
    model["inputs"]["image"]["encoder"]["fit"] = "pad"
    run(tmp_path / "c", systems.stage(epochs=1), cache=shared, model=model)
    assert calls["image"] == 3 * made
    run(tmp_path / "d", systems.stage(epochs=1), cache=shared)
    assert calls["image"] == 3 * made


def test_an_altered_entry_is_made_again(tmp_path: Path, calls: dict[str, int]) -> None:
    shared = {"features": True, "folder": str(tmp_path / "kept")}
    first = losses(tmp_path / "a", cache=shared)
    for file in (tmp_path / "kept" / "features").rglob("*.bin"):
        content = bytearray(file.read_bytes())
        content[::64] = bytes(byte ^ 16 for byte in content[::64])
        file.write_bytes(content)
    calls["image"] = 0
    assert losses(tmp_path / "b", cache=shared) == pytest.approx(first, rel=TOLERANCE)
    assert calls["image"] >= 3


def test_it_turns_itself_off_where_reading_is_slower(
    plain: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: dict[str, int]
) -> None:
    monkeypatch.setattr(media, "JUDGED_AFTER", 4)
    monkeypatch.setattr(media.TensorStore, "get", slowly(media.TensorStore.get))
    found = losses(tmp_path, cache=KEEP)
    assert found == pytest.approx(plain, rel=TOLERANCE)
    row = told(tmp_path)["inputs.image"]
    assert row["off"]
    assert 4 <= row["read"] < 12
    assert calls["image"] == 24 - row["read"]
    assert "Reading was slower than computing" in (tmp_path / "run" / "run.md").read_text()


def slowly(get: Callable[..., Any]) -> Callable[..., Any]:
    import time

    def wrapper(self: Any, key: str) -> Any:
        found = get(self, key)
        time.sleep(0.5 if found is not None else 0.0)
        return found

    return wrapper


def test_evaluation_reads_it_too(tmp_path: Path, calls: dict[str, int]) -> None:
    evaluated = systems.stage(eval_data=[{"reader": {"kind": "messages", "path": "data.jsonl"}}], eval_every=1)
    reference = [row["eval_loss"] for row in evaluations(tmp_path / "plain", evaluated)]
    calls["image"] = 0
    found = [row["eval_loss"] for row in evaluations(tmp_path / "kept", evaluated, cache=KEEP)]
    assert found == pytest.approx(reference, rel=TOLERANCE)
    assert calls["image"] <= 8


def evaluations(folder: Path, stage: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    run(folder, stage, **changes)
    return systems.rows(folder, "eval_loss")


def generating(folder: Path, cache: CacheConfig | None, **stage: Any) -> list[float]:
    config: RunConfig = test_outputs.system(folder, epochs=3, **stage).model_copy(update={"cache": cache})
    train(config, BuildContext(root=folder))
    return [row["loss"] for row in test_outputs.rows_of(folder)]


def test_latents_are_drawn_anew_from_what_is_kept(tmp_path: Path, calls: dict[str, int]) -> None:
    """The autoencoder's mean and variance are kept, so the noise of every epoch is the one of a run without a cache."""
    reference = generating(tmp_path / "plain", None)
    calls["latents"] = 0
    found = generating(tmp_path / "kept", CacheConfig(latents=True))
    assert found == pytest.approx(reference, rel=TOLERANCE)
    assert calls["latents"] <= 6
    assert told(tmp_path / "kept")["outputs.image"]["read"] >= 18


def test_latents_alone_in_their_batch_are_the_same_bits(tmp_path: Path) -> None:
    """What is computed together decides about last bits; one by one there is nothing to decide."""
    one = {"micro_batch_size": 1}
    assert generating(tmp_path / "kept", CacheConfig(latents=True), **one) == generating(
        tmp_path / "plain", None, **one
    )


def test_features_alone_in_their_batch_are_the_same_bits(tmp_path: Path) -> None:
    stage = systems.stage(micro_batch_size=1)
    plain, kept = (run(tmp_path / name, stage, cache=cache) for name, cache in (("a", None), ("b", KEEP)))
    assert [row["loss"] for row in kept] == [row["loss"] for row in plain]
    assert final_state(tmp_path / "b" / "run") == final_state(tmp_path / "a" / "run")


@pytest.mark.parametrize("name", ["image", "audio"])
def test_D24_media_of_the_same_decoded_bytes_have_keys_of_their_own(name: str, tmp_path: Path) -> None:
    """Shape, mode, palette, number of frames: PYSEC-2025-43."""
    from io import BytesIO

    import numpy as np
    import soundfile
    from PIL import Image

    from mmllm.cache.media import MediaCache

    cache = MediaCache(tmp_path, "a" * 64)

    def picture(*frames: Image.Image, kind: str = "PNG") -> bytes:
        out = BytesIO()
        frames[0].save(out, kind, **({"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}))
        return out.getvalue()

    if name == "image":
        raw = np.arange(16, dtype=np.uint8)
        wide, square = Image.fromarray(raw.reshape(2, 8)), Image.fromarray(raw.reshape(4, 4))
        palette = square.copy().convert("P")
        grey = Image.frombytes("L", (16, 1), raw.tobytes())
        files = [picture(wide), picture(square), picture(palette), picture(square.convert("RGB")), picture(grey)]
        files += [picture(square, kind="GIF"), picture(square, wide, kind="GIF")]
    else:
        wave = np.linspace(-0.5, 0.5, 64, dtype=np.float32)
        files = []
        for rate, shape in ((8000, (64,)), (16000, (64,)), (16000, (32, 2))):
            out = BytesIO()
            soundfile.write(out, wave.reshape(shape), rate, format="WAV")
            files.append(out.getvalue())
    assert len({cache.key(data) for data in files}) == len(files)
    other = MediaCache(tmp_path, "b" * 64)
    assert cache.key(files[0]) != other.key(files[0])


def from_files(folder: Path) -> dict[str, Any]:
    """The model of ``systems`` with a picture encoder from files, so that it can be built alone."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = json.loads(json.dumps(systems.MODEL))
    torch.manual_seed(5)
    CLIPVisionModel(CLIPVisionConfig(**model["inputs"]["image"]["encoder"]["architecture"])).save_pretrained(
        folder / "clip"
    )
    model["inputs"]["image"]["encoder"] = {"kind": "clip", "pretrained": "./clip"}
    del model["inputs"]["audio"]
    return {"model": model}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mmllm_cache_fills_what_the_run_then_only_reads(
    tmp_path: Path, calls: dict[str, int], precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its parts are those of the run, whether built alone from files or with all the rest, in any precision."""
    from mmllm.cli import main

    data = [{"reader": {"kind": "messages", "path": "pictures.jsonl"}}]
    pictures = systems.stage(train=["inputs.image.projector"], data=data, batch_size=2)
    for name, changes in {"whole": {}, "alone": from_files(tmp_path / "alone")}.items():
        file = systems.write_config(tmp_path / name, pictures, cache=KEEP, precision=precision, **changes)
        rows = (tmp_path / name / "data.jsonl").read_text().splitlines()
        (tmp_path / name / "pictures.jsonl").write_text("\n".join(rows[::3]) + "\n")
        assert main(["cache", str(file)]) == 0
        assert "inputs.image: 3 media computed" in capsys.readouterr().out
        calls["image"] = calls["decoded"] = 0
        assert main(["train", str(file)]) == 0
        assert calls["image"] == calls["decoded"] == 0
        assert told(tmp_path / name)["inputs.image"]["read"] == 12


def test_many_processes_fill_one_cache(tmp_path: Path, calls: dict[str, int]) -> None:
    from mmllm.cli import main

    file = systems.write_config(tmp_path, systems.stage(num_workers=1), cache=KEEP)
    assert main(["cache", str(file), "--processes", "2"]) == 0
    assert main(["train", str(file), "stages.align.num_workers=0"]) == 0
    assert calls["image"] == calls["audio"] == 0


def test_an_encoder_that_trains_is_not_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmllm.cli import main

    stages = [systems.stage("a", train=["inputs.image.encoder"], epochs=1), systems.stage("b", epochs=1)]
    file = systems.write_config(tmp_path, *stages, cache=KEEP)
    assert main(["cache", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "inputs.audio" in printed
    assert "inputs.image" not in printed


def test_without_anything_to_keep_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmllm.cli import main

    assert main(["cache", str(systems.write_config(tmp_path)), "--processes", "2"]) == 2
    assert "cache.features=true" in capsys.readouterr().err
    blocked = tmp_path / "file"
    blocked.write_text("")
    config, context = systems.system(tmp_path, cache={"features": True, "folder": str(blocked)})
    with pytest.raises(TrainingError, match=r"cache\.folder"):
        train(config, context)


def test_mmllm_cache_fills_latents_and_conditions(tmp_path: Path, calls: dict[str, int]) -> None:
    config = test_outputs.system(tmp_path, epochs=2).model_copy(update={"cache": CacheConfig(latents=True)})
    context = BuildContext(root=tmp_path)
    tallies = fill(config, context)["outputs.image"]
    made = sum(one.made for one in tallies)
    assert 3 <= made <= 8
    files = len(list((tmp_path / "run" / "conditions").rglob("*.safetensors")))
    assert files == 3
    calls["latents"] = 0
    train(config, context)
    assert calls["latents"] == 0
    assert len(list((tmp_path / "run" / "conditions").rglob("*.safetensors"))) == files


def test_aligning_stages_read_it(tmp_path: Path, calls: dict[str, int]) -> None:
    """BLIP-2's first stage reads features beside captions, from the cache as from the encoder."""
    found = {}
    for name, cache in (("plain", None), ("kept", CacheConfig(features=True))):
        captioned.write_pictures(tmp_path / name, 10, text_every=5)
        config, context = captioned.system(tmp_path / name, captioned.first())
        config = config.model_copy(update={"cache": cache})
        train(config, context)
        found[name] = [row["loss"] for row in systems.rows(tmp_path / name)]
    assert found["kept"] == pytest.approx(found["plain"], rel=1e-5)
