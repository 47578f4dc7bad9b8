"""The temporal_qformer projector: Video-LLaMA's forward written out, runs of features, frames told by the encoder, pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.config.run import ModelConfig
from mmllm.encoders.imagebind import ImageBindConfig
from mmllm.encoders.video_transformer import VJEPA2Config
from mmllm.errors import ConfigError
from mmllm.model import MultimodalLM
from mmllm.projectors.temporal_qformer import TemporalQFormerConfig
from mmllm.projectors.temporal_qformer_module import TemporalQFormer, in_runs
from mmllm.testing import check_component
from mmllm.training.references import references, stored_parts
from mmllm.training.stages import freeze, resolve

NO_WEIGHTS = BuildContext(weights=False)
SMALL = {"hidden_dim": 16, "num_heads": 2, "ff_mult": 2, "num_queries": 3}
VIT = {
    "kind": "vit",
    "architecture": {
        "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 32, "patch_size": 8,
    },
}  # fmt: skip


def model_config(encoder: dict[str, Any], projector: dict[str, Any]) -> ModelConfig:
    config = ModelConfig.model_validate(
        {"inputs": {"video": {"encoder": encoder, "projector": projector}}, "backbone": {"kind": "causal_lm"}}
    )
    return config.model_copy(update={"backbone": config.backbone.tiny()})


def projector_of(config: ModelConfig, context: BuildContext = NO_WEIGHTS) -> TemporalQFormer:
    found = MultimodalLM.from_config(config, context).inputs["video"].projector
    assert isinstance(found, TemporalQFormer)
    return found


def test_the_published_forward() -> None:
    """``encode_videoQformer_visual`` of Video-LLaMA with einsums of transformers' Q-Former, frame by frame. Measured 2e-7
    (another batch); allowed 1e-5.
    """
    config = TemporalQFormerConfig.model_validate(
        {"frame": SMALL | {"num_layers": 4, "norm": True}, "clip": SMALL | {"num_queries": 2}, "frames": 4}
    )
    assert (config.clip.num_layers, config.clip.cross_attention_every) == (2, 1)  # Video-LLaMA's, where not given
    module = cast(TemporalQFormer, config.build(NO_WEIGHTS, input_dim=24, output_dim=40).eval())
    features = torch.randn(2, 4, 5, 24)
    assert module.frame is not None
    with torch.no_grad():
        found, mask = module(features.flatten(1, 2), torch.ones(2, 20, dtype=torch.bool))
        for index in range(2):
            read = []
            for time in range(4):
                seen = module.frame.norm(features[index, time])[None]
                queries = module.frame.query_tokens
                out = module.frame.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state[0]
                read.append(out + module.positions[time])
            hidden = torch.cat(read)[None]
            out = module.clip.qformer(query_embeds=module.clip.query_tokens, encoder_hidden_states=hidden)
            expected = module.clip.language_projection(out.last_hidden_state)[0]
            torch.testing.assert_close(found[index], expected, atol=1e-5, rtol=0)
    assert mask.shape == (2, 2)


class Small(TemporalQFormerConfig):
    """Tiny already, with its frames, which ``tiny()`` leaves to the encoder."""

    def tiny(self) -> Small:
        return self


@pytest.mark.parametrize("frame", [None, SMALL | {"num_layers": 2, "norm": True}])
def test_the_contract_with_several_frames(frame: dict[str, Any] | None) -> None:
    """Features of 1, 2, 5 and 18 in four runs, alone and in a batch, with padding that never shows."""
    check_component(Small.model_validate({"frame": frame, "clip": SMALL, "frames": 4, "norm": frame is None}))


def test_a_tiny_system_has_the_tiny_encoders_frames() -> None:
    encoder = {"kind": "frames", "frames": 8, "encoder": VIT}
    config = model_config(encoder, {"kind": "temporal_qformer", "frames": 8})
    assert projector_of(config).frames == 8
    assert projector_of(config.tiny()).frames == 3


def test_runs_of_features() -> None:
    """Equal ones where the features can be divided, shorter or empty ones at the end where not."""
    features = torch.arange(1.0, 8)[None, :, None].repeat(3, 1, 1)
    mask = torch.arange(7) < torch.tensor([[6], [7], [1]])
    runs, real = in_runs(features, mask, 3)
    assert runs[..., 0].tolist() == [
        [[1, 2, 0], [3, 4, 0], [5, 6, 0]],
        [[1, 2, 3], [4, 5, 6], [7, 0, 0]],
        [[1, 0, 0], [0, 0, 0], [0, 0, 0]],
    ]
    assert torch.equal(real, runs[..., 0] > 0)


def test_the_order_of_frames_counts_and_that_within_one_does_not() -> None:
    """Positions are the frames', and a Q-Former does not know the order of what it reads."""
    projector = projector_of(
        model_config({"kind": "frames", "frames": 4, "encoder": VIT}, {"kind": "temporal_qformer"})
    )
    projector.eval()
    with torch.no_grad():  # as they start, attention hardly looks at one feature more than at another
        for value in projector.parameters():
            value.normal_(std=0.2)
    features = torch.randn(1, 4, 16, 16)
    mask = torch.ones(1, 64, dtype=torch.bool)

    def read(given: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = projector(given.flatten(1, 2), mask)[0]
            return found

    plain = read(features)
    torch.testing.assert_close(read(features.flip(2)), plain, atol=1e-4, rtol=0)
    assert not torch.allclose(read(features.flip(1)), plain, atol=1e-2)


@pytest.mark.parametrize(
    ("encoder", "frames"),
    [
        ({"kind": "frames", "frames": 5, "encoder": VIT}, 5),
        ({"kind": "frames", "frames": 5, "encoder": VIT, "pooling": "mean"}, 1),
        (
            VJEPA2Config(
                architecture={"frames_per_clip": 6, **VJEPA2Config.small} | {"frames_per_clip": 6}
            ).model_dump(),
            3,
        ),
        (VIT, 1),
        (ImageBindConfig(modality="audio", output="clips", clips=8).tiny().model_dump(), 8),
        (ImageBindConfig(modality="video", output="tokens").tiny().model_dump(), 5),
        (ImageBindConfig(modality="video").tiny().model_dump(), 1),
    ],
)
def test_frames_come_from_the_encoder(encoder: dict[str, Any], frames: int) -> None:
    config = model_config(encoder, {"kind": "temporal_qformer", "clip": SMALL, "max_frames": 8})
    assert projector_of(config).frames == frames
    width = config.inputs["video"].encoder.build(NO_WEIGHTS).output_dim
    assert projector_of(config).positions.shape == (8, width)
    for given, path in (({"frames": frames + 1}, "frames"), ({"max_frames": frames - 1}, "max_frames")):
        if path == "max_frames" and frames == 1:
            continue
        wrong = model_config(encoder, {"kind": "temporal_qformer", "clip": SMALL, "max_frames": 8, **given})
        with pytest.raises(ConfigError) as refusal:
            MultimodalLM.from_config(wrong, NO_WEIGHTS)
        assert refusal.value.problems[0][0] == f"model.inputs.video.projector.{path}"


def test_each_stretch_of_a_sound_has_its_embedding() -> None:
    """The mean of them is the pooled one. Measured 3e-8; allowed 1e-6."""
    import numpy as np

    sound = np.random.default_rng(0).normal(0, 0.1, 5 * 16_000).astype(np.float32)
    found = {}
    for output in ("pooled", "clips"):
        torch.manual_seed(0)
        config = ImageBindConfig.model_validate({"modality": "audio", "output": output, "clips": 4}).tiny()
        preprocess = config.preprocessor(NO_WEIGHTS)
        item = preprocess(sound)
        with torch.no_grad():
            features, mask = config.build(NO_WEIGHTS)(preprocess.collate([item]))
        assert mask.sum() == preprocess.num_tokens(item) == len(features[0])
        found[output] = features[0]
    assert found["clips"].shape == (4, 16)
    torch.testing.assert_close(found["clips"].norm(dim=1), torch.ones(4))
    assert not torch.allclose(found["clips"][0], found["clips"][1], atol=1e-3)
    torch.testing.assert_close(found["clips"].mean(0), found["pooled"][0], atol=1e-6, rtol=0)


# Modules of a part -----------------------------------------------------------------------------------------------------
TWO = {"kind": "temporal_qformer", "frame": SMALL | {"num_layers": 2, "dropout": 0.5}, "clip": SMALL | {"dropout": 0.5}}


def stage(*train: str, **more: Any) -> dict[str, Any]:
    return {"name": "align", "train": list(train), "lr": 0.1, "data": ["data.jsonl"], **more}


def test_modules_of_a_part_train_alone() -> None:
    config = model_config({"kind": "frames", "encoder": VIT}, TWO)
    model = MultimodalLM.from_config(config, NO_WEIGHTS)
    names = ["inputs.*.projector.modules.clip", "inputs.video.projector.modules.positions"]
    run = parse({"model": config.model_dump(), "stages": [stage(*names, part_lr={names[1]: 0.5})]})
    trained = resolve(run.stages[0], model.parts())
    assert [(part.name, part.lr) for part in trained] == [
        ("inputs.video.projector.modules.clip", 0.1),
        ("inputs.video.projector.modules.positions", 0.5),
    ]
    freeze(model, trained, gradient_checkpointing=False)
    projector = model.inputs["video"].projector
    learning = {name for name, p in projector.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in projector.named_parameters() if not name.startswith("frame.")}
    assert not any(module.training for module in projector.frame.modules())  # no dropout where nothing learns
    assert all(module.training for module in projector.clip.modules())


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        (["inputs.video.projector.modules.heads"], "inputs.video.projector has positions, frame, clip"),
        (
            ["inputs.video.projector.modules.clip", "inputs.video.projector.modules.clip.qformer"],
            "shares parameters with inputs.video.projector.modules.clip",
        ),
        (
            ["inputs.video.projector.modules.clip", "inputs.video.projector.layers.0"],
            "shares layers with inputs.video.projector.modules.clip",
        ),
        (["inputs.audio.projector.modules.clip"], "matches no part"),
    ],
)
def test_modules_that_are_not_there_or_named_twice(train: list[str], problem: str) -> None:
    from mmllm.plan import make_plan

    config = model_config({"kind": "frames", "encoder": VIT}, TWO)
    with pytest.raises(ConfigError, match=problem):
        make_plan(parse({"model": config.model_dump(), "stages": [stage(*train)]}), NO_WEIGHTS)


def test_a_modality_may_be_called_modules() -> None:
    from mmllm.config.pieces import split

    assert split("inputs.modules.projector") == ("inputs.modules.projector", None)
    assert split("inputs.modules.projector.modules.clip.norm") == ("inputs.modules.projector", "clip.norm")
    assert split("backbone.layers.2-3") == ("backbone", range(2, 4))
    assert split("inputs.without.projector") == ("inputs.without.projector", None)
    assert split("inputs.*.projector.without.clip+frame") == ("inputs.*.projector", frozenset({"clip", "frame"}))


def test_a_checkpoint_holds_the_trained_modules_of_a_pretrained_q_former(tmp_path: Path) -> None:
    """The rest is referred to, but for a projector that no file brings back as a whole."""
    import transformers

    qformer = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    qformer |= {"encoder_hidden_size": 16, "vocab_size": 8, "max_position_embeddings": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "opt", "hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    text |= {"ffn_dim": 16, "word_embed_proj_dim": 20, "max_position_embeddings": 32}
    blip2 = transformers.Blip2ForConditionalGeneration(
        transformers.Blip2Config(
            vision_config=vision | {"image_size": 16, "patch_size": 4}, qformer_config=qformer, text_config=text,
            num_query_tokens=3, image_token_index=15,
        )
    )  # fmt: skip
    torch.nn.init.normal_(blip2.query_tokens)
    blip2.save_pretrained(tmp_path / "blip2")
    pretrained = {**SMALL, "num_layers": 2, "pretrained": "./blip2"}
    encoder, context = {"kind": "frames", "encoder": VIT}, BuildContext(root=tmp_path)

    alone = model_config(encoder, {"kind": "qformer", "extra_queries": 4, **pretrained})
    model = MultimodalLM.from_config(alone, context)
    own = model.inputs["video"].projector.state_dict()
    assert torch.equal(own["query_tokens"], blip2.query_tokens)
    assert own["extra_query_tokens"].shape == (1, 4, 16)
    assert len(own["extra_query_tokens"].unique(dim=1)[0]) == 4
    pieces = [f"inputs.video.projector.modules.{name}" for name in ("extra_query_tokens", "language_projection")]
    stored = stored_parts(model, alone, context, pieces)
    assert "inputs.video.projector" not in stored
    assert stored[-2:] == pieces
    assert "inputs.video.projector" in references(model, alone, context, pieces)

    both = model_config(encoder, {"kind": "temporal_qformer", "frame": pretrained, "clip": SMALL})
    model = MultimodalLM.from_config(both, context)
    state = model.inputs["video"].projector.state_dict()
    assert torch.equal(state["frame.query_tokens"], blip2.query_tokens)
    assert not any("frame.language_projection" in name for name in state)
    assert "inputs.video.projector" in stored_parts(model, both, context, ["inputs.video.projector.modules.clip"])
