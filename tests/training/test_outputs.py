"""Training what the assistant makes: signal tokens, output projectors, the objectives; the generator stays frozen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mmllm
from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.config.run import CacheConfig, RunConfig
from mmllm.data.mixture import StageData
from mmllm.errors import ConfigError, TrainingError
from mmllm.generators.base import Condition
from mmllm.generators.image_module import StableDiffusion
from mmllm.model import MultimodalLM
from mmllm.processing.processor import Processor
from mmllm.training.run import train
from mmllm.training.stages import resolve

COLOURS = ("red", "blue", "green")
OBJECTIVES = {"text": 1.0, "condition": 1.0, "denoise": 0.1}


def write_data(folder: Path) -> Path:
    """In turn a picture with a caption, a caption alone, a picture alone, and text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(16):
        colour = COLOURS[i % 3]
        Image.new("RGB", (24, 16), colour).save(folder / f"{colour}.png")
        part = {"type": "image", "path": f"{colour}.png", "caption": f"a {colour} picture"}
        for gone in {0: (), 1: ("path",), 2: ("caption",)}.get(i % 4, ()):
            del part[gone]
        content: Any = "I cannot." if i % 4 == 3 else [{"type": "text", "text": "Here:"}, part]
        turns = [{"role": "user", "content": f"draw {colour}"}, {"role": "assistant", "content": content}]
        rows.append(json.dumps({"id": f"s{i:02}", "messages": turns}))
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "data.jsonl"


def system(folder: Path, **stage: Any) -> RunConfig:
    out = {
        "projector": {"kind": "mlp"},
        "generator": {"kind": "stable_diffusion", "pretrained": "x"},
        "signal_tokens": 2,
    }
    first = {
        "name": "generate",
        "train": ["outputs.*", "backbone.new_tokens"],
        "lr": 1e-2,
        "data": [str(write_data(folder))],
        "objectives": OBJECTIVES,
        "batch_size": 4,
        "micro_batch_size": 4,
        "samples": 0,
    }
    tree = {
        "output": str(folder / "run"),
        "trackers": [],
        "model": {"backbone": {"kind": "causal_lm", "pretrained": "x"}, "outputs": {"image": out}},
        "stages": [first | stage],
    }
    config = parse(tree)
    return config.model_copy(update={"model": config.model.tiny()})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def test_signals_and_projector_learn_and_the_generator_does_not_move(tmp_path: Path) -> None:
    config = system(tmp_path, epochs=8)
    folder = train(config)
    rows = rows_of(tmp_path)
    for name in ("text", "condition"):  # a random denoiser's loss says nothing in so few draws
        begin, end = (sum(row["losses"][name] for row in part) for part in (rows[:4], rows[-4:]))
        assert end < begin, name
    assert rows[0]["loss"] == pytest.approx(sum(w * rows[0]["losses"][name] for name, w in OBJECTIVES.items()))
    model = mmllm.load(folder).model
    table, head = model.backbone.tables()
    assert model.backbone.new_tokens is not None
    for tokens, old in ((model.backbone.new_tokens.weight, table), (model.backbone.new_tokens.head, head)):
        norms = tokens.norm(dim=1)
        torch.testing.assert_close(norms, old.norm(dim=1).mean().expand_as(norms), atol=1e-6, rtol=1e-5)
    # That nothing frozen moved is asserted by the run itself; here, that all of it is in the checkpoint and comes back.
    again = mmllm.load(folder).model
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_loss_does_not_depend_on_micro_batches(tmp_path: Path) -> None:
    runs = {}
    for size in (1, 4):
        config = system(
            tmp_path / str(size), micro_batch_size=size, epochs=1, objectives={"text": 1.0, "condition": 0.5}
        )
        train(config)
        runs[size] = rows_of(tmp_path / str(size))
    for one, four in zip(runs[1], runs[4], strict=True):
        assert one["losses"] == pytest.approx(four["losses"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)


def test_the_objectives_are_what_they_are_called(tmp_path: Path) -> None:
    config = system(tmp_path)
    torch.manual_seed(config.seed)
    context = BuildContext(dtype=torch.float32)
    processor = Processor.from_config(config.model, context).reading_targets(True)
    model = MultimodalLM.from_config(config.model, context).eval()
    data = StageData(config.stages[0].data, config.seed, context)
    batch = processor.collate([processor.encode_sample(data[i], 512) for i in range(4)])
    made = batch.made["image"]
    assert (made.captions, made.captioned.tolist(), made.drawn.tolist()) == (
        ["a red picture", "a blue picture"],
        [0, 1],
        [0, 2],
    )
    assert batch.counts["condition"] == batch.counts["denoise"] == 2
    losses = model(batch, ("condition",))
    assert set(losses) == {"condition"}
    # By hand, sample by sample, from the hidden states of a plain forward.
    embeddings = model.backbone.embed(batch.ids)
    places = made.positions.flatten()
    states = model.backbone(embeddings, batch.attention_mask, states_at=places).states
    signals = (states + embeddings.flatten(0, 1)[places]).view(3, 2, -1)[:2]
    output = model.outputs["image"]
    found = output.projector(signals)["text"]
    wanted = output.frozen().encode_text(made.captions)["text"]
    torch.testing.assert_close(
        losses["condition"], (found - wanted).norm(dim=-1).mean(dim=1).sum(), atol=1e-5, rtol=1e-5
    )


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions that text encoders are asked for from now on."""
    encode, asked = StableDiffusion.encode_text, list[str]()

    def counting(self: StableDiffusion, captions: Sequence[str]) -> Condition:
        asked.extend(captions)
        return encode(self, captions)

    monkeypatch.setattr(StableDiffusion, "encode_text", counting)
    return asked


def test_captions_are_encoded_once_for_all_epochs_and_resumes_and_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {"epochs": 2, "save_every": 3, "objectives": {"text": 1.0, "condition": 1.0}}
    captions = [f"a {colour} picture" for colour in COLOURS]
    asked = count_encoded(monkeypatch)
    kept = system(tmp_path / "kept", **stage)
    folder = train(kept)
    assert sorted(asked) == sorted(captions)
    again = system(tmp_path / "kept", **stage)
    asked.clear()
    plain = train(system(tmp_path / "plain", **stage).model_copy(update={"cache": None}))
    assert len(asked) > len(captions), "in every step anew"
    assert not (tmp_path / "plain" / "run" / "conditions").exists()
    first, second = (load_file(path / "parts.safetensors") for path in (folder, plain))
    assert all(torch.equal(first[name], second[name]) for name in first)
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(tmp_path / "kept")]
    assert strip == [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(tmp_path / "plain")]
    # Resumed from its middle, and with the folder of another run.
    asked.clear()
    last = max((tmp_path / "kept" / "run" / "checkpoints").iterdir())
    shutil.rmtree(last)
    train(again, resume=True)
    assert asked == []
    shared = CacheConfig(folder=str(tmp_path / "kept" / "run" / "conditions"))
    train(system(tmp_path / "other", **stage).model_copy(update={"cache": shared}))
    assert asked == []


def test_a_cache_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = system(tmp_path).model_copy(update={"cache": CacheConfig(folder=str(tmp_path / "file"))})
    with pytest.raises(TrainingError, match=r"cache\.folder: cannot use"):
        train(config)


def test_a_pattern_never_means_the_generator(tmp_path: Path) -> None:
    config = system(tmp_path)
    model = MultimodalLM.from_config(config.model, BuildContext())
    names = [part.name for part in resolve(config.stages[0], model.parts())]
    assert names == ["backbone.new_tokens", "outputs.image.projector"]
    stage = config.stages[0].model_copy(update={"train": ["outputs.image.generator"]})
    with pytest.raises(ConfigError, match="matches no part"):
        resolve(stage, model.parts())


def test_outputs_without_anything_to_learn_from_are_an_error(tmp_path: Path) -> None:
    config = system(tmp_path)
    (tmp_path / "data.jsonl").write_text(
        "\n".join(
            json.dumps(
                {"id": str(i), "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
            )
            for i in range(8)
        )
    )
    with pytest.raises(TrainingError, match="no image from the assistant"):
        train(config)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(system(tmp_path / "whole", epochs=2, save_every=3))
    train(system(tmp_path / "cut", epochs=2, save_every=3))
    for path in (tmp_path / "cut" / "run" / "checkpoints").iterdir():
        if not path.name.endswith("00000003"):
            shutil.rmtree(path)
    again = train(
        system(
            tmp_path / "cut",
            epochs=2,
            save_every=3,
        ),
        resume=True,
    )
    first, second = (mmllm.load(folder).model.state_dict() for folder in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
