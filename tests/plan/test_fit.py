"""`mmllm plan --fit`: what is proposed fits, can be pasted, and costs what it says."""

from __future__ import annotations

import pytest
from systems_for_plans import system

from mmllm.config.base import BuildContext
from mmllm.config.load import override
from mmllm.errors import ConfigError
from mmllm.plan import Setting, make_plan
from mmllm.plan.fit import fit, ladder, parse_size, render_fit

CONTEXT, CPU = BuildContext(), Setting(device="cpu")


def test_sizes() -> None:
    assert parse_size("24GB") == 24e9
    assert parse_size("0.5 GiB") == 2**29
    for wrong in ("24", "lots", "24 GX"):
        with pytest.raises(ConfigError, match="expected a size such as 24GB"):
            parse_size(wrong)


def test_what_fits_is_left_as_it_is() -> None:
    first, *_ = fit(system("backbone"), CONTEXT, CPU, 1e12)
    assert first.overrides == []
    assert first.cost == "nothing: it fits as it is"


def test_proposals_fit_and_can_be_pasted() -> None:
    config = system("inputs.*.projector", "backbone", max_length=512, part_lr={"backbone": 1e-4})
    own = make_plan(config, CONTEXT, CPU, costs=True).costs
    assert own is not None
    limit = own.stages["stage"].memory.peak / 2
    found = fit(config, CONTEXT, CPU, limit)
    assert found
    assert all("quality" not in one.cost for one in found[:1])  # micro-batches and time come first
    for one in found:
        costs = make_plan(override(config, one.overrides), CONTEXT, one.setting, costs=True).costs
        assert costs is not None
        assert costs.stages["stage"].memory.peak == one.peak <= limit
    text = render_fit(found, CPU, "1GB")
    assert "1. " in text
    assert found[0].overrides[0] in text


def test_the_ladder_goes_from_time_to_quality() -> None:
    rungs = list(ladder(system("backbone"), CONTEXT, Setting(devices=2, sharding="ddp", device="cpu")))
    words = [cost.split(":")[0] for cost, _, _ in rungs]
    assert words == ["nothing but smaller micro-batches", "time", "time", "precision", *["quality"] * 3]
    assert rungs[-1][2].sharding == "fsdp", "the sharing that `mmllm train` can do"
    last = override(system("backbone"), rungs[-1][1])
    assert last.stages[0].train == ["backbone.adapter"]
    assert last.model.backbone.quantize is not None
    assert last.stages[0].gradient_checkpointing
    assert last.precision == "bf16"
    make_plan(last, CONTEXT)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"backbone.adapter": 1e-2}),
        ({"backbone": 2e-5, "inputs.*": 1e-5}, {"backbone.adapter": 2e-4, "inputs.*": 1e-5}),
    ],
)
def test_lora_in_place_of_the_backbone_learns_at_a_rate_of_its_own(
    own: dict[str, float], expected: dict[str, float]
) -> None:
    config = system("inputs.*.projector", "backbone", part_lr=own)
    cost, overrides, _ = next(rung for rung in ladder(config, CONTEXT, CPU) if "LoRA" in rung[0])
    assert "10 times its rate" in cost
    (changed,) = override(config, overrides).stages
    assert changed.train == ["inputs.*.projector", "backbone.adapter"]
    assert changed.part_lr == pytest.approx(expected)
    assert changed.lr == config.stages[0].lr


def test_nothing_fits_in_nothing() -> None:
    assert fit(system(), CONTEXT, CPU, 1000) == []
    assert "nothing found that fits" in render_fit([], CPU, "1kB")


def test_the_answer_says_whose_times_they_are() -> None:
    found = fit(system(), CONTEXT, CPU, 1e12)
    assert "times are those of cpu" in render_fit(found, CPU, "24GB")
    assert "driver" not in render_fit(found, CPU, "24GB")  # nothing is kept back on a CPU
    assert "1 GB and 5% are left to driver and allocator" in render_fit(found, Setting(), "24GB")
