"""Media inside the backbone: bit-equal before training, in their place, in decoding, in a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmllm.assistant import load as load_assistant
from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.config.run import InputConfig, ModelConfig
from mmllm.errors import ConfigError
from mmllm.generation import Decoding, decode
from mmllm.model import MultimodalLM
from mmllm.plan import make_plan
from mmllm.processing.messages import Sample, parse_messages
from mmllm.processing.processor import Processor
from mmllm.training.checkpoint import load_parts
from mmllm.training.run import train
from tests.training.systems import MODEL, write_data

FUSION = {"kind": "gated_cross_attention", "every": 1, "num_heads": 2, "head_dim": 8}
RESAMPLER = {"kind": "cross_attention", "num_queries": 3, "depth": 1, "num_heads": 2}
IMAGE = {**MODEL["inputs"]["image"], "projector": RESAMPLER, "fusion": FUSION}


def system(backbone: dict[str, Any] | None = None, **inputs: Any) -> ModelConfig:
    parts = {"inputs": inputs or {"image": IMAGE}, "backbone": backbone or MODEL["backbone"]}
    return ModelConfig.model_validate(parts)


def built(config: ModelConfig) -> tuple[MultimodalLM, Processor]:
    context = BuildContext(dtype=torch.float32, weights=False)
    torch.manual_seed(0)
    return MultimodalLM.from_config(config, context).eval(), Processor.from_config(config, context)


def turn(folder: Path, *content: str) -> list[dict[str, Any]]:
    parts = [
        {"type": "image", "path": str(folder / f"{word}.png")}
        if (folder / f"{word}.png").exists()
        else {"type": "text", "text": word}
        for word in content
    ]
    return [{"role": "user", "content": parts}]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", 8).parent


def open_gates(model: MultimodalLM) -> None:
    for name, parameter in model.named_parameters():
        if ".fusion." in name:
            torch.nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "mixtral", "mamba", "jamba", "mpt"])
def test_new_layers_leave_every_backbone_as_it_was(family: str, data: Path) -> None:
    config = system({"kind": "causal_lm", "architecture": {"model_type": family}})
    model, processor = built(config.model_copy(update={"backbone": config.backbone.tiny()}))
    prompt = [processor.encode_prompt(turn(data, "red", "what?"))]
    batch = processor.collate(prompt)
    assert int((batch.ids == processor.modalities["image"].placeholder).sum()) == 0
    with torch.no_grad():
        given = model.splice(batch.ids, batch.media)
        fused = model.backbone(given, batch.attention_mask).logits
        model.inputs["image"].fusion.look(None)  # type: ignore[union-attr, operator]
        plain = model.backbone(given, batch.attention_mask).logits
        assert torch.equal(fused, plain)
        open_gates(model)
        opened = model.backbone(model.splice(batch.ids, batch.media), batch.attention_mask).logits
        model.inputs["image"].fusion.look(None)  # type: ignore[union-attr, operator]
        plain = model.backbone(given, batch.attention_mask).logits  # the feed-forwards act on text as well
    first = batch.ids[0].tolist().index(processor.modalities["image"].markers[0])  # type: ignore[index]
    differs = (opened[0] != plain[0]).any(dim=-1)
    assert differs[first:].all()
    assert not differs[:first].any()


def test_text_sees_the_picture_before_it_and_no_other(data: Path) -> None:
    model, processor = built(system())
    open_gates(model)

    def states(*content: str) -> torch.Tensor:
        batch = processor.collate([processor.encode_prompt(turn(data, *content))])
        layer = model.inputs["image"].fusion  # type: ignore[union-attr]
        hidden = torch.ones(1, batch.ids.shape[1], 32)
        with torch.no_grad():
            model.splice(batch.ids, batch.media)
            return layer.fuse(0, hidden, layer.seen)[0]  # type: ignore[union-attr, operator]

    one, two = states("red", "a", "green", "b"), states("blue", "a", "green", "b")
    kept = (one == two).all(dim=-1)
    changed = (~kept).nonzero().flatten()
    # The start marker, the end marker, the line break and "a", up to the second picture's own line.
    assert changed.tolist() == list(range(int(changed[0]), int(changed[0]) + len(changed)))
    assert 3 <= len(changed) < len(one) - 8


def test_a_padded_batch_is_decoded_as_each_conversation_alone(data: Path) -> None:
    model, processor = built(system())
    open_gates(model)
    torch.nn.init.normal_(model.backbone.tables()[1], std=0.5)
    prompts = [
        processor.encode_prompt(turn(data, *content))
        for content in (["red", "what is it, tell me?"], ["a"], ["blue", "x", "green"], ["blue", "x", "red"])
    ]

    def answers(batch: list[Any]) -> list[list[int | None]]:
        steps = list(decode(model, processor, batch, Decoding(max_new_tokens=7)))
        return [[step.ids[row] for step in steps if step.ids[row] is not None] for row in range(len(batch))]

    together = answers(prompts)
    assert together == [answers([prompt])[0] for prompt in prompts]
    assert together[2] != together[3]  # it is the last picture that is seen

    # And without any cache: the whole sequence anew for each token.
    ids, found = list(prompts[0].ids), []
    for _ in range(len(together[0])):
        one = processor.collate([prompts[0]])
        given = torch.tensor([ids])
        with torch.no_grad():
            # New tokens stand behind the picture, so what the last position sees is what they see.
            model.splice(one.ids, one.media)
            fusion = model.inputs["image"].fusion
            seen = fusion.seen  # type: ignore[union-attr]
            wider = type(seen)(seen.media, one.media["image"].fused, given.shape)  # type: ignore[operator, union-attr]
            fusion.look(wider)  # type: ignore[union-attr, operator]
            logits = model.backbone(model.backbone.embed(given), torch.ones_like(given)).logits[0, -1]
        found.append(int(logits.argmax()))
        ids.append(found[-1])
    assert found == together[0]


def test_a_stage_trains_the_new_layers_alone_and_a_checkpoint_holds_them(data: Path, tmp_path: Path) -> None:
    plain = {k: v for k, v in MODEL["backbone"].items() if k != "adapter"}
    stage = {"name": "fuse", "train": ["inputs.image.fusion", "inputs.image.projector"], "lr": 1e-2}
    stage |= {"data": [str(data / "data.jsonl")], "batch_size": 4, "micro_batch_size": 2, "max_steps": 6, "epochs": 6}
    stage |= {"gradient_checkpointing": True, "samples": 1}
    parts = {"inputs": {"image": IMAGE, "audio": MODEL["inputs"]["audio"]}, "backbone": plain}
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"model": parts, "stages": [stage], "output": str(tmp_path / "run"), "trackers": []})
    )
    config = load(tmp_path / "run.yaml")
    plan = make_plan(config, BuildContext(root=tmp_path))
    q, kv, ff = 32 * 16, 2 * 16 * 16, 2 * 32 * 128
    assert plan.parameters["inputs.image.fusion"] == 2 * (q + kv + q + ff + 4 * 32 + 2)
    assert plan.inputs["image"].tokens == {"512x512": 2, "1600x400": 2}
    assert set(plan.stages[0].parts) == {"inputs.image.fusion", "inputs.image.projector"}
    folder = train(config, BuildContext(root=tmp_path))
    assistant = load_assistant(folder)
    gates = [p for n, p in assistant.model.named_parameters() if n.endswith("_gate")]
    assert len(gates) == 4
    assert all(bool(p.detach().any()) for p in gates)
    again, _ = built(config.model)
    assert "inputs.image.fusion" in load_parts(again, folder)
    own, theirs = dict(again.named_parameters()), dict(assistant.model.named_parameters())
    assert all(torch.equal(own[name], theirs[name]) for name in own if ".fusion." in name)


def test_gradients_are_the_same_with_checkpointed_layers(data: Path) -> None:
    model, processor = built(system())
    open_gates(model)
    question = [{"type": "image", "path": "red.png"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "red"}]
    batch = processor.collate([processor.encode_sample(Sample("s", parse_messages(messages, "s"), data), 500)])
    parameters = [p for n, p in model.named_parameters() if ".fusion." in n or ".projector." in n]
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            model.backbone.model.train()
        found.append(torch.autograd.grad(model(batch)["text"], parameters))
    assert all(bool(a.any()) for a in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_fused_is_refused() -> None:
    numbers = {"model_type": "t5", "d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 272}
    with pytest.raises(ConfigError, match=r"image\.fusion.*decoder-only"):
        built(system({"kind": "seq2seq", "architecture": numbers}))
    with pytest.raises(ConfigError, match=r"image\.fusion\.first: is block 5, but the backbone has blocks 0 to 1"):
        built(system(image={**IMAGE, "fusion": {**FUSION, "first": 5}}))
    with pytest.raises(ValueError, match="leave `markers` out"):
        InputConfig.model_validate({**IMAGE, "markers": False})
    assert InputConfig.model_validate(IMAGE).markers
