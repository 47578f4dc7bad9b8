"""The assembled model equals transformers' LlavaForConditionalGeneration on the same random weights.

Same CLIP tower read at layer -2 without class token, same two-layer projector, same Llama. Compared in float32 on a batch
with a picture, two pictures and none: logits, loss, and every gradient of the projector.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mmllm.backbones.causal_lm import byte_tokenizer
from mmllm.config.base import BuildContext
from mmllm.config.load import parse
from mmllm.model import MultimodalLM
from mmllm.processing.batch import Batch
from mmllm.processing.messages import Sample, parse_messages
from mmllm.processing.processor import Processor

VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
)
TEXT = LlamaConfig(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=272,
)
PLACEHOLDER = 270  # a free row of the vocabulary for transformers' own image token


@pytest.fixture
def systems(tmp_path: Path) -> tuple[MultimodalLM, Processor, LlavaForConditionalGeneration]:
    torch.manual_seed(7)
    CLIPVisionModel(VISION).save_pretrained(tmp_path / "clip")
    LlamaForCausalLM(TEXT).save_pretrained(tmp_path / "llama")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "llama")
    config = parse(
        {
            "model": {
                "inputs": {
                    "image": {
                        "encoder": {"kind": "clip", "pretrained": "./clip", "select_layer": -2},
                        "projector": {"kind": "mlp", "depth": 2},
                    }
                },
                "backbone": {"kind": "causal_lm", "pretrained": "./llama", "chat_template": "chatml"},
            }
        }
    ).model
    context = BuildContext(dtype=torch.float32, root=tmp_path)
    ours = MultimodalLM.from_config(config, context)
    theirs = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=VISION, text_config=TEXT, image_token_id=PLACEHOLDER, vision_feature_layer=-2)
    )
    theirs.model.vision_tower.load_state_dict(CLIPVisionModel.from_pretrained(tmp_path / "clip").state_dict())
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    theirs.model.language_model.load_state_dict(llama.model.state_dict())
    theirs.lm_head.load_state_dict(llama.lm_head.state_dict())
    projector = ours.inputs["image"].projector.layers
    theirs.model.multi_modal_projector.linear_1.load_state_dict(projector[0].state_dict())
    theirs.model.multi_modal_projector.linear_2.load_state_dict(projector[2].state_dict())
    return ours, Processor.from_config(config, context), theirs


def batch_of(processor: Processor) -> Batch:
    def picture(shade: int) -> dict[str, object]:
        import io

        image = Image.effect_noise((32, 32), 60).convert("RGB")
        image.putpixel((shade, shade), (255, shade, 0))
        data = io.BytesIO()
        image.save(data, "PNG")
        return {"type": "image", "data": data.getvalue()}

    conversations = [
        [
            {"role": "user", "content": [picture(1), {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "a cat"},
        ],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}],
        [
            {"role": "user", "content": [picture(2), {"type": "text", "text": "and"}, picture(3)]},
            {"role": "assistant", "content": "two"},
        ],
    ]
    samples = [processor.encode_sample(Sample(str(i), parse_messages(c)), 512) for i, c in enumerate(conversations)]
    return processor.collate(samples)


def test_logits_loss_and_projector_gradients_equal_transformers_llava(systems) -> None:
    ours, processor, theirs = systems
    batch = batch_of(processor)
    ids = torch.where(batch.ids >= ours.backbone.vocab_rows, PLACEHOLDER, batch.ids)
    reference = theirs(
        input_ids=ids, pixel_values=batch.media["image"].inputs["pixels"], attention_mask=batch.attention_mask
    )
    real = batch.attention_mask.bool()

    logits = ours.backbone(ours.splice(batch.ids, batch.media), batch.attention_mask).logits
    torch.testing.assert_close(logits[real], reference.logits[real], atol=1e-6, rtol=0)  # measured: 0

    loss = ours(batch)["text"]
    expected = F.cross_entropy(reference.logits.flatten(0, 1)[batch.predict], batch.targets, reduction="sum")
    assert batch.tokens == len(batch.targets) == sum(len(t) + 1 for t in ("a cat", "hello there", "two"))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)  # measured: 0

    loss.backward()
    expected.backward()
    mine = dict(ours.inputs["image"].projector.named_parameters())
    other = theirs.model.multi_modal_projector
    for name, gradient in {
        "layers.0.weight": other.linear_1.weight.grad,
        "layers.0.bias": other.linear_1.bias.grad,
        "layers.2.weight": other.linear_2.weight.grad,
        "layers.2.bias": other.linear_2.bias.grad,
    }.items():
        torch.testing.assert_close(mine[name].grad, gradient, atol=1e-6, rtol=1e-5)  # measured: 0


def test_pictures_land_at_their_own_placeholders(systems) -> None:
    ours, processor, _ = systems
    batch = batch_of(processor)
    embeddings = ours.splice(batch.ids, batch.media)
    encoded = ours.encode(batch.media)["image"]
    rows = [ids.ge(ours.backbone.vocab_rows).nonzero().flatten() for ids in batch.ids]
    assert [len(r) for r in rows] == [16, 0, 32]
    torch.testing.assert_close(embeddings[0, rows[0]], encoded[0])
    torch.testing.assert_close(embeddings[2, rows[2]], torch.cat([encoded[1], encoded[2]]))
    text = batch.ids < ours.backbone.vocab_rows
    torch.testing.assert_close(embeddings[text], ours.backbone.embed(batch.ids)[text])
