"""Every kind of adapter, and some layers of a part, through training: what moves, what is saved, exact resumption, loading."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import systems
import torch
import yaml
from safetensors.torch import load_file

from mmllm.config.base import BuildContext
from mmllm.config.families import QuantizeConfig
from mmllm.config.load import load, parse
from mmllm.config.run import RunConfig
from mmllm.errors import CheckpointError, ConfigError
from mmllm.model import MultimodalLM
from mmllm.plan import make_plan
from mmllm.training import checkpoint
from mmllm.training.loop import SummedLoss
from mmllm.training.run import train

CASES: dict[str, dict[str, Any]] = {
    "ia3": {"backbone": {"kind": "ia3"}},
    "prefix": {"backbone": {"kind": "prefix_tuning", "num_virtual_tokens": 3}},
    "projected prefix": {"backbone": {"kind": "prefix_tuning", "num_virtual_tokens": 3, "projection_dim": 4}},
    "bottleneck": {"backbone": {"kind": "adapter", "dim": 2, "activation": "gelu", "dropout": 0.1}},
    "encoder": {"image": {"kind": "lora", "rank": 2, "dropout": 0.1}, "train": ["inputs.image.encoder.adapter"]},
    "both": {
        "backbone": {"kind": "adapter", "dim": 2, "activation": "gelu", "placement": "parallel"},
        "audio": {"kind": "adapter", "dim": 2, "activation": "silu"},
        "train": ["backbone.adapter", "inputs.audio.encoder.adapter", "inputs.image.encoder.layers.0"],
    },
    "layers": {"backbone": {"kind": "lora", "rank": 2}, "train": ["backbone.layers.1", "inputs.*.projector"]},
}


def system(folder: Path, case: str) -> tuple[RunConfig, BuildContext]:
    """Three steps, saved after each, of a system with the adapters of a case."""
    given = CASES[case]
    model = copy.deepcopy(systems.MODEL)
    model["backbone"]["adapter"] = given.get("backbone")
    for name in ("image", "audio"):
        model["inputs"][name]["encoder"]["adapter"] = given.get(name)
    names = given.get("train", ["backbone.adapter"])
    stage = systems.stage(train=names, epochs=None, max_steps=3, save_every=1, batch_size=6)
    systems.write_data(folder)
    tree = systems.tree(folder, stage, keep_last=9) | {"model": model}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return load(folder / "config.yaml"), BuildContext(root=folder)


def fresh(config: RunConfig, context: BuildContext) -> MultimodalLM:
    torch.manual_seed(config.seed)
    return MultimodalLM.from_config(config.model, context)


def weights(folder: Path) -> dict[str, bytes]:
    newest = checkpoint.checkpoints(folder)[-1]
    files = [*newest.rglob("*.safetensors"), *(folder / "final").rglob("*.safetensors")]
    return {f"{f.relative_to(folder)}:{n}": t.numpy().tobytes() for f in files for n, t in load_file(f).items()}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("case", CASES)
def test_trained_resumed_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Exactly what is named moves; a killed run ends in the same bits; the final model computes what the trained one did."""
    (tmp_path / "whole").mkdir()
    config, context = system(tmp_path / "whole", case)
    final = train(config, context)
    before, loaded = fresh(config, context), fresh(config, context)
    checkpoint.load_parts(loaded, final)
    old = dict(before.named_parameters())
    moved = {name for name, p in loaded.named_parameters() if not torch.equal(p, old[name])}
    named = CASES[case].get("train", ["backbone.adapter"])
    parts = before.parts()
    expected: set[str] = set()
    for name in named:
        number = name.rpartition(".")[2]
        layer = [f".{kind}.{number}." for kind in ("layers", "resblocks")] if ".layers." in name else [""]
        heads = [part for part in parts if part == name.partition(".layers.")[0] or name.startswith("inputs.*")]
        heads = [part for part in heads if "*" not in name or part.endswith("projector")]
        expected |= {key for part in heads for key in parts[part] if any(word in key for word in layer)}
    # Of LoRA's pairs and the like both move within three steps; keys' biases never get a gradient.
    assert moved <= expected
    assert {name for name in expected - moved if not name.endswith(("k_proj.bias", "in_proj_bias"))} == set()

    (tmp_path / "cut").mkdir()
    config, context = system(tmp_path / "cut", case)
    forward, count = SummedLoss.forward, 0

    def counting(self: SummedLoss, batch: object) -> object:
        nonlocal count
        count += 1
        if count == 5:  # of three micro-batches a step
            raise Killed
        return forward(self, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(SummedLoss, "forward", counting)
        with pytest.raises(Killed):
            train(config, context)
    train(config, context, resume=True)
    assert weights(tmp_path / "cut" / "run") == weights(tmp_path / "whole" / "run")


def with_files(folder: Path, adapter: dict[str, Any] | None, names: list[str]) -> tuple[RunConfig, BuildContext]:
    """A text system whose backbone is in a folder ``llama``, of four layers."""
    from mmllm.backbones.causal_lm import byte_tokenizer

    architecture = systems.MODEL["backbone"]["architecture"] | {"num_hidden_layers": 4}
    bare = {"kind": "causal_lm", "chat_template": "chatml", "architecture": architecture}
    model = parse({"model": {"backbone": bare}}).model
    torch.manual_seed(5)
    MultimodalLM.from_config(model, BuildContext(weights=False)).backbone.model.save_pretrained(folder / "llama")  # type: ignore[operator]
    byte_tokenizer().save_pretrained(folder / "llama")
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    (folder / "data.jsonl").write_text((json.dumps(row) + "\n") * 4)
    backbone = {"kind": "causal_lm", "pretrained": "./llama", "adapter": adapter}
    stage = {
        "name": "one",
        "train": names,
        "lr": 0.01,
        "data": ["data.jsonl"],
        "max_steps": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "samples": 0,
    }
    tree = {"model": {"backbone": backbone}, "stages": [stage], "output": str(folder / "run"), "trackers": []}
    return parse(tree), BuildContext(root=folder)


def test_of_a_backbone_with_files_only_the_trained_layers_are_saved(tmp_path: Path) -> None:
    config, context = with_files(tmp_path, None, ["backbone.layers.2-3"])
    plan = make_plan(config, context)
    layer = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert plan.stages[0].parts == {"backbone.layers.2-3": 2 * layer}
    final = train(config, context)
    saved = load_file(final / "parts.safetensors")
    assert sum(t.numel() for t in saved.values()) == 2 * layer
    assert {name.split(".layers.")[1][0] for name in saved} == {"2", "3"}
    assert set(checkpoint.read_json(final / "references.json")) == {"backbone"}
    import mmllm

    model = mmllm.load(final, device="cpu").model
    trained = dict(model.named_parameters())
    base = load_file(tmp_path / "llama" / "model.safetensors")
    for name, tensor in base.items():
        own = trained.get(f"backbone.model.{name}")
        if own is not None:
            assert torch.equal(own, tensor) == (".layers.2." not in name and ".layers.3." not in name), name


def test_full_fine_tuning_saves_the_backbone_and_refers_to_nothing(tmp_path: Path) -> None:
    config, context = with_files(tmp_path, None, ["backbone"])
    final = train(config, context)
    assert checkpoint.read_json(final / "references.json") == {}
    model = fresh(config, context)
    assert set(load_file(final / "parts.safetensors")) == set(model.parts()["backbone"])


def test_layers_that_are_not_there_or_named_twice_are_problems_of_the_plan(tmp_path: Path) -> None:
    config, context = with_files(tmp_path, None, ["backbone.layers.1-4", "backbone.layers.1-2"])
    with pytest.raises(ConfigError) as caught:
        make_plan(config, context)
    texts = [text for _, text in caught.value.problems]
    assert any("backbone has layers 0 to 3" in text for text in texts)
    assert any("'backbone.layers.1-2' shares layers with backbone.layers.1-4" in text for text in texts)
    with pytest.raises(ConfigError, match="matches no part"):
        with_files(tmp_path, None, ["backbones.layers.1-2"])


def test_checkpointing_and_a_prefix_do_not_go_together(tmp_path: Path) -> None:
    config, context = with_files(tmp_path, {"kind": "prefix_tuning"}, ["backbone.adapter"])
    stage = config.stages[0].model_copy(update={"gradient_checkpointing": True})
    with pytest.raises(ConfigError, match=r"stages\.0\.gradient_checkpointing: prefix_tuning needs the cache"):
        make_plan(config.model_copy(update={"stages": [stage]}), context)


def test_a_saved_adapter_needs_one_in_the_model(tmp_path: Path) -> None:
    config, context = with_files(tmp_path, {"kind": "adapter", "dim": 2}, ["backbone.adapter"])
    final = train(config, context)
    assert {p.name for p in (final / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    other, _ = with_files(tmp_path, None, ["backbone"])
    with pytest.raises(CheckpointError, match=r"the model's backbone has none; set `backbone\.adapter`"):
        checkpoint.load_parts(fresh(other, context), final)
    lora, _ = with_files(tmp_path, {"kind": "lora"}, ["backbone.adapter"])
    with pytest.raises(CheckpointError, match="does not fit the model"):
        checkpoint.load_parts(fresh(lora, context), final)


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "prefix_tuning", "num_virtual_tokens": 3},
        {"kind": "adapter", "dim": 2},
        {"kind": "ia3"},
        {"kind": "lora"},
    ],
    ids=lambda adapter: adapter["kind"],
)
@pytest.mark.parametrize("quantize", [None, {"bits": 4}], ids=["plain", "quantised"])
def test_half_precision(tmp_path: Path, adapter: dict[str, Any], quantize: dict[str, int] | None) -> None:
    """Adapters are float32 masters over a half base; what was trained answers in both precisions."""
    import mmllm

    config, context = with_files(tmp_path, adapter, ["backbone.adapter"])
    backbone = config.model.backbone.model_copy(update={"quantize": quantize and QuantizeConfig(**quantize)})
    model = config.model.model_copy(update={"backbone": backbone})
    final = train(config.model_copy(update={"model": model, "precision": "bf16"}), context)
    saved = load_file(final / "adapter" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in saved.values())
    for dtype in (torch.float32, torch.bfloat16):
        reply = mmllm.load(final, device="cpu", dtype=dtype).chat(
            [{"role": "user", "content": "hello"}], max_new_tokens=3
        )
        assert isinstance(reply, str)
