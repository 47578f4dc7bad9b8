"""What a stage trains, and the proofs: exactly the declared parts move, everything else stays bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import systems
import torch

from mmllm.config.run import RunConfig
from mmllm.data.mixture import StageData
from mmllm.errors import ConfigError, TrainingError
from mmllm.model import MultimodalLM
from mmllm.training.optimizer import build_optimizer, lr_factor
from mmllm.training.run import train
from mmllm.training.stages import (
    GRADIENT_DEADLINE,
    FrozenSnapshot,
    GradientWatch,
    check_modalities,
    freeze,
    resolve,
    set_dtypes,
)


@pytest.fixture
def built(tmp_path: Path) -> tuple[RunConfig, MultimodalLM]:
    config, context = systems.system(tmp_path)
    torch.manual_seed(0)
    return config, MultimodalLM.from_config(config.model, context)


def stage_of(config: RunConfig, **changes: object):  # type: ignore[no-untyped-def]
    return config.stages[0].model_copy(update=changes)


def test_patterns_name_parts_in_model_order_with_the_first_matching_rate(
    built: tuple[RunConfig, MultimodalLM],
) -> None:
    config, model = built
    rates = {"inputs.audio.*": 0.5, "inputs.*": 0.25}
    stage = stage_of(config, train=["backbone.adapter", "inputs.*.projector"], part_lr=rates, lr=1.0)
    found = [(part.name, part.lr) for part in resolve(stage, model.parts())]
    assert found == [("inputs.image.projector", 0.25), ("inputs.audio.projector", 0.5), ("backbone.adapter", 1.0)]


def test_backbone_alone_means_its_own_weights(built: tuple[RunConfig, MultimodalLM]) -> None:
    config, model = built
    (part,) = resolve(stage_of(config, train=["backbone"]), model.parts())
    assert not [name for name in part.parameters if "lora_" in name or "new_tokens" in name]


def test_every_wrong_pattern_is_reported_with_the_parts_and_a_suggestion(
    built: tuple[RunConfig, MultimodalLM],
) -> None:
    config, model = built
    stage = stage_of(config, train=["inputs.*.projectors", "inputs.image.projector"], part_lr={"backbone": 1.0})
    with pytest.raises(ConfigError) as caught:
        resolve(stage, model.parts())
    (first, second) = [message for _, message in caught.value.problems]
    assert "'inputs.*.projectors' matches no part" in first
    assert "inputs.audio.encoder" in first
    assert "did you mean" in first
    assert "'backbone' matches no trained part" in second


@pytest.mark.parametrize(
    "patterns",
    [["inputs.*.projector"], ["inputs.*.projector", "backbone.adapter"], ["inputs.*.encoder"], ["backbone*"], ["*"]],
)
def test_exactly_the_declared_parts_move(tmp_path: Path, patterns: list[str]) -> None:
    config, context = systems.system(tmp_path, systems.stage(train=patterns, epochs=None, max_steps=3))
    torch.manual_seed(config.seed)
    before = MultimodalLM.from_config(config.model, context).parts()
    train(config, context)
    torch.manual_seed(config.seed)
    after_model = MultimodalLM.from_config(config.model, context)
    from mmllm.training.checkpoint import load_parts

    load_parts(after_model, tmp_path / "run" / "final")
    moved = {
        part
        for part, parameters in after_model.parts().items()
        if any(not torch.equal(p, before[part][name]) for name, p in parameters.items())
    }
    assert moved == {part.name for part in resolve(config.stages[0], before)}


def test_frozen_parameters_are_not_in_the_optimizer(built: tuple[RunConfig, MultimodalLM]) -> None:
    config, model = built
    parts = resolve(config.stages[0], model.parts())
    optimizer = build_optimizer(model, parts, config.stages[0].optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for part in parts for p in part.parameters.values()}


def test_a_frozen_tensor_that_changes_is_named(built: tuple[RunConfig, MultimodalLM]) -> None:
    config, model = built
    freeze(model, resolve(config.stages[0], model.parts()), gradient_checkpointing=False)
    snapshot = FrozenSnapshot(model)
    snapshot.check(model)
    with torch.no_grad():
        next(iter(model.parts()["inputs.image.projector"].values())).add_(1.0)  # trained: may move
    snapshot.check(model)
    name, parameter = next(iter(model.parts()["inputs.audio.encoder"].items()))
    with torch.no_grad():
        parameter.view(-1)[-1] += 1e-6
    with pytest.raises(TrainingError, match=name.replace(".", r"\.")):
        snapshot.check(model)


def test_frozen_encoders_are_in_eval_mode_and_trained_ones_in_train_mode(
    built: tuple[RunConfig, MultimodalLM],
) -> None:
    config, model = built
    parts = resolve(stage_of(config, train=["inputs.audio.*"]), model.parts())
    freeze(model, parts, gradient_checkpointing=False)
    assert not any(module.training for module in model.inputs["image"].encoder.modules())
    assert all(module.training for module in model.inputs["audio"].encoder.modules())
    assert model.backbone.training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_backbone_runs_without_its_dropout(tmp_path: Path, checkpointing: bool) -> None:
    """Otherwise the result depends on how a batch is cut into micro-batches and processes."""
    config, context = systems.system(tmp_path)
    tree = config.model.model_dump()
    tree["backbone"]["architecture"] = {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_head": 2,
        "n_layer": 2,
        "vocab_size": 272,
    }
    model = MultimodalLM.from_config(type(config.model).model_validate(tree), context)
    embeddings = torch.randn(1, 6, 32, requires_grad=True)

    def draws_differ(*train: str) -> bool:
        parts = resolve(stage_of(config, train=list(train)), model.parts())
        freeze(model, parts, gradient_checkpointing=checkpointing)
        return not torch.equal(model.backbone(embeddings).logits, model.backbone(embeddings).logits)

    assert not draws_differ("inputs.*.projector")
    assert draws_differ("backbone")
    with torch.no_grad():
        for name, parameter in model.parts()["backbone.adapter"].items():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert draws_differ("backbone.adapter"), "an adapter keeps the dropout that its config asks for"


def test_batch_statistics_never_move_so_that_a_saved_encoder_is_the_trained_one(tmp_path: Path) -> None:
    config, context = systems.system(tmp_path, systems.stage(train=["inputs.image.*"]))
    tree = config.model.model_dump()
    tree["inputs"] = {
        "image": {"encoder": {"kind": "clip", "arch": "RN50"}, "projector": {"kind": "linear"}},
    }
    model = MultimodalLM.from_config(type(config.model).model_validate(tree).tiny(), context)
    freeze(model, resolve(config.stages[0], model.parts()), gradient_checkpointing=False)
    encoder = model.inputs["image"].encoder
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert encoder.training
    assert not any(norm.training for norm in norms)
    assert all(norm.weight.requires_grad for norm in norms)


def watch_of(config: RunConfig, model: MultimodalLM, *patterns: str) -> GradientWatch:
    parts = resolve(stage_of(config, train=list(patterns)), model.parts())
    freeze(model, parts, gradient_checkpointing=False)
    return GradientWatch(parts)


def test_a_parameter_cut_off_from_the_loss_is_an_error_at_once(built: tuple[RunConfig, MultimodalLM]) -> None:
    config, model = built
    watch = watch_of(config, model, "inputs.*.projector")
    parameters = model.parts()["inputs.image.projector"] | model.parts()["inputs.audio.projector"]
    *connected, cut = parameters
    for name in connected:
        parameters[name].grad = torch.ones_like(parameters[name])
    with pytest.raises(TrainingError, match=cut.replace(".", r"\.")):
        watch({"inputs.image"})


def test_zero_gradients_count_only_when_the_modality_was_there(built: tuple[RunConfig, MultimodalLM]) -> None:
    config, model = built
    watch = watch_of(config, model, "inputs.*.projector")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if ".audio." in name else torch.ones_like(parameter)
    for _ in range(3 * GRADIENT_DEADLINE):
        assert watch({"inputs.image"}) == []
    for _ in range(GRADIENT_DEADLINE - 1):
        watch({"inputs.image", "inputs.audio"})
    with pytest.raises(TrainingError, match=r"'inputs\.audio\.projector' .* zero gradients"):
        watch({"inputs.image", "inputs.audio"})


def test_a_single_silent_tensor_is_a_warning(built: tuple[RunConfig, MultimodalLM]) -> None:
    config, model = built
    watch = watch_of(config, model, "inputs.image.projector")
    parameters = model.parts()["inputs.image.projector"]
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    silent = list(parameters)[1]
    parameters[silent].grad = torch.zeros_like(parameters[silent])
    results = [watch({"inputs.image"}) for _ in range(GRADIENT_DEADLINE)]
    assert results == [[]] * (GRADIENT_DEADLINE - 1) + [[silent]]


def test_lora_passes_although_a_starts_with_zero_gradients(tmp_path: Path) -> None:
    config, context = systems.system(tmp_path, systems.stage(train=["backbone.adapter"], epochs=3))  # 15 steps
    train(config, context)


def test_a_modality_that_the_data_lack_is_an_error_naming_it(tmp_path: Path) -> None:
    config, context = systems.system(tmp_path)
    file = tmp_path / "data.jsonl"
    rows = [line for line in file.read_text().splitlines() if "audio" not in line]
    file.write_text("\n".join(rows) + "\n")
    with pytest.raises(TrainingError, match=r"inputs\.audio\.projector.* no audio"):
        train(config, context)
    model = MultimodalLM.from_config(config.model, context)
    stage = stage_of(config, train=["inputs.image.projector"])
    check_modalities(stage, resolve(stage, model.parts()), StageData(stage.data, 0, context))


def test_text_alone_trains_the_adapter(tmp_path: Path) -> None:
    config, context = systems.system(tmp_path, systems.stage(train=["backbone.adapter"], epochs=1))
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    (tmp_path / "data.jsonl").write_text((json.dumps(row) + "\n") * 4)
    train(config, context)


def test_decay_spares_vectors_tables_and_bare_parameters(built: tuple[RunConfig, MultimodalLM]) -> None:
    config, model = built
    stage = stage_of(config, train=["*"])
    parts = resolve(stage, model.parts())
    optimizer = build_optimizer(model, parts, stage.optimizer.model_copy(update={"weight_decay": 0.1}))
    decayed = {n for group in optimizer.param_groups if group["weight_decay"] for n in group["names"]}
    spared = {n for group in optimizer.param_groups if not group["weight_decay"] for n in group["names"]}
    assert any("q_proj" in name and "lora_A" in name for name in decayed)
    assert any("in_proj_weight" in name for name in decayed)
    for word in ("norm", "bias", "embed_tokens", "new_tokens", "class_embedding", "positional_embedding"):
        assert any(word in name for name in spared), word
        assert not any(word in name for name in decayed), word


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules(built: tuple[RunConfig, MultimodalLM], schedule: str, expected: list[float]) -> None:
    optimizer = built[0].stages[0].optimizer.model_copy(update={"schedule": schedule, "warmup": 0.3})
    assert [round(lr_factor(step, 6, optimizer), 6) for step in range(6)] == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trained_parts_are_float32_masters_and_frozen_matrices_half(
    built: tuple[RunConfig, MultimodalLM], precision: str
) -> None:
    _, model = built
    model.backbone.to(torch.bfloat16)  # as loaded from a bf16 checkpoint
    set_dtypes(model, {"inputs.image.projector", "backbone.adapter"}, precision)  # type: ignore[arg-type]
    half = torch.float32 if precision == "fp32" else torch.bfloat16
    for part, parameters in model.parts().items():
        for name, parameter in parameters.items():
            trained = part in ("inputs.image.projector", "backbone.adapter")
            assert parameter.dtype == (torch.float32 if trained or parameter.ndim < 2 else half), name
