"""The Q-Former window by window, as SALMONN's (arXiv 2310.13289), and with queries for each of several encoders."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.config.families import outputs_of
from mmllm.encoders.fused import FusedConfig
from mmllm.errors import ConfigError
from mmllm.projectors.qformer import MQFormerConfig, QFormerConfig

CONTEXT = BuildContext(weights=False)
SMALL: dict[str, Any] = {"num_layers": 2, "hidden_dim": 16, "num_heads": 2, "ff_mult": 2, "cross_attention_every": 1}


def awake(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin: a new one while there are features that none has read."""
    found = [0]
    while found[-1] + window < length:
        found.append(found[-1] + stride)
    return found


@pytest.mark.parametrize(("window", "stride"), [(17, None), (17, 17), (5, 2), (4, 3), (1, 1), (50, None)])
def test_windows_are_read_one_by_one(window: int, stride: int | None) -> None:
    """The same Q-Former on every window alone, for lengths of every kind in one batch. Measured 5.1e-7; allowed 1e-5."""
    config = QFormerConfig(num_queries=2, window=window, stride=stride, norm=True, **SMALL)
    projector = awake(config.build(CONTEXT, input_dim=8, output_dim=12))
    whole = QFormerConfig(num_queries=2, norm=True, **SMALL).build(CONTEXT, input_dim=8, output_dim=12).eval()
    whole.load_state_dict(projector.state_dict())
    lengths = [1, 16, 17, 18, 34, 35, 40]
    features = torch.randn(len(lengths), 40, 8)
    mask = torch.arange(40)[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        found, real = projector(features, mask)
        for item, length in enumerate(lengths):
            cuts = [slice(s, min(s + window, length)) for s in starts(length, window, stride or window)]
            one = slice(item, item + 1)
            expected = [whole(features[one, cut], mask[one, cut])[0][0] for cut in cuts]
            count = config.num_outputs(length)
            assert count == 2 * len(expected) == int(real[item].sum())
            assert real[item, :count].all()
            torch.testing.assert_close(found[item, :count], torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("window", "stride"), [(17, None), (5, 2), (4, 3), (1, None)])
def test_num_outputs_is_exact_for_any_length(window: int, stride: int | None) -> None:
    config = QFormerConfig(num_queries=3, window=window, stride=stride, **SMALL)
    for length in range(1, 200):
        assert config.num_outputs(length) == 3 * len(starts(length, window, stride or window))


def test_whole_windows_are_those_of_salmonns_unfold() -> None:
    """Its windows of 30 s (1500 features, ``round(1500 * 0.333333 / 30)`` each): 88 of 17; the 4 features that it drops are
    a last window here.
    """
    size = round(1500 * 0.333333 / 30)
    config = QFormerConfig(num_queries=1, window=size, **SMALL)
    projector = awake(config.build(CONTEXT, input_dim=4, output_dim=12))
    features = torch.randn(1, 1500, 4)
    cut = F.unfold(features.transpose(1, 2)[:, :, None], (1, size), stride=(1, size))  # (1, 4 * size, 88)
    pieces = cut.view(4, size, -1).permute(2, 1, 0)
    with torch.no_grad():
        expected = projector.language_projection(projector.read(pieces, torch.ones(pieces.shape[:2], dtype=torch.bool)))
        found, _ = projector(features, torch.ones(1, 1500, dtype=torch.bool))
    assert (len(pieces), found.shape[1]) == (88, 89)
    torch.testing.assert_close(found[0, :88], expected[:, 0], atol=1e-5, rtol=0)


def test_strides_must_leave_nothing_out() -> None:
    for options in ({"stride": 3}, {"window": 3, "stride": 4}):
        with pytest.raises(ValidationError, match="expected a window of at least the stride"):
            QFormerConfig.model_validate(options)


def by_hand(projector: Any, features: Tensor, owners: list[int], readers: list[int]) -> Tensor:
    """The Q-Former of one item, written out: every query reads the features of its own encoder only."""
    heads = 2

    def attention(block: Any, x: Tensor, source: Tensor, seen: Tensor) -> Tensor:
        core = block.attention
        q, k, v = core.query(x), core.key(source), core.value(source)
        size = q.shape[1] // heads
        read = []
        for h in range(heads):
            c = slice(h * size, (h + 1) * size)
            scores = (q[:, c] @ k[:, c].T / math.sqrt(size)).masked_fill(~seen, -math.inf)
            read.append(scores.softmax(dim=1) @ v[:, c])
        return block.output.LayerNorm(block.output.dense(torch.cat(read, dim=1)) + x)

    layers = list(projector.to_width.values())
    source = torch.stack([layers[owner](feature) for owner, feature in zip(owners, features, strict=True)])
    seen = torch.tensor([[owner == reader for owner in owners] for reader in readers])
    former = projector.qformer
    x = former.layernorm(projector.query_tokens[0])
    for layer in former.encoder.layer:
        x = attention(layer.attention, x, x, torch.ones(len(x), len(x), dtype=torch.bool))
        if layer.has_cross_attention:
            x = attention(layer.crossattention, x, source, seen)
        inner = F.gelu(layer.intermediate_query.dense(x))
        x = layer.output_query.LayerNorm(layer.output_query.dense(inner) + x)
    return projector.language_projection(x)  # type: ignore[no-any-return]


def test_every_group_of_queries_reads_its_own_encoder() -> None:
    """Measured 2.4e-7; allowed 1e-5."""
    numbers = SMALL | {"num_layers": 3, "cross_attention_every": 2}
    config = MQFormerConfig(queries={"clip": 3, "swin": 2, "sam": 1}, **numbers)
    projector = awake(config.build(CONTEXT, input_dim=8, output_dim=12))
    layouts = [(4, 2, 1), (1, 1, 5), (3, 3, 3)]
    features = torch.randn(3, 9, 8)
    mask = torch.arange(9)[None] < torch.tensor([sum(layout) for layout in layouts])[:, None]
    with torch.no_grad():
        found, real = projector(features, mask, torch.tensor(layouts))
        assert real.all()
        assert found.shape == (3, config.num_outputs(9), 12)
        for item, layout in enumerate(layouts):
            owners = [index for index, count in enumerate(layout) for _ in range(count)]
            expected = by_hand(projector, features[item, : len(owners)], owners, [0, 0, 0, 1, 1, 2])
            torch.testing.assert_close(found[item], expected, atol=1e-5, rtol=0)


def vit(patch: int, width: int) -> dict[str, Any]:
    numbers = {"model_type": "vit", "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"kind": "vit", "architecture": numbers | {"intermediate_size": 16, "image_size": 32, "patch_size": patch}}


def test_encoders_of_different_widths_and_lengths() -> None:
    """Zeros beside the narrower one's features; both numbers of features become the layout."""
    fused = FusedConfig.model_validate(
        {"encoders": {"clip": vit(8, 16), "swin": vit(16, 24)}, "along": "sequence", "widths": "pad"}
    )
    preprocess, encoder = fused.preprocessor(CONTEXT), fused.build(CONTEXT)
    items = [preprocess(Image.new("RGB", (40, 30), colour)) for colour in ("red", "blue")]
    config = MQFormerConfig(queries={"clip": 2, "swin": 1}, **SMALL)
    assert [outputs_of(config, preprocess, item) for item in items] == [(3, (16, 4))] * 2
    with torch.no_grad():
        features, mask = encoder(preprocess.collate(items))
        alone = encoder.encoders["clip"](
            preprocess.parts["clip"].collate([{"pixels": i["clip.pixels"]} for i in items])
        )[0]
    assert features.shape == (2, 20, 24)
    assert torch.equal(features[:, :16, :16], alone)
    assert not features[:, :16, 16:].any()
    assert mask.all()
    with pytest.raises(
        ConfigError, match="queries: found clip, dino, expected the encoders' names in their order: clip, swin"
    ):
        outputs_of(MQFormerConfig(queries={"clip": 2, "dino": 1}, **SMALL), preprocess, items[0])
    beside = FusedConfig.model_validate({"encoders": {"clip": vit(8, 16), "swin": vit(8, 24)}}).preprocessor(CONTEXT)
    with pytest.raises(ConfigError, match="the encoder is not `fused` with `along: sequence`"):
        outputs_of(config, beside, beside(Image.new("RGB", (40, 30))))
    with pytest.raises(ValidationError, match="`widths` goes with `along: sequence`"):
        FusedConfig.model_validate({"encoders": {"a": vit(8, 16), "b": vit(8, 16)}, "widths": "pad"})
