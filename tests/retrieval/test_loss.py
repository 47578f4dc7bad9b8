"""The contrastive objective: its value, its gradients, two processes, and what a configuration may ask for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import squares
import torch
from exchange import WIDTHS, example, loss_of, shares
from torch import Tensor, distributed, multiprocessing

from mmllm.config.base import BuildContext
from mmllm.config.contradictions import contradictions
from mmllm.data.mixture import StageData
from mmllm.errors import ConfigError
from mmllm.model import MultimodalLM
from mmllm.plan import make_plan
from mmllm.processing.batch import Batch
from mmllm.processing.processor import Processor
from mmllm.projectors.retrieval import RetrievalHeads
from mmllm.training.stages import freeze, resolve


def info_nce(heads: RetrievalHeads, signals: Tensor, features: Tensor) -> Tensor:
    """The mean of both directions, written pair by pair with cosines and logsumexp."""
    cosines = [
        [torch.cosine_similarity(heads.text(s[0]), heads.media(f.mean(dim=0)), dim=0) for f in features]
        for s in signals
    ]
    logits = torch.stack([torch.stack(row) for row in cosines]) * torch.exp(heads.logit_scale)
    terms = []
    for i in range(len(logits)):
        terms.append(logits[i].logsumexp(0) - logits[i, i])  # this text among all media
        terms.append(logits[:, i].logsumexp(0) - logits[i, i])
    return torch.stack(terms).sum() / 2


def test_the_loss_is_symmetric_info_nce_of_the_first_signal_and_the_mean_feature() -> None:
    heads, signals, features = example()
    assert math.exp(heads.logit_scale.item()) == pytest.approx(1 / 0.07)
    expected = info_nce(heads, signals, features)
    torch.testing.assert_close(loss_of(heads, signals, features), expected, atol=1e-4, rtol=1e-5)
    assert loss_of(heads, signals[:1], features[:1]).item() == pytest.approx(0.0, abs=1e-6)


def test_features_behind_the_mask_do_not_count() -> None:
    heads, _, features = example(1)
    loud = torch.cat([features, torch.full((1, 2, WIDTHS[1]), 99.0)], dim=1)
    found = heads.embed_media(loud, torch.tensor([[True] * 3 + [False] * 2]))
    torch.testing.assert_close(found, heads.embed_media(features, torch.ones(1, 3, dtype=torch.bool)))


def test_processes_together_have_the_loss_and_the_gradients_of_one() -> None:
    context = multiprocessing.get_context("spawn")
    results, free = context.Queue(), distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = free.port
    del free
    workers = [context.Process(target=shares, args=(rank, port, results)) for rank in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=1800) for _ in workers]
    for worker in workers:
        worker.join(timeout=1800)
    heads, signals, features = example()
    loss = loss_of(heads, signals, features)
    loss.backward()
    assert sum(value for value, _ in found) == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in heads.named_parameters():
        together = torch.stack([torch.tensor(gradients[name]) for _, gradients in found]).sum(dim=0)
        torch.testing.assert_close(together, parameter.grad, atol=1e-5, rtol=1e-4)


def model_and_batch(folder: Path, **output: Any) -> tuple[MultimodalLM, Batch]:
    squares.write_squares(folder, count=5, text_every=5)
    config = squares.system(folder, output=output)
    context = BuildContext(dtype=torch.float32, root=folder)
    processor = Processor.from_config(config.model, context).reading_targets(False, shown=True)
    model = MultimodalLM.from_config(config.model, context)
    data = StageData(config.stages[0].data, 0, context)
    freeze(model, resolve(config.stages[0], model.parts()), gradient_checkpointing=False)
    return model, processor.collate([processor.encode_sample(data[i], 512) for i in range(5)])


def test_the_model_scores_the_pictures_of_a_batch_against_each_other(tmp_path: Path) -> None:
    model, batch = model_and_batch(tmp_path)
    made = batch.made["image"]
    assert (batch.counts["contrastive"], made.shown.tolist()) == (4, [0, 1, 2, 3])
    found = model(batch, ("contrastive",))
    assert set(found) == {"contrastive"}
    embeddings = model.backbone.embed(batch.ids)
    first = made.positions[:, :1].flatten()
    states = model.backbone(embeddings, batch.attention_mask, states_at=first).states
    signals = (states + embeddings.flatten(0, 1)[first])[:, None]
    features, _ = model.inputs["image"].encoder(made.seen)
    heads = model.outputs["image"].retrieval
    expected = info_nce(heads, signals, features)
    torch.testing.assert_close(found["contrastive"], expected, atol=1e-4, rtol=1e-4)


def test_gradients_reach_what_the_alignment_stage_names_and_nothing_else(tmp_path: Path) -> None:
    model, batch = model_and_batch(tmp_path)
    sum(model(batch, ("text", "condition", "contrastive")).values()).backward()
    moved = {
        name for name, part in model.parts().items() if any(p.grad is not None and p.grad.any() for p in part.values())
    }
    assert moved == {"backbone.new_tokens", "outputs.image.projector", "outputs.image.retrieval"}
    model.zero_grad()
    sum(model(batch, ("contrastive",)).values()).backward()
    parts = model.parts()
    assert all(p.grad.any() for name in ("outputs.image.retrieval",) for p in parts[name].values())
    assert parts["backbone.new_tokens"]["backbone.new_tokens.weight"].grad.any()
    assert not any(p.grad.any() for p in parts["outputs.image.projector"].values())


def test_a_batch_without_pictures_gives_a_zero_that_can_run_backward(tmp_path: Path) -> None:
    model, batch = model_and_batch(tmp_path)
    batch.made = {}
    loss = model(batch, ("contrastive",))["contrastive"]
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_distance_of_conditions_can_be_the_cosine(tmp_path: Path) -> None:
    model, batch = model_and_batch(tmp_path, distance="cosine")
    made, output = batch.made["image"], model.outputs["image"]
    embeddings, places = model.backbone.embed(batch.ids), made.positions.flatten()
    states = model.backbone(embeddings, batch.attention_mask, states_at=places).states
    found = output((states + embeddings.flatten(0, 1)[places]).view(4, 2, -1))["text"]
    wanted = output.frozen().encode_text(made.captions)["text"]
    expected = (1 - torch.cosine_similarity(found, wanted, dim=-1)).mean(dim=1).sum()
    torch.testing.assert_close(model(batch, ("condition",))["condition"], expected, atol=1e-5, rtol=1e-5)


def test_the_decision_is_learned_from_the_samples_that_tell_the_source(tmp_path: Path) -> None:
    model, batch = model_and_batch(tmp_path)
    made = batch.made["image"]
    assert (made.decided.tolist(), made.retrieved.tolist()) == ([0, 1, 2, 3], [0, 0, 0, 0])
    model.eval()
    embeddings, first = model.backbone.embed(batch.ids), made.positions[:, 0]
    states = model.backbone(embeddings, batch.attention_mask, states_at=first).states
    logits = model.outputs["image"].decision.linear(states + embeddings.flatten(0, 1)[first])
    expected = -logits.log_softmax(dim=-1)[:, 0].sum()
    torch.testing.assert_close(model(batch, ("decision",))["decision"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pictures", [True, False])
def test_outputs_that_learn_alone_keep_no_graph_through_the_frozen_backbone(tmp_path: Path, pictures: bool) -> None:
    """Also of a batch without pictures, where gradients of zero are all that a process has to give."""
    model, batch = model_and_batch(tmp_path)
    batch.made = batch.made if pictures else {}
    parts = resolve(squares.system(tmp_path, squares.stage(train=["outputs.*"])).stages[0], model.parts())
    freeze(model, parts, gradient_checkpointing=False)
    through: list[bool] = []
    model.backbone.register_forward_hook(
        lambda _, given, out: through.extend([given[0].requires_grad, out.logits.requires_grad])
    )
    sum(model(batch, ("text", "condition", "contrastive", "decision")).values()).backward()
    assert through == [False, False]
    assert all(p.grad is not None for part in parts for p in part.parameters.values())


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"inputs": {}}, "model.outputs.image.retrieval", "needs the encoder of an input `image`"),
        ({"retrieval": None, "decision": None}, "stages.0.objectives.contrastive", "no output has a retrieval head"),
        ({"objectives": {"text": 1.0}}, "stages.0.train", "outputs.image.retrieval: learns from `contrastive` alone"),
    ],
)
def test_contradictions_are_told_by_plan_and_training(
    changes: dict[str, Any], where: str, message: str, tmp_path: Path
) -> None:
    squares.write_squares(tmp_path)
    stage = squares.stage()
    if "objectives" in changes:
        stage["objectives"] = changes["objectives"]
    if "retrieval" in changes:
        stage["train"] = ["outputs.image.projector"]
    output = {name: None for name in ("retrieval", "decision") if name in changes}
    config = squares.system(tmp_path, stage, output=output)
    if "inputs" in changes:
        config = config.model_copy(update={"model": config.model.model_copy(update={"inputs": {}})})
    context = BuildContext(root=tmp_path)
    with pytest.raises(ConfigError) as caught:
        make_plan(config, context)
    with torch.device("meta"):
        names = MultimodalLM.from_config(config.model, BuildContext(weights=False)).parts()
    for problems in (caught.value.problems, contradictions(config, context, names)):
        assert any(path == where and message in text for path, text in problems), problems


def test_a_decision_needs_something_to_decide(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`decision` is between generating and retrieving; it needs `retrieval`"):
        squares.system(tmp_path, output={"retrieval": None})
