"""The qformer projector equals the Q-Former of a tiny random BLIP-2 that transformers saved. Float32, CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.config.base import BuildContext
from mmllm.errors import CheckpointError
from mmllm.projectors.qformer import QFormerConfig

NUMBERS = {
    "num_queries": 5,
    "num_layers": 3,
    "hidden_dim": 16,
    "num_heads": 2,
    "ff_mult": 3,
    "cross_attention_every": 2,
}


@pytest.fixture
def blip2(tmp_path: Path) -> Any:
    """A tiny Blip2ForConditionalGeneration, saved in ``tmp_path / 'blip2'``."""
    import transformers

    qformer = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    qformer |= {"encoder_hidden_size": 24, "vocab_size": 8, "max_position_embeddings": 8}
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4}
    text = {"model_type": "opt", "hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    text |= {"ffn_dim": 16, "word_embed_proj_dim": 20, "max_position_embeddings": 32}
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=5, image_token_index=15
    )
    model = transformers.Blip2ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():  # every one at work: queries and biases start as zeros
        if "language_model" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "blip2")
    return model


def build(root: Path, output_dim: int = 20, **options: Any) -> Any:
    config = QFormerConfig(pretrained="./blip2", **(NUMBERS | options))
    return config.build(BuildContext(root=root), input_dim=24, output_dim=output_dim).eval()


def reference(model: Any, features: Tensor, mask: Tensor | None = None) -> Tensor:
    queries = model.query_tokens.expand(len(features), -1, -1)
    read = model.qformer(query_embeds=queries, encoder_hidden_states=features, encoder_attention_mask=mask)
    out: Tensor = model.language_projection(read.last_hidden_state)
    return out


def test_picture_to_language_embeddings(blip2: Any, tmp_path: Path) -> None:
    """BLIP-2's own path from pixels, with ``norm`` for its last LayerNorm. Measured 0; allowed 1e-5."""
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        hidden = blip2.vision_model.embeddings(pixels)
        for layer in blip2.vision_model.encoder.layers:
            hidden = layer(hidden)
        found, mask = build(tmp_path, norm=True)(hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))
        expected = reference(blip2, blip2.vision_model(pixels).last_hidden_state)
    assert found.shape == (2, 5, 20)
    assert mask.all()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_masked_features(blip2: Any, tmp_path: Path) -> None:
    """Measured 0; allowed 1e-5. Hidden features do not matter: measured 0, allowed 1e-6."""
    features = torch.randn(3, 7, 24)
    mask = torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None]
    projector = build(tmp_path)
    with torch.no_grad():
        found, _ = projector(features, mask)
        torch.testing.assert_close(found, reference(blip2, features, mask.long()), atol=1e-5, rtol=0)
        other, _ = projector(torch.where(mask[..., None], features, 100 * torch.ones(())), mask)
        alone, _ = projector(features[1:2, :4], mask[1:2, :4])
    torch.testing.assert_close(other, found, atol=1e-6, rtol=0)
    torch.testing.assert_close(alone[0], found[1], atol=1e-5, rtol=0)


def test_another_language_model_keeps_the_rest(blip2: Any, tmp_path: Path) -> None:
    projector = build(tmp_path, output_dim=28)
    assert projector.language_projection.weight.shape == (28, 16)
    assert torch.equal(projector.query_tokens, blip2.query_tokens)
    theirs = blip2.qformer.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in projector.qformer.state_dict().items())


def test_other_numbers_than_the_checkpoints_are_refused(blip2: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"num_query_tokens 5, the YAML makes it 6; num_hidden_layers 3, .* 2"):
        build(tmp_path, num_queries=6, num_layers=2)


def test_another_encoder_width_is_refused(blip2: Any, tmp_path: Path) -> None:
    config = QFormerConfig(pretrained="./blip2", **NUMBERS)
    with pytest.raises(
        CheckpointError, match=r"crossattention\.attention\.key\.weight is \(16, 24\), expected \(16, 32\)"
    ):
        config.build(BuildContext(root=tmp_path), input_dim=32, output_dim=20)
