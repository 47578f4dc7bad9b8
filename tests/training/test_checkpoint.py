"""Checkpoints are complete or not there, and hold what another program can read."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import systems
import torch
import yaml
from safetensors.torch import load_file, save_file

from mmllm.config.base import BuildContext
from mmllm.config.contradictions import with_lengths
from mmllm.config.load import load, parse
from mmllm.errors import CheckpointError, ConfigError
from mmllm.model import MultimodalLM
from mmllm.training import checkpoint
from mmllm.training.run import train

STAGE = systems.stage(
    train=["inputs.*.projector", "backbone.adapter"], epochs=None, max_steps=2, save_every=1, batch_size=6
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with checkpoints of both."""
    folder = tmp_path_factory.mktemp("finished")
    config, context = systems.system(folder, STAGE)
    train(config, context)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def test_only_the_newest_are_kept_and_nothing_else_is_left(tmp_path: Path) -> None:
    config, context = systems.system(tmp_path, {**STAGE, "max_steps": 4}, keep_last=2)
    train(config, context)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["0-align-00000003", "0-align-00000004"]


def test_the_saved_configuration_says_the_length_that_was_used(tmp_path: Path) -> None:
    file = systems.write_config(tmp_path, {**STAGE, "max_steps": 1}, systems.stage("instruct", max_length=200))
    short = "model.backbone.architecture.max_position_embeddings=300"
    config, context = load(file, [short]), BuildContext(root=tmp_path)
    assert config.stages[0].max_length > 300
    train(config, context, stages=["align"])
    for folder in (tmp_path / "run", tmp_path / "run" / "final"):
        saved = load(folder / "config.yaml")
        assert [stage.max_length for stage in saved.stages] == [300, 200]
        assert saved == checkpoint.absolute(with_lengths(config, context), context)
        assert with_lengths(saved, BuildContext(root=folder)) == saved
    train(load(file, [short]), context, resume=True, stages=["align"])
    with pytest.raises(ConfigError, match=r"stages\.0\.max_length: 301 tokens, but the backbone has 300 positions"):
        train(load(file, [short, "stages.0.max_length=301", f"output={tmp_path / 'other'}"]), context)


def test_there_is_no_pickle(finished: Path) -> None:
    suffixes = {path.suffix for path in (finished / "run").rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".yaml", ".jinja", ".md", ".png"}


def test_plain_peft_loads_the_adapter(finished: Path) -> None:
    from peft import PeftModel

    config = load(finished / "config.yaml")
    torch.manual_seed(config.seed)
    ours = MultimodalLM.from_config(config.model, BuildContext(root=finished))
    checkpoint.load_parts(ours, finished / "run" / "final")
    # The frozen base is at random values here, so it is taken from the trained model.
    base = ours.backbone.model.unload()  # type: ignore[operator]
    theirs = PeftModel.from_pretrained(base, finished / "run" / "final" / "adapter")
    again = MultimodalLM.from_config(config.model, BuildContext(root=finished))
    checkpoint.load_parts(again, finished / "run" / "final")
    embeddings = torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = again.eval().backbone(embeddings).logits
        assert torch.equal(theirs.eval()(inputs_embeds=embeddings).logits, expected)
        with theirs.disable_adapter():
            assert not torch.equal(theirs(inputs_embeds=embeddings).logits, expected), "the adapter does something"


def test_a_frozen_part_with_files_is_kept_by_reference(tmp_path: Path) -> None:
    """LLaVA #1245: an intermediate checkpoint is a whole model; frozen weights are named, hashed and not copied."""
    config, context = systems.system(tmp_path, STAGE)
    backbone = MultimodalLM.from_config(config.model, context).backbone.model.unload()  # type: ignore[operator]
    backbone.save_pretrained(tmp_path / "llama")
    from mmllm.backbones.causal_lm import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "llama")
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    tree["model"]["backbone"] |= {"pretrained": "./llama", "architecture": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    config = load(tmp_path / "config.yaml")
    train(config, context)
    folder = tmp_path / "run" / "checkpoints" / "0-align-00000001"
    (part, reference), *_ = checkpoint.read_json(folder / "references.json").items()
    assert part == "backbone"
    assert reference["pretrained"] == str(tmp_path / "llama")
    assert not [name for name in load_file(folder / "parts.safetensors") if "embed_tokens" in name]
    import mmllm

    assert isinstance(mmllm.load(folder).chat([{"role": "user", "content": "Say 1"}], max_new_tokens=2), str)
    # Other weights under the same name would give another model without a word.
    weights = tmp_path / "llama" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    altered = r"llama no longer holds the weights of backbone"
    with pytest.raises(CheckpointError, match=altered):
        train(config, context, resume=True)
    with pytest.raises(CheckpointError, match=altered):
        train(config.model_copy(update={"output": str(tmp_path / "next")}), context, start_from=folder)
    with pytest.raises(CheckpointError, match=altered):
        mmllm.load(folder)
    shutil.rmtree(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="nothing is there"):
        mmllm.load(folder)


def test_a_hub_part_is_kept_by_the_commit_that_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commits in the local cache: what `main` stands for later does not change a model or a resumed run."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    config, context = systems.system(tmp_path, STAGE)
    backbone = MultimodalLM.from_config(config.model, context).backbone.model.unload()  # type: ignore[operator]
    old, new = "a" * 40, "b" * 40
    from mmllm.backbones.causal_lm import byte_tokenizer

    for commit in (old, new):
        folder = cache / "models--acme--llama" / "snapshots" / commit
        backbone.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        with torch.no_grad():
            backbone.get_input_embeddings().weight += 1
    main = cache / "models--acme--llama" / "refs" / "main"
    main.parent.mkdir()
    main.write_text(old)
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    tree["model"]["backbone"] |= {"pretrained": "acme/llama", "architecture": None}
    config = parse(tree)
    train(config, context)
    final = tmp_path / "run" / "final"
    assert checkpoint.read_json(final / "references.json")["backbone"]["revision"] == old
    main.write_text(new)
    import mmllm

    table = mmllm.load(final, device="cpu").model.backbone.model.get_input_embeddings().weight  # type: ignore[operator]
    wanted = load_file(cache / "models--acme--llama" / "snapshots" / old / "model.safetensors")
    assert torch.equal(table, wanted["model.embed_tokens.weight"])
    train(config, context, resume=True)
    assert load(tmp_path / "run" / "config.yaml").model.backbone.model_dump()["revision"] == old
    tree["model"]["backbone"]["revision"] = new
    other = parse(tree)
    with pytest.raises(CheckpointError, match=r"changed: model\.backbone\.revision"):
        train(other, context, resume=True)


def test_an_adapter_folder_that_the_manifest_does_not_name_is_not_read(copy: Path) -> None:
    names = checkpoint.read_json(copy / "final" / "manifest.json")["files"]
    kept = {name: entry for name, entry in names.items() if not name.startswith("adapter/")}
    assert len(kept) < len(names)
    (copy / "final" / "manifest.json").write_text(json.dumps({"format": checkpoint.FORMAT, "files": kept}))
    config = load(copy / "final" / "config.yaml")
    model = MultimodalLM.from_config(config.model, BuildContext())
    assert "backbone.adapter" not in checkpoint.load_parts(model, copy / "final")


@pytest.mark.parametrize(
    "file",
    ["parts.safetensors", "adapter/adapter_model.safetensors", "state/optimizer.safetensors", "state/position.json"],
)
def test_resume_refuses_a_damaged_checkpoint_by_name(finished: Path, copy: Path, file: str) -> None:
    """accelerate goes on silently without its random states; here every file counts (RELIABILITY T24)."""
    config = load(finished / "config.yaml", [f"output={copy}"])
    path = copy / "checkpoints" / "0-align-00000002" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"altered: {file}; restore it or .* 0-align-00000001"):
        train(config, BuildContext(root=finished), resume=True)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"missing: {file}"):
        train(config, BuildContext(root=finished), resume=True)


def test_an_interrupted_save_does_not_count(finished: Path, copy: Path) -> None:
    for name in (".0-align-00000003.123.tmp", "0-align-00000003.tmp"):
        shutil.copytree(copy / "checkpoints" / "0-align-00000001", copy / "checkpoints" / name)
    newest = checkpoint.latest_valid(copy)
    assert newest is not None
    assert newest.name == "0-align-00000002"
    checkpoint.remove_old(copy, keep=2)
    assert not list((copy / "checkpoints").glob(".*"))


class Killed(BaseException):
    """A power cut."""


@pytest.mark.parametrize("call", ["mkdir", "write_text", "rename", "sync", "rmtree"])
def test_a_valid_checkpoint_exists_at_every_moment_of_a_save(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Killed at every call of a kind, with one checkpoint kept (accelerate removes the old one first)."""
    config, context = systems.system(tmp_path, STAGE, keep_last=1)
    run = tmp_path / "run"
    owner: Any = {"mkdir": Path, "write_text": Path, "rename": Path, "sync": checkpoint, "rmtree": shutil}[call]
    name = "_sync" if call == "sync" else call
    original = getattr(owner, name)
    for at in range(1, 40):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished / "run", run)
        shutil.rmtree(run / "checkpoints" / "0-align-00000001")
        model = MultimodalLM.from_config(config.model, context)
        calls = 0

        def dying(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:  # noqa: B023
                raise Killed
            return original(*args, **kwargs)

        position = checkpoint.Position("align", 3, False, "", {})
        try:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, dying)
                checkpoint.save(
                    run / "checkpoints" / "0-align-00000003", model, PROCESSOR, config, context, [], position=position
                )
                checkpoint.remove_old(run, keep=1)
        except Killed:
            assert checkpoint.latest_valid(run) is not None, f"call {at}"
        else:
            break
    assert calls > 0
    assert [path.name for path in checkpoint.checkpoints(run)] == ["0-align-00000003"]


class NoFiles:
    """A processor without files: the tokenizer's fifty writes are not what these tests are about."""

    def save(self, folder: Path) -> None:
        (folder / "processor.json").write_text("{}")


PROCESSOR: Any = NoFiles()


def test_a_full_disk_is_an_error_and_leaves_the_previous_checkpoint(
    finished: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config, context = load(finished / "config.yaml"), BuildContext(root=finished)
    model = MultimodalLM.from_config(config.model, context)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; checkpoints written before are untouched"):
        checkpoint.save(copy / "checkpoints" / "0-align-00000003", model, PROCESSOR, config, context, [])
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["0-align-00000001", "0-align-00000002"]


def test_parts_fit_in_both_directions(finished: Path, copy: Path) -> None:
    config, context = load(finished / "config.yaml"), BuildContext(root=finished)
    model = MultimodalLM.from_config(config.model, context)
    file = copy / "final" / "parts.safetensors"
    metadata = {"parts": json.dumps(["inputs.image.projector"])}
    own = {name: p.data.clone() for name, p in model.parts()["inputs.image.projector"].items()}
    first = next(iter(own))
    for tensors, message in [
        ({name: tensor for name, tensor in own.items() if name != first}, f"missing {first}"),
        ({**own, "inputs.image.projector.extra": torch.zeros(1)}, "unexpected inputs.image.projector.extra"),
        ({**own, first: torch.zeros(3, 3)}, r"is \(3, 3\), the model has"),
    ]:
        save_file(tensors, file, metadata=metadata)
        checkpoint.write_manifest(copy / "final")
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_parts(model, copy / "final")


def test_a_model_without_the_part_refuses_it_by_name(finished: Path) -> None:
    tree = yaml.safe_load((finished / "config.yaml").read_text())
    del tree["model"]["inputs"]["audio"]
    tree["stages"] = []
    from mmllm.config.load import parse

    model = MultimodalLM.from_config(parse(tree).model, BuildContext(root=finished))
    with pytest.raises(CheckpointError, match=r"holds .*inputs\.audio\.encoder"):
        checkpoint.load_parts(model, finished / "run" / "final")


def test_an_unknown_format_is_named(copy: Path) -> None:
    manifest = copy / "final" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        checkpoint.verify(copy / "final")


def test_the_saved_config_works_from_anywhere(finished: Path) -> None:
    saved = load(finished / "run" / "final" / "config.yaml")
    assert saved.stages[0].data[0].reader.model_dump()["path"] == str(finished / "data.jsonl")
    assert checkpoint.absolute(load(finished / "config.yaml"), BuildContext(root=finished)) == saved
