"""Any part goes with any other: every pair of kinds is built, trained for a step, saved, loaded, and gives equal outputs.

What is combined comes from the registry, so a new kind is covered as soon as it is there. A combination counts as
impossible only where the library itself refuses it, with a ``ConfigError`` that tells why.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import pairwise
from torch import Tensor

from mmllm.assistant import load
from mmllm.config.base import BuildContext, component_class, kinds
from mmllm.config.load import parse
from mmllm.config.run import RunConfig
from mmllm.data.mixture import StageData
from mmllm.dry_run import made_up_data
from mmllm.errors import ConfigError
from mmllm.generators.base import Clip, Generator, Sound
from mmllm.model import MultimodalLM
from mmllm.new import is_code_generator
from mmllm.outputs import Output
from mmllm.processing.processor import Processor
from mmllm.training import checkpoint
from mmllm.training.optimizer import build_optimizer
from mmllm.training.stages import freeze, resolve

Case = dict[str, Any]


def suggestions(family: str, kind: str) -> list[Case]:
    """A component of ``kind`` as a mapping, for each modality that it is for."""
    taken = component_class(family, kind).suggested
    return [{"kind": kind, **values} for values in taken.values()] or [{"kind": kind}]


def one_of_each(family: str) -> list[Case]:
    return [suggestions(family, kind)[0] for kind in kinds(family)]


def families(kind: str) -> list[Case]:
    """A generator of ``kind`` with each of the architectures that its class knows, where it says which."""
    cls: Any = component_class("generator", kind)
    key = "model" if is_code_generator("generator", kind) else "pipeline"
    return [{"kind": kind, "architecture": {key: name}} for name in vars(cls).get("families", ())] or one_of_each(
        "generator"
    )


def name_of(case: Case) -> str:
    def label(value: Any) -> str:
        architecture = value.get("architecture", {}) if isinstance(value, dict) else {}
        return (
            str(*architecture.values())
            if len(architecture) == 1
            else value["kind"]
            if isinstance(value, dict)
            else value
        )

    return "-".join(label(value) for value in case.values())


PLACES = ("backbone", "encoder")
# One behind the other as well as side by side: `mq_former` tells a fused encoder's members apart.
IN_A_ROW = {**suggestions("encoder", "fused")[0], "along": "sequence", "widths": "pad"}
INPUTS = pairwise(
    {
        "encoder": [*one_of_each("encoder"), IN_A_ROW],
        "projector": one_of_each("input_projector"),
        "adapter": one_of_each("adapter"),
        "place": PLACES,
        "backbone": one_of_each("backbone"),
    }
)
OUTPUTS = pairwise(
    {
        "projector": one_of_each("output_projector"),
        "generator": [case for kind in kinds("generator") for case in families(kind)],
        "backbone": one_of_each("backbone"),
    }
)
CODES = [
    {"generator": case}
    for kind in kinds("generator")
    for case in families(kind)
    if is_code_generator("generator", kind)
]


def input_tree(case: Case) -> Case:
    """A system that sees: an adapter on the backbone, or on the encoder."""
    encoder, backbone = dict(case["encoder"]), dict(case["backbone"])
    (encoder if case["place"] == "encoder" else backbone)["adapter"] = case["adapter"]
    part = f"{'inputs.it.encoder' if case['place'] == 'encoder' else 'backbone'}.adapter"
    model = {"inputs": {"it": {"encoder": encoder, "projector": case["projector"]}}, "backbone": backbone}
    return {"model": model, "stages": [stage(["inputs.*.projector", part])]}


def output_tree(case: Case) -> Case:
    """A system that makes something."""
    backbone = dict(case.get("backbone", one_of_each("backbone")[0]))
    output = {key: case[key] for key in ("projector", "generator") if key in case}
    train = [*(["outputs.*.projector"] if "projector" in case else []), "backbone.new_tokens"]
    objectives = {"text": 1.0, "condition": 1.0, "denoise": 0.1} if "projector" in case else {"text": 1.0}
    return {"model": {"backbone": backbone, "outputs": {"it": output}}, "stages": [stage(train, objectives=objectives)]}


def stage(train: list[str], **changes: Any) -> Case:
    return {"name": "only", "train": train, "lr": 0.01, "data": ["none.jsonl"], "max_length": 4096, **changes}


def run(tree: Case, folder: Path, compare: Callable[[MultimodalLM, Processor, Any], Tensor]) -> None:
    """Build, train one step, save, load; the loaded model's ``compare`` equals the trained one's to the bit.

    Raises ``ConfigError`` where the parts refuse each other.
    """
    whole = parse(tree)
    model_config = whole.model.tiny()
    context = BuildContext(root=folder)
    torch.manual_seed(1)
    processor, model = Processor.from_config(model_config, context), MultimodalLM.from_config(model_config, context)
    data = made_up_data(model_config, folder)
    config = RunConfig.model_validate(
        {**tree, "model": model_config, "stages": [{**tree["stages"][0], "data": [str(data)]}]}
    )
    (only,) = config.stages
    parts = resolve(only, model.parts())
    freeze(model, parts, gradient_checkpointing=False)
    before = {name: p.detach().clone() for part in parts for name, p in part.parameters.items()}
    reading = processor.reading_targets("denoise" in only.objectives)
    samples = StageData(only.data, 0, context)
    batch = reading.collate([reading.encode_sample(samples[i], only.max_length) for i in range(2)])
    optimizer = build_optimizer(model, parts, only.optimizer)
    losses = model(batch, only.objectives)
    assert losses.keys() == set(only.objectives)
    sum(loss * only.objectives[name] for name, loss in losses.items()).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    for part in parts:  # an adapter's first matrices have no gradient yet in its first step, its last ones have
        assert any(not torch.equal(before[name], p.detach()) for name, p in part.parameters.items()), part.name
        assert all(p.isfinite().all() for p in part.parameters.values())
    checkpoint.save(folder / "saved", model, processor, config, context, [part.name for part in parts])
    torch.manual_seed(2)
    loaded = load(folder / "saved", device="cpu")
    assert processor.own_tokens() == loaded.processor.own_tokens()
    with torch.no_grad():
        expected, found = compare(model.eval(), processor, batch), compare(loaded.model, loaded.processor, batch)
    assert expected.isfinite().all()
    assert torch.equal(expected, found)


def seen(model: MultimodalLM, processor: Processor, batch: Any) -> Tensor:
    """Logits where something is to be predicted."""
    out = model.backbone(model.splice(batch.ids, batch.media), batch.attention_mask, positions=batch.predict)
    return out.logits  # type: ignore[no-any-return]


def made(model: MultimodalLM, processor: Processor, batch: Any) -> Tensor:
    """Losses of all that the batch is for, and one medium."""
    torch.manual_seed(3)
    output = model.outputs["it"]
    told = isinstance(output, Output)
    losses = model(batch, ("text", "condition", "denoise") if told else ("text",))
    group = processor.signals["it"]
    signals = group.told(group.ids, torch.randn(group.count, model.backbone.hidden_dim))
    generator = output.frozen()  # type: ignore[operator, union-attr]
    sampling = generator.sampling.with_(seed=1, **({"steps": 1} if isinstance(generator, Generator) else {}))
    (medium,) = output.make(signals, sampling)  # type: ignore[operator, union-attr]
    return torch.cat([torch.stack(list(losses.values())).flatten(), numbers(medium)])


def numbers(medium: Any) -> Tensor:
    """A made picture, sound or clip as numbers."""
    values = medium.samples if isinstance(medium, Sound) else medium.frames if isinstance(medium, Clip) else [medium]
    return torch.tensor(np.stack([np.asarray(value, dtype=np.float32) for value in values])).flatten()


RESULTS: dict[str, list[tuple[Case, str | None]]] = {"inputs": [], "outputs": [], "codes": []}


def attempt(group: str, case: Case, tree: Case, folder: Path, compare: Callable[..., Tensor]) -> None:
    """Run a combination, or keep the library's own reason against it."""
    try:
        run(tree, folder, compare)
        reason = None
    except ConfigError as error:
        reason = "; ".join(f"{path}: {text}" for path, text in error.problems)
    RESULTS[group].append((case, reason))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("case", INPUTS, ids=name_of)
def test_inputs(case: Case, tmp_path: Path) -> None:
    attempt("inputs", case, input_tree(case), tmp_path, seen)


@pytest.mark.parametrize("case", OUTPUTS, ids=name_of)
def test_outputs(case: Case, tmp_path: Path) -> None:
    attempt("outputs", case, output_tree(case), tmp_path, made)


@pytest.mark.parametrize("case", CODES, ids=name_of)
def test_outputs_of_codes(case: Case, tmp_path: Path) -> None:
    attempt("codes", case, output_tree(case), tmp_path, made)


def test_nothing_is_refused_everywhere_and_every_refusal_has_a_reason() -> None:
    if [len(RESULTS[group]) for group in RESULTS] != [len(INPUTS), len(OUTPUTS), len(CODES)]:
        pytest.skip("looks at the results of all cases above")
    every = {
        (factor, str(part)) for results in RESULTS.values() for case, _ in results for factor, part in case.items()
    }
    works = {
        (factor, str(part))
        for results in RESULTS.values()
        for case, reason in results
        if reason is None
        for factor, part in case.items()
    }
    assert every == works
    assert all(reason is None or reason.startswith("model.") for results in RESULTS.values() for _, reason in results)
