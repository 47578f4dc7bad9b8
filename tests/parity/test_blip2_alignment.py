"""BLIP-2's first stage equals a tiny random Blip2ForImageTextRetrieval that transformers saved. Float32, CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.config.alignment import AlignmentConfig
from mmllm.config.base import BuildContext
from mmllm.errors import CheckpointError
from mmllm.projectors.blip2 import make_alignment
from mmllm.projectors.qformer import QFormerConfig

NUMBERS: dict[str, Any] = {"num_queries": 5, "num_layers": 3, "hidden_dim": 16, "num_heads": 2, "ff_mult": 3}
TOKENS = 40
TEXT = {"vocab_size": TOKENS, "max_positions": 9, "max_length": 9, "dim": 6}


def randomized(model: Any) -> Any:
    for parameter in model.parameters():  # every one at work: queries and biases start as zeros
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def blip2(tmp_path: Path) -> Any:
    import transformers

    qformer = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    qformer |= {"encoder_hidden_size": 24, "vocab_size": TOKENS + 1, "max_position_embeddings": 9}
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4}
    config = transformers.Blip2Config(
        vision_config=vision,
        qformer_config=qformer | {"use_qformer_text_input": True},
        text_config={"model_type": "opt"},
        num_query_tokens=5,
        image_text_hidden_size=6,
    )
    model = randomized(transformers.Blip2ForImageTextRetrieval(config))
    model.save_pretrained(tmp_path / "itm")
    return model


def loaded(root: Path) -> tuple[Any, Any]:
    context = BuildContext(root=root)
    config = QFormerConfig(pretrained="./itm", norm=True, **NUMBERS)
    projector = config.build(context, input_dim=24, output_dim=20).eval()
    alignment = make_alignment(AlignmentConfig(pretrained="./itm", **TEXT), config, context).eval()
    return projector, alignment


def pairs(count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, and captions of unequal length."""
    torch.manual_seed(3)
    real = torch.arange(7)[None] < torch.tensor([7, 4, 5, 3])[:count, None]
    return torch.randn(count, 3, 16, 16), torch.randint(5, TOKENS, (count, 7)).where(real, 0), real


def seen_by(model: Any, pixels: Tensor) -> Tensor:
    """The vision tower's features before its last LayerNorm, which the projector's ``norm`` is."""
    hidden: Tensor = model.vision_model.embeddings(pixels)
    for layer in model.vision_model.encoder.layers:
        hidden = layer(hidden)
    return hidden


def test_contrastive_and_matching_logits(blip2: Any, tmp_path: Path) -> None:
    """Measured 0 for both; allowed 1e-5."""
    projector, alignment = loaded(tmp_path)
    pixels, ids, real = pairs()
    with torch.no_grad():
        features = seen_by(blip2, pixels)
        mask = torch.ones(features.shape[:2], dtype=torch.bool)
        for i in range(4):  # a picture against all captions at once, as transformers takes them
            one = {
                "pixel_values": pixels[i : i + 1].expand(4, -1, -1, -1),
                "input_ids": ids,
                "attention_mask": real.long(),
            }
            expected = blip2(**one, use_image_text_matching_head=True).logits_per_image
            found = alignment.match(projector, features[i : i + 1].expand(4, -1, -1), mask, ids, real)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        theirs = blip2(pixel_values=pixels, input_ids=ids, attention_mask=real.long())
        media, text = alignment.embed_media(projector, features, mask), alignment.embed_captions(projector, ids, real)
    torch.testing.assert_close(media, theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text, theirs.text_embeds, atol=1e-5, rtol=0)
    best = torch.einsum("nqd,md->nmq", media, text).amax(-1)
    torch.testing.assert_close(best, (theirs.image_embeds @ theirs.text_embeds.T).amax(1), atol=1e-5, rtol=0)


def test_losses(blip2: Any, tmp_path: Path) -> None:
    """Against formulas on transformers' own outputs. Measured 1.2e-7 (itc), 4.2e-6 (itg, of 65) and
    4.8e-7 (itm, of 7.8); allowed 1e-4."""
    projector, alignment = loaded(tmp_path)
    pixels, ids, real = pairs()
    with torch.no_grad():
        features = seen_by(blip2, pixels)
        mask = torch.ones(features.shape[:2], dtype=torch.bool)
        found = alignment.losses(projector, features, mask, ids, real, ("itc", "itm", "itg"))
        theirs = blip2(pixel_values=pixels, input_ids=ids, attention_mask=real.long())
        logits = torch.stack(
            [torch.stack([(picture @ text).max() for text in theirs.text_embeds]) for picture in theirs.image_embeds]
        )
        own = torch.arange(4)
        to_text, to_media = (F.cross_entropy(x / 0.07, own, label_smoothing=0.1) for x in (logits, logits.T))
        assert found["itc"].item() / 4 == pytest.approx((to_text + to_media).item() / 2, abs=1e-4)
        assert found["itg"].item() == pytest.approx(written_one_by_one(blip2, alignment, pixels, ids, real), abs=1e-4)
        assert found["itm"].item() == pytest.approx(matched_one_by_one(blip2, logits, pixels, ids, real), abs=1e-4)


def written_one_by_one(blip2: Any, alignment: Any, pixels: Tensor, ids: Tensor, real: Tensor) -> float:
    """Every next token from a pass of its own, through transformers' Q-Former with a 4-D mask of who sees whom."""
    total = 0.0
    features = blip2.vision_model(pixels).last_hidden_state
    for i in range(len(ids)):
        for length in range(1, int(real[i].sum())):
            words = torch.cat([torch.tensor([TOKENS]), ids[i, 1:length]])
            embedded = blip2.embeddings(input_ids=words[None], query_embeds=blip2.query_tokens)
            sees = torch.zeros(5 + length, 5 + length, dtype=torch.bool)
            sees[:, :5] = True
            for row in range(length):
                sees[5 + row, 5 : 6 + row] = True
            states = blip2.qformer(
                query_embeds=embedded,
                query_length=5,
                attention_mask=sees[None, None],
                encoder_hidden_states=features[i : i + 1],
            ).last_hidden_state[0, -1]
            head = alignment.itg_head
            scores = head.norm(F.gelu(head.dense(states))) @ blip2.embeddings.word_embeddings.weight.T + head.bias
            chances = scores.log_softmax(-1)
            total -= 0.9 * chances[ids[i, length]].item() + 0.1 * chances.mean().item()
    return total


def matched_one_by_one(blip2: Any, logits: Tensor, pixels: Tensor, ids: Tensor, real: Tensor) -> float:
    """The pairs, and each picture and caption with another, drawn as in evaluation: with the seed 0."""
    draws = torch.Generator().manual_seed(0)

    def others(similarities: Tensor) -> Tensor:
        weights = (similarities / 0.07).softmax(1) + 1e-4
        return torch.multinomial(weights - torch.diag(weights.diag()), 1, generator=draws)[:, 0]

    picture, caption = others(logits.T), others(logits)
    total, own = 0.0, torch.arange(4)
    for pictures, captions, belong in ((own, own, 1), (picture, own, 0), (own, caption, 0)):
        assert bool((pictures == captions).all()) == bool(belong)
        scores = blip2(
            pixel_values=pixels[pictures],
            input_ids=ids[captions],
            attention_mask=real[captions].long(),
            use_image_text_matching_head=True,
        ).logits_per_image
        total -= scores.log_softmax(1)[:, belong].sum().item()
    return total


def test_the_queries_do_not_see_the_caption_that_is_written(blip2: Any, tmp_path: Path) -> None:
    """So one pass serves ``itc`` and ``itg``. Measured 0; allowed 1e-6."""
    projector, alignment = loaded(tmp_path)
    pixels, ids, real = pairs()
    with torch.no_grad():
        features = seen_by(blip2, pixels)
        mask = torch.ones(features.shape[:2], dtype=torch.bool)
        states, _ = alignment.write(projector, features, mask, ids, real)
        torch.testing.assert_close(states, projector.read(features, mask), atol=1e-6, rtol=0)
        embeddings = projector.language_projection(states)
    torch.testing.assert_close(embeddings, projector(features, mask)[0], atol=1e-6, rtol=0)


def test_another_checkpoint_is_refused(blip2: Any, tmp_path: Path) -> None:
    config = QFormerConfig(**NUMBERS)
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight is \(41, 16\), expected \(42, 16\)"):
        make_alignment(
            AlignmentConfig(pretrained="./itm", **(TEXT | {"vocab_size": 41})), config, BuildContext(root=tmp_path)
        )


@pytest.fixture
def bert(tmp_path: Path) -> Any:
    import transformers

    numbers = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=TOKENS, max_position_embeddings=9, **numbers)
    model = randomized(transformers.BertForMaskedLM(config))
    torch.nn.init.zeros_(model.bert.embeddings.token_type_embeddings.weight)  # BLIP-2 has none
    model.save_pretrained(tmp_path / "bert")
    return model


def test_the_text_side_starts_as_a_bert(bert: Any, tmp_path: Path) -> None:
    """A caption without a picture is read as BERT reads it, and every block of the queries starts as the text's. Measured
    2.4e-7; allowed 1e-5."""
    context = BuildContext(root=tmp_path)
    config = QFormerConfig(bert="./bert", **NUMBERS)
    projector = config.build(context, input_dim=24, output_dim=20).eval()
    alignment = make_alignment(AlignmentConfig(bert="./bert", **TEXT), config, context).eval()
    _, ids, real = pairs()
    with torch.no_grad():
        states = projector.read_text(alignment.embeddings(ids), alignment.text_blocks, real[:, None])
        expected = bert.bert(input_ids=ids, attention_mask=real.long()).last_hidden_state
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
        table = alignment.embeddings.word_embeddings.weight
        logits = alignment.itg_head(states, table)[..., :TOKENS]
        torch.testing.assert_close(logits, bert.cls(expected), atol=1e-5, rtol=0)
    for layer, block in zip(projector.qformer.encoder.layer, alignment.text_blocks, strict=True):
        assert torch.equal(layer.intermediate_query.dense.weight, block.intermediate.dense.weight)
        assert torch.equal(layer.output_query.LayerNorm.weight, block.output.LayerNorm.weight)
    with pytest.raises(CheckpointError, match=r"holds no encoder\.layer\.3\.attention\.self"):
        config.model_copy(update={"num_layers": 4}).build(context, input_dim=24, output_dim=20)
