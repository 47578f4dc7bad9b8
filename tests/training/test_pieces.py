"""A stage that trains one module of a projector: that alone moves, it is saved, and mistakes are told by the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import systems
import torch

from mmllm.config.base import BuildContext
from mmllm.config.run import RunConfig
from mmllm.errors import ConfigError
from mmllm.model import MultimodalLM
from mmllm.plan import make_plan
from mmllm.projectors.qformer import QFormerConfig
from mmllm.training import checkpoint
from mmllm.training.run import train
from mmllm.training.stages import freeze, resolve

LINEAR = "inputs.image.projector.modules.language_projection"


def with_qformer(folder: Path, patterns: list[str]) -> tuple[RunConfig, BuildContext]:
    config, context = systems.system(folder)
    image = config.model.inputs["image"]
    image = image.model_copy(update={"projector": QFormerConfig(num_queries=2).tiny()})
    stage = config.stages[0].model_copy(update={"train": patterns, "part_lr": {}})
    model = config.model.model_copy(update={"inputs": config.model.inputs | {"image": image}})
    return config.model_validate(config.model_dump() | {"model": model, "stages": [stage]}), context


def test_one_module_of_a_projector_trains_and_is_saved(tmp_path: Path) -> None:
    config, context = with_qformer(tmp_path, ["inputs.image.projector.modules.language_projection"])
    plan = make_plan(config, context)
    width = plan.hidden_dim
    assert plan.stages[0].parts == {LINEAR: 16 * width + width}
    final = train(config, context)  # proves by itself that all else is bit for bit what it was
    model = MultimodalLM.from_config(config.model, context)
    (part,) = resolve(config.stages[0], model.parts())
    freeze(model, [part], gradient_checkpointing=False)
    inner = LINEAR.replace(".modules.", ".")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"{inner}.weight", f"{inner}.bias"}
    before = {name: p.detach().clone() for name, p in part.parameters.items()}
    checkpoint.load_parts(model, final)
    assert all(not torch.equal(before[name], p) for name, p in part.parameters.items())


def test_modules_that_are_not_there_or_named_twice_are_problems_of_the_plan(tmp_path: Path) -> None:
    config, context = with_qformer(
        tmp_path, ["inputs.image.projector.modules.language_projektion", LINEAR, f"{LINEAR}.bias"]
    )
    with pytest.raises(ConfigError) as caught:
        make_plan(config, context)
    texts = [text for _, text in caught.value.problems]
    there = "inputs.image.projector has query_tokens, qformer, language_projection"
    assert any("modules.language_projektion" in text and there in text for text in texts)
    assert any(f"{LINEAR}.bias' shares parameters with {LINEAR}" in text for text in texts)
