"""The arithmetic of a step, and what happens when its loss is not finite or the run is told to stop."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import systems
import torch
from torch import Tensor, nn

from mmllm.data.mixture import StageData
from mmllm.errors import TrainingError
from mmllm.model import MultimodalLM
from mmllm.processing.batch import Batch
from mmllm.processing.processor import Processor
from mmllm.training import loop
from mmllm.training.loop import SummedLoss, seed_step
from mmllm.training.run import train


def run(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """The step rows of a short run of one stage."""
    options = {name: changes.pop(name) for name in ("precision", "compile") if name in changes}
    config, context = systems.system(folder, systems.stage(**changes), **options)
    train(config, context)
    return systems.rows(folder)


def test_loss_is_the_mean_over_the_tokens_of_the_global_batch(tmp_path: Path) -> None:
    """The samples' replies differ in length, so a mean of micro-batch means would differ (transformers #34191)."""
    cut = {size: run(tmp_path / str(size), micro_batch_size=size, epochs=1) for size in (1, 3, 4)}
    for size in (1, 3):
        for row, whole in zip(cut[size], cut[4], strict=True):
            assert row["tokens"] == whole["tokens"]
            assert row["loss"] == pytest.approx(whole["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    config, context = systems.system(tmp_path / "direct", systems.stage())
    torch.manual_seed(config.seed)
    processor, model = Processor.from_config(config.model, context), MultimodalLM.from_config(config.model, context)
    data = StageData(config.stages[0].data, config.seed, context)
    batch = processor.collate([processor.encode_sample(data[i], 2048) for i in list(data.order(0))[:4]])
    loss = model.eval()(batch)["text"]
    assert cut[1][0]["loss"] == pytest.approx(float(loss) / batch.tokens, rel=1e-5)
    assert cut[1][0]["tokens"] == batch.tokens


def test_batches_without_media_work_when_only_projectors_train(tmp_path: Path) -> None:
    rows = run(tmp_path, batch_size=1, micro_batch_size=1, epochs=1)  # every third batch is text alone
    assert len(rows) == 17
    assert all(row["updated"] for row in rows)
    assert {row["grad_norm"] == 0.0 for row in rows} == {True, False}


def poison(monkeypatch: pytest.MonkeyPatch, *ids: str) -> None:
    forward = SummedLoss.forward

    def poisoned(self: SummedLoss, batch: Batch) -> dict[str, Tensor]:
        poison = torch.inf if {*ids} & {*batch.sample_ids} else 1.0
        return {name: loss * poison for name, loss in forward(self, batch).items()}

    monkeypatch.setattr(SummedLoss, "forward", poisoned)


def test_no_step_is_made_when_the_loss_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    poison(monkeypatch, "s05")
    step, steps = torch.optim.AdamW.step, 0

    def counted(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    with caplog.at_level(logging.WARNING, "mmllm"):
        rows = run(tmp_path, epochs=1)
    assert [row["updated"] for row in rows].count(False) == 1
    assert steps == 4
    (message,) = [r.message for r in caplog.records if "not finite" in r.message]
    assert "s05" in message
    assert message.count(", ") <= 3, "only the micro-batch of the bad sample is named"


def test_weights_stay_when_the_step_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, *(f"s{i:02d}" for i in range(17)))
    config, context = systems.system(tmp_path, systems.stage(epochs=None, max_steps=1))
    torch.manual_seed(config.seed)
    before = {n: p.clone() for n, p in MultimodalLM.from_config(config.model, context).named_parameters()}
    final = train(config, context)
    from safetensors.torch import load_file

    after = load_file(final / "parts.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_no_checkpoint_is_made_of_a_step_that_learned_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights without a finite loss must not push the good checkpoints out; the save waits for the next good step."""
    config, context = systems.system(tmp_path, systems.stage(epochs=1, save_every=1), keep_last=9)
    order = StageData(config.stages[0].data, config.seed, context).order(0)
    poison(monkeypatch, f"s{order[4]:02d}")  # the second of five steps
    train(config, context)
    steps = [int(path.name[-8:]) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(steps) == [1, 3, 4, 5]


def test_a_stage_that_ends_without_finite_losses_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, *(f"s{i:02d}" for i in range(17)))
    with pytest.raises(TrainingError, match="ended with 5 steps in a row without a finite loss"):
        run(tmp_path, epochs=1, save_every=1)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert not (tmp_path / "run" / "final").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = torch.optim.AdamW.step, 0

    def exploding(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        result = step(self, *args, **kwargs)
        if steps == 2:
            self.param_groups[0]["params"][0].data.view(-1)[0] = torch.nan
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", exploding)
    with pytest.raises(TrainingError, match=r"no longer finite: inputs\.\S+; nothing was saved"):
        run(tmp_path, epochs=1, save_every=1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0-align-00000001"]


def test_too_many_steps_without_finite_loss_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, *(f"s{i:02d}" for i in range(17)))
    monkeypatch.setattr(loop, "NONFINITE_LIMIT", 3)
    with pytest.raises(TrainingError, match=r"step 2: .*not finite.* s\d\d.*3 in a row"):
        run(tmp_path)


def test_evaluation_is_weighted_by_tokens(tmp_path: Path) -> None:
    data = [{"reader": {"kind": "messages", "path": "data.jsonl"}}]
    losses = []
    for size in (1, 4):
        run(tmp_path / str(size), micro_batch_size=size, max_steps=2, epochs=None, eval_every=1, eval_data=data)
        losses.append([row["eval_loss"] for row in systems.rows(tmp_path / str(size), "eval_loss")])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != losses[0][1]


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    data = [{"reader": {"kind": "messages", "path": "data.jsonl"}}]
    changes: dict[str, Any] = {"train": ["backbone.adapter"], "epochs": 1}  # the adapter has dropout
    plain = run(tmp_path / "plain", **changes)
    with_evaluation = run(tmp_path / "evaluated", eval_every=1, eval_data=data, samples=2, **changes)
    assert [row["loss"] for row in plain] == [row["loss"] for row in with_evaluation]


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    """LoRA on a frozen base, embeddings without gradient (transformers #26221)."""
    rows = [
        run(tmp_path / str(on), train=["backbone.adapter"], epochs=1, gradient_checkpointing=on) for on in (False, True)
    ]
    for plain, checkpointed in zip(*rows, strict=True):
        assert checkpointed["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        assert checkpointed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
        assert plain["grad_norm"] > 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_layers_change_nothing_but_speed(tmp_path: Path) -> None:
    changes = {"train": ["inputs.*.projector"], "epochs": 1, "samples": 1}  # with the adapter, dropout would differ
    rows = [run(tmp_path / str(on), compile=on, **changes) for on in (False, True)]
    assert len(rows[0]) > 1
    for plain, compiled in zip(*rows, strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_bf16_multiplies_in_bf16_and_keeps_float32_masters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, dtypes = SummedLoss.forward, set()

    def watched(self: SummedLoss, batch: Batch) -> dict[str, Tensor]:
        linears = [m for m in self.model.backbone.modules() if isinstance(m, nn.Linear)]
        hooks = [m.register_forward_hook(lambda m, i, o: dtypes.add(o.dtype)) for m in linears]
        loss = forward(self, batch)
        for hook in hooks:
            hook.remove()
        dtypes.update({p.dtype for p in self.model.parameters() if p.requires_grad} - {torch.float32})
        return loss

    monkeypatch.setattr(SummedLoss, "forward", watched)
    half = run(tmp_path / "bf16", precision="bf16", train=["inputs.*.projector", "backbone.adapter"], epochs=1)
    assert dtypes == {torch.bfloat16}
    full = run(tmp_path / "fp32", train=["inputs.*.projector", "backbone.adapter"], epochs=1)
    # Largest difference measured: 2.4e-4.
    assert [row["loss"] for row in half] == pytest.approx([row["loss"] for row in full], abs=2e-3)


def test_fp16_on_the_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="fp16 needs a GPU"):
        run(tmp_path, precision="fp16")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    forward, calls = SummedLoss.forward, 0

    def signalled(self: SummedLoss, batch: Batch) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 5:  # the first of two micro-batches of step 3
            os.kill(os.getpid(), number)
        return forward(self, batch)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(SummedLoss, "forward", signalled)
        with pytest.raises(SystemExit) as caught:
            run(tmp_path, epochs=1)
    assert caught.value.code == code
    assert signal.getsignal(number) is handler
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0-align-00000003"]
    config, context = systems.system(tmp_path, systems.stage(epochs=1))
    train(config, context, resume=True)
    assert [row["step"] for row in systems.rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_random_states_depend_on_the_place_in_the_run_alone() -> None:
    def draw(*place: Any) -> list[float]:
        seed_step(*place)
        return torch.rand(2).tolist()

    first = draw(0, "align", 3, 0)
    assert draw(0, "align", 3, 0) == first
    others = [draw(1, "align", 3, 0), draw(0, "tune", 3, 0), draw(0, "align", 4, 0), draw(0, "align", 3, 1)]
    assert all(other != first for other in others)
