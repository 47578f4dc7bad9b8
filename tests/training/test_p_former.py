"""P-Former: its losses against formulas, its three stages in training, and that a reconstructing prompt is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import captioned
import pytest
import systems
import torch
from safetensors.torch import load_file
from test_distributed import launch
from torch.nn import functional as F

from mmllm.config.alignment import PFormerConfig
from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.config.run import RunConfig
from mmllm.data.mixture import StageData
from mmllm.errors import ConfigError
from mmllm.model import MultimodalLM
from mmllm.plan import make_plan
from mmllm.processing.batch import Batch
from mmllm.processing.captions import caption_readers
from mmllm.processing.processor import Processor
from mmllm.projectors.p_former import make_p_former
from mmllm.training import checkpoint
from mmllm.training.run import train

PROMPT: dict[str, Any] = {
    "kind": "p_former", "tokenizer": None, "vocab_size": 141, "max_length": 8, "max_positions": 8,
    "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "ff_mult": 2, "dim": 8,
}  # fmt: skip
LEARNS = {"reconstruction": 1.0, "self_contrastive": 1.0, "quantization": 1.0}
MODEL = {**captioned.MODEL, "inputs": {"image": {**captioned.MODEL["inputs"]["image"], "prompt": PROMPT}}}


def decoupled(**changes: Any) -> dict[str, Any]:
    """The stage that is of text alone."""
    return captioned.first(name="decouple", train=["inputs.image.prompt"], objectives=LEARNS, **changes)


def model_and_batch(folder: Path, count: int = 3) -> tuple[RunConfig, MultimodalLM, Batch]:
    captioned.write_pictures(folder, count, text_every=2)
    config, context = captioned.system(folder, decoupled(), model=MODEL)
    torch.manual_seed(0)
    model = MultimodalLM.from_config(config.model, context).eval()
    processor = Processor.from_config(config.model, context).reading_captions(caption_readers(config.model, context))
    data = StageData(config.stages[0].data, 0, context)
    return config, model, processor.collate([processor.encode_sample(data[i], 512) for i in range(count)])


def test_losses_are_those_of_the_formulas(tmp_path: Path) -> None:
    """Differences measured: 0 (reconstruction), 2.4e-7 (self_contrastive), 1.5e-8 (quantization); allowed 1e-4."""
    _, model, batch = model_and_batch(tmp_path)
    former, told = model.inputs["image"].prompt, batch.sentences["image"]
    assert told.items.tolist() == [0, 1, 2]  # with and without a picture
    assert (batch.counts["self_contrastive"], batch.counts["quantization"]) == (3, 3)
    assert batch.counts["reconstruction"] == batch.counts["text"]
    with torch.no_grad():
        found = model(batch, tuple(LEARNS))
        generator = torch.Generator().manual_seed(0)
        ids = told.ids.clone()
        for place in (torch.rand(ids.shape, generator=generator) < 0.25).nonzero().tolist():
            if place[1] and told.real[tuple(place)]:
                ids[tuple(place)] = 4  # [MASK]
        assert not torch.equal(ids, told.ids)
        table, _ = model.backbone.tables()
        texts, quantization, reconstruction = [], 0.0, 0.0
        for row in range(3):
            length = int(told.real[row].sum())
            state = former.bert(ids[row : row + 1, :length]).last_hidden_state[0, 0]
            texts.append(F.normalize(former.text_projection(state), dim=0))
            states = former.spread(state).view(4, 16)
            prompts = former.language_projection(torch.tanh(former.pooler[0](states)))
            nearest = torch.stack([table[(table - one).norm(dim=1).argmin()] for one in prompts])
            quantization += F.mse_loss(prompts, nearest).item()
            words = batch.targets[batch.predict // batch.ids.shape[1] == row]
            embedded = torch.cat([prompts, table[words[:-1]]])
            logits = model.backbone.model(inputs_embeds=embedded[None]).logits[0, 3:]
            reconstruction += F.cross_entropy(logits, words, reduction="sum").item()
        similarities = torch.stack(texts) @ torch.stack(texts).T / 0.07
        contrastive = F.cross_entropy(similarities, torch.arange(3), label_smoothing=0.1, reduction="sum").item()
    assert found["reconstruction"].item() == pytest.approx(reconstruction, abs=1e-4)
    assert found["self_contrastive"].item() == pytest.approx(contrastive, abs=1e-4)
    assert found["quantization"].item() == pytest.approx(quantization, abs=1e-4)


def test_alignment_is_the_distance_from_the_prompt_of_the_caption(tmp_path: Path) -> None:
    """Nothing is hidden of the caption, and no gradient goes to the prompt."""
    _, model, batch = model_and_batch(tmp_path)
    assert batch.counts["alignment"] == 2
    one, told = model.inputs["image"], batch.prompted["image"]
    found = model.train()(batch, ("alignment",))["alignment"]
    found.backward()
    assert model.training
    assert one.prompt.training
    assert all(p.grad is None for p in one.prompt.parameters())
    assert one.projector.language_projection.weight.grad.any()
    model.eval()
    with torch.no_grad():
        wanted = one.prompt.prompt(one.prompt.read(told.ids, told.real))
        expected = sum(F.mse_loss(a, b) for a, b in zip(one(batch.media["image"].inputs), wanted, strict=True))
    torch.testing.assert_close(found.detach(), expected)


def test_three_stages(tmp_path: Path) -> None:
    """Text alone, then beside BLIP-2's objectives, then beside the language model's: each trains what it names, and a killed
    run would find the prompt in the checkpoint."""
    captioned.write_pictures(tmp_path, 8, text_every=1, name="text")
    captioned.write_pictures(tmp_path, 8)
    stages = (
        decoupled(data=["text.jsonl"]),
        captioned.first(
            train=["inputs.image.projector", "inputs.image.alignment"],
            objectives={"itc": 1.0, "itm": 1.0, "itg": 1.0, "alignment": 10.0},
        ),
        captioned.second() | {"objectives": {"text": 1.0, "alignment": 100.0}},
    )
    config, context = captioned.system(tmp_path, *stages, model=MODEL, keep_last=9)
    final = train(config, context)
    assert [row["losses"].keys() for row in systems.rows(tmp_path)][::4] == [
        stage["objectives"].keys() for stage in stages
    ]
    ends = [load_file(folder / "parts.safetensors") for folder in checkpoint.checkpoints(tmp_path / "run")]
    for before, after, trained in zip(ends, ends[1:], (("projector", "alignment"), ("projector",)), strict=False):
        for name, value in before.items():
            assert torch.equal(value, after[name]) != (name.split(".")[2] in trained and "inputs" in name), name
    assert load_file(final / "parts.safetensors").keys() == ends[-1].keys()


def test_two_processes_learn_as_one(tmp_path: Path) -> None:
    """With nothing drawn (no mask, no dropout), and a last batch of one sample, which leaves one process without sentences.
    Differences measured: at most 4.2e-7; allowed 1e-4."""
    image = {**MODEL["inputs"]["image"], "prompt": {**PROMPT, "mask": 0.0, "dropout": 0.0}}
    model, found = {**MODEL, "inputs": {"image": image}}, {}
    for name, size in (("one", 4), ("two", 2)):
        captioned.write_pictures(tmp_path / name, 9, text_every=2)
        config, context = captioned.system(tmp_path / name, decoupled(micro_batch_size=size), model=model)
        if name == "one":
            train(config, context)
        else:
            process = launch(tmp_path / name / "config.yaml")
            output, _ = process.communicate(timeout=900)
            assert process.returncode == 0, output
        found[name] = systems.rows(tmp_path / name)
    assert len(found["two"]) == 6
    for one, two in zip(found["one"], found["two"], strict=True):
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)


def test_a_prompt_learns_to_make_the_backbone_say_its_text(tmp_path: Path) -> None:
    """36 texts of two words, of which the frozen backbone knows nothing. Measured 6.90 -> 4.04."""
    captioned.write_pictures(tmp_path, 36, text_every=1)
    architecture = {**MODEL["backbone"]["architecture"], "initializer_range": 0.3}
    model = {**MODEL, "backbone": {**MODEL["backbone"], "architecture": architecture}}
    stage = decoupled(batch_size=36, micro_batch_size=36, epochs=60, lr=1e-2)
    train(*captioned.system(tmp_path, stage, model=model))
    rows = [row["losses"]["reconstruction"] for row in systems.rows(tmp_path)]
    assert rows[-1] < 0.7 * rows[0]


def test_a_bert_is_the_start(tmp_path: Path) -> None:
    """Measured 0; allowed 1e-6."""
    import transformers

    numbers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=141, max_position_embeddings=8, **numbers)).eval()
    bert.save_pretrained(tmp_path / "bert")
    config = PFormerConfig(**(PROMPT | {"bert": "./bert"}))
    former = make_p_former(config, BuildContext(root=tmp_path), 4, 24).eval()
    ids, real = torch.randint(5, 141, (2, 6)), torch.arange(6)[None] < torch.tensor([6, 3])[:, None]
    with torch.no_grad():
        expected = bert(input_ids=ids, attention_mask=real.long()).last_hidden_state[:, 0]
        torch.testing.assert_close(former.read(ids, real), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"prompt": None}, "stages.0.objectives.alignment", "no input has a part 'prompt'"),
        ({"train": ["inputs.image.prompt"]}, "stages.0.train", "learns from reconstruction, self_contrastive, quant"),
    ],
)
def test_contradictions(tmp_path: Path, changes: dict[str, Any], where: str, message: str) -> None:
    image = dict(MODEL["inputs"]["image"], prompt=changes.pop("prompt", PROMPT))
    stage = captioned.first(**({"train": ["inputs.image.projector"], "objectives": {"alignment": 1.0}} | changes))
    with pytest.raises(ConfigError) as caught:
        make_plan(
            parse({"model": {**MODEL, "inputs": {"image": image}}, "stages": [stage]}), BuildContext(root=tmp_path)
        )
    assert any(path == where and message in text for path, text in caught.value.problems), caught.value.problems


def test_a_prompt_has_a_fixed_length() -> None:
    image = {**MODEL["inputs"]["image"], "projector": {"kind": "mlp"}, "alignment": None}
    with pytest.raises(ConfigError, match="`prompt` is of a fixed number of outputs; with projector 'mlp' it depends"):
        parse({"model": {**MODEL, "inputs": {"image": image}}})
    windowed = {**MODEL["inputs"]["image"], "projector": {**captioned.PROJECTOR, "window": 4}}
    with pytest.raises(
        ConfigError, match="`alignment` is of a fixed number of outputs; with projector 'qformer' it depends"
    ):
        parse({"model": {**MODEL, "inputs": {"image": windowed}}})
