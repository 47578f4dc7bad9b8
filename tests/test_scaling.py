"""The simulation of many devices, and what the plan says of the same."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from mmllm.config.run import RunConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
scaling = importlib.import_module("benchmarks.scaling")


def small(**stage: Any) -> RunConfig:
    """The benchmark's system with everything an eighth as wide, four layers, and samples that leave a GPU little but weights."""
    encoder = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    encoder |= {"image_size": 112, "patch_size": 14}
    backbone = {**scaling.LLAMA_70B, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4}
    backbone |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    inputs = {"image": {"encoder": {"kind": "clip", "architecture": encoder}, "projector": {"kind": "mlp", "depth": 2}}}
    model = {"inputs": inputs, "backbone": {**scaling.ASSISTANT["backbone"], "architecture": backbone}}
    stages = [{**scaling.INSTRUCT, "batch_size": 16, "max_length": 256, **stage}]
    return RunConfig.model_validate({"model": model, "stages": stages, "precision": "bf16"})


@pytest.mark.parametrize(
    "stage",
    [{}, {"train": ["backbone", "inputs.*"], "gradient_checkpointing": False}],
    ids=["lora", "everything"],
)
def test_the_plan_agrees_with_the_simulation(stage: dict[str, Any]) -> None:
    found = scaling.compare(small(**stage), 8)
    simulated, shares = found["simulation"], found["plan over simulation"]
    assert simulated["even"] == pytest.approx(1.0, abs=0.01)
    # Every block is gathered for each pass and the rest once; every unit gives its gradients away once.
    calls = {kind: one["calls"] for kind, one in simulated["collectives"].items()}
    assert calls == {"all-gather": 1 + 2 * 4, "reduce-scatter": 4 + 1}
    assert max(simulated["units"][1:]) == min(simulated["units"][1:])
    assert shares["weights"] == pytest.approx(1.0, abs=0.01)
    assert shares["gathered"] == pytest.approx(1.0, abs=0.01)
    assert shares["reduced"] == pytest.approx(1.0, abs=0.01)
    assert 0.95 <= shares["peak"] <= 1.15  # measured with LoRA: 0.991


def test_twice_the_devices_halve_the_weights_and_not_the_traffic() -> None:
    few, many = (scaling.simulate(small(), devices) for devices in (8, 16))
    assert many.weights == pytest.approx(few.weights / 2, rel=0.01)
    assert many.trained == pytest.approx(few.trained / 2, rel=0.01)
    assert many.collectives["all-gather"].bytes == pytest.approx(
        few.collectives["all-gather"].bytes * (15 / 16) / (7 / 8), rel=0.01
    )
