"""Adapters in encoders: outputs stay what they were, gradients reach every parameter, attention of torch's own is opened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from mmllm.adapters.attention import OpenAttention
from mmllm.config.base import BuildContext, component_class
from mmllm.errors import ConfigError

OFFLINE = BuildContext(dtype=torch.float32, weights=False)
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "open_clip": ("clip", {"arch": "ViT-B-32"}),
    "native": ("clip", {"arch": "ViT-B-16", "fit": "native"}),
    "timm": ("clip", {"arch": "ViT-B-16-SigLIP"}),
    "siglip": ("clip", {"pretrained": "google/siglip-base-patch16-224"}),
    "whisper": ("whisper", {"arch": "tiny"}),
    "imagebind": ("imagebind", {"modality": "depth"}),
    "hubert": ("hubert", {"pretrained": "facebook/hubert-base-ls960"}),
    "beats": ("beats", {}),
    "cformer": ("cformer", {}),
    "clap": ("clap", {"pretrained": "laion/clap-htsat-unfused"}),
    "frames": ("frames", {"encoder": {"kind": "vit", "pretrained": "google/vit-base-patch16-224"}}),
    "videomae": ("videomae", {"pretrained": "MCG-NJU/videomae-base"}),
    "vjepa2": ("vjepa2", {"pretrained": "facebook/vjepa2-vitl-fpc64-256"}),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2},
    "adapter": {"kind": "adapter", "dim": 2, "activation": "gelu"},
    "parallel": {"kind": "adapter", "dim": 2, "activation": "gelu", "placement": "parallel"},
}


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_opened_attention_equals_torchs(batch_first: bool, same: bool) -> None:
    """With a learned key, a mask for all and one for each head, and keys of another length. Measured 2e-7; allowed 1e-6."""
    closed = nn.MultiheadAttention(12, 3, add_bias_kv=True, batch_first=batch_first)
    x, y = torch.randn(4, 5, 12), torch.randn(4, 7, 12)
    x, y = (x, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1))
    inputs, keys = ((x, x, x), 5) if same else ((x, y, y), 7)
    masks = [None, torch.rand(5, keys) > 0.7, torch.randn(12, 5, keys)]
    with torch.no_grad():
        expected = [closed(*inputs, need_weights=False, attn_mask=mask)[0] for mask in masks]
        opened = OpenAttention(closed)
        found = [opened(*inputs, need_weights=False, attn_mask=mask)[0] for mask in masks]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def examples(preprocess: Any) -> list[Any]:
    rng = torch.Generator().manual_seed(0)
    if preprocess.media in ("image", "video"):
        pictures = [
            Image.fromarray((torch.rand(h, w, 3, generator=rng) * 255).to(torch.uint8).numpy())
            for h, w in ((40, 60), (64, 20))
        ]
        clips = [[picture] * preprocess.decode_options.get("frames", 1) for picture in pictures]
        return pictures if preprocess.media == "image" else clips
    rate = preprocess.decode_options["sample_rate"]
    return [(0.1 * torch.randn(count, generator=rng)).numpy() for count in (rate // 3, rate)]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_adapter_fits_every_transformer(name: str, adapter: str) -> None:
    """At the start the features are what they were. Measured 0 without and 5e-7 with torch's attention; allowed 1e-5."""
    kind, options = ENCODERS[name]
    given: Any = component_class("encoder", kind).model_validate({**options, "adapter": ADAPTERS[adapter]})
    config = given.tiny()
    torch.manual_seed(0)
    encoder = config.build(OFFLINE).eval()
    preprocess = config.preprocessor(OFFLINE)
    batch = preprocess.collate([preprocess(example) for example in examples(preprocess)])
    with torch.no_grad():
        expected, _ = encoder(batch)
    attached = given.adapter.attach(encoder)
    adapted = attached.model.eval()
    assert adapted.output_dim == expected.shape[-1]
    features, _ = adapted(batch)
    assert torch.allclose(features, expected, atol=1e-5)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in adapted.named_parameters() if attached.owns(n)}
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if attached.owns(n):
                p.normal_(std=0.1)
    features, _ = adapted(batch)
    assert not torch.allclose(features, expected, atol=1e-3)
    (features * torch.randn_like(features)).sum().backward()
    silent = [n for n, p in adapted.named_parameters() if attached.owns(n) and (p.grad is None or not p.grad.any())]
    assert not silent


def test_a_prefix_is_for_backbones() -> None:
    config = component_class("encoder", "whisper").model_validate(
        {"arch": "tiny", "adapter": {"kind": "prefix_tuning"}}
    )
    with pytest.raises(ConfigError, match=r"adapter: prefix_tuning works through a language model's cache"):
        config.adapter.attach(config.tiny().build(OFFLINE))  # type: ignore[attr-defined]


def test_ia3_asks_for_names_where_peft_knows_none() -> None:
    cls = component_class("encoder", "whisper")
    named = {"kind": "ia3", "targets": ["k_proj", "v_proj", "fc2"], "feedforward": ["fc2"]}
    bare, given = (cls.model_validate({"arch": "tiny", "adapter": one}) for one in ({"kind": "ia3"}, named))
    encoder = given.tiny().build(OFFLINE)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"adapter\.targets: .*target_modules"):
        bare.adapter.attach(encoder)  # type: ignore[attr-defined]
    attached = given.adapter.attach(encoder)  # type: ignore[attr-defined]
    assert {n.split(".")[-3] for n, _ in attached.model.named_parameters() if attached.owns(n)} == {
        "k_proj",
        "v_proj",
        "fc2",
    }
