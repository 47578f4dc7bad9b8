"""BLIP-2 with Flan-T5: Q-Former and encoder-decoder equal transformers' own, tiny and random. Float32, CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mmllm.backbones.causal_lm import byte_tokenizer
from mmllm.backbones.seq2seq import Seq2SeqConfig
from mmllm.config.base import BuildContext
from mmllm.projectors.qformer import QFormerConfig

IMAGE = 15  # the id that Blip2 replaces
TEXT = {"model_type": "t5", "d_model": 20, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
TEXT |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}


@pytest.fixture
def blip2(tmp_path: Path) -> Any:
    import transformers

    qformer = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    qformer |= {"encoder_hidden_size": 24, "vocab_size": 8, "max_position_embeddings": 8}
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4}
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=TEXT, num_query_tokens=5, image_token_index=IMAGE
    )
    model = transformers.Blip2ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "blip2")
    model.language_model.save_pretrained(tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    return model


def test_logits_and_loss_of_the_reply(blip2: Any, tmp_path: Path) -> None:
    """Prompts of unequal lengths, replies of unequal lengths. Logits measured 5e-7, allowed 1e-5; loss to 1e-6."""
    context = BuildContext(dtype=torch.float32, root=tmp_path)
    projector = QFormerConfig(
        pretrained="./blip2", num_queries=5, num_layers=2, hidden_dim=16, num_heads=2, ff_mult=3, norm=False
    ).build(context, input_dim=24, output_dim=20)
    backbone = Seq2SeqConfig(pretrained="./t5").build(context, num_new_tokens=0).eval()
    pixels, ends = torch.randn(2, 3, 16, 16), 1
    prompts = [[7, 8, 9, ends], [3, ends]]
    answers = [[4, 5, ends], [6, 7, 8, 9, 10, ends]]

    ids = torch.tensor([[IMAGE] * 5 + p + [0] * (4 - len(p)) for p in prompts])
    labels = torch.tensor([a + [-100] * (6 - len(a)) for a in answers])
    with torch.no_grad():
        theirs = blip2(pixel_values=pixels, input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)
        features = blip2.vision_model(pixels).last_hidden_state
        seen, _ = projector.eval()(features, torch.ones(features.shape[:2], dtype=torch.bool))

    width = max(5 + len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    embedded, mask = torch.randn(2, width, 20), torch.zeros(2, width, dtype=torch.int64)
    replies, predict, targets = [], [], []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        first, behind = 5 + len(prompt), 5 + len(prompt) + len(answer)
        embedded[row, :5] = seen[row]
        embedded[row, 5:behind] = backbone.embed(torch.tensor(prompt + answer)).detach()
        mask[row, :behind] = 1
        replies.append([row, first, behind])
        predict += [row * width + place - 1 for place in range(first, behind)]
        targets += answer
    with torch.no_grad():
        ours = backbone(embedded, mask, positions=torch.tensor(predict), replies=torch.tensor(replies)).logits
    expected = torch.cat([theirs.logits[row, : len(answer)] for row, answer in enumerate(answers)])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(F.cross_entropy(ours, torch.tensor(targets)), theirs.loss, atol=1e-6, rtol=0)
