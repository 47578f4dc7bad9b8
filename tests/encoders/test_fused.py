"""The fused encoder: what is joined where, on other grids, in time, behind one another; references; and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.nn import functional as F

from mmllm.config.base import BuildContext
from mmllm.config.run import ModelConfig
from mmllm.encoders.fused import FusedConfig
from mmllm.encoders.fused_module import to_grid
from mmllm.errors import ConfigError
from mmllm.model import MultimodalLM
from mmllm.training.references import references, stored_parts

NO_WEIGHTS = BuildContext(weights=False)


def vit(patch: int, width: int = 16, **more: Any) -> dict[str, Any]:
    numbers = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return {
        "kind": "vit",
        "architecture": {"model_type": "vit", **numbers, "image_size": 32, "patch_size": patch},
        **more,
    }


def fused(*encoders: dict[str, Any], **more: Any) -> FusedConfig:
    return FusedConfig.model_validate({"encoders": dict(zip("abc", encoders, strict=False)), **more})


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in ((40, 60), (100, 25))]


def sounds() -> list[Any]:
    rng = np.random.default_rng(1)
    return [rng.normal(0, 0.1, size).astype(np.float32) for size in (16_000, 5000, 24_000)]


def run(config: FusedConfig, media: list[Any]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[int]]:
    """Features and mask, what each encoder alone gives of the batch, and the counts that were promised."""
    preprocess, encoder = config.preprocessor(NO_WEIGHTS), config.build(NO_WEIGHTS)
    items = [preprocess(one) for one in media]
    with torch.no_grad():
        features, mask = encoder(preprocess.collate(items))
        alone = []
        for name, part in preprocess.parts.items():
            batch = part.collate([part(one) for one in media])
            alone.append(encoder.encoders[name](batch)[0])
    assert features.shape[2] == encoder.output_dim
    return features, mask, alone, [preprocess.num_tokens(item) for item in items]


def test_equal_grids_lie_side_by_side() -> None:
    features, mask, (first, second), counts = run(fused(vit(8), vit(8, 24)), pictures())
    assert counts == [16, 16]
    assert mask.all()
    assert torch.equal(features, torch.cat([first, second], dim=2))


def test_another_grid_is_interpolated_to_the_first() -> None:
    """torch's own bilinear interpolation with antialiasing of the rows and columns. Measured 0; allowed 1e-6."""
    features, _, (first, second, third), counts = run(fused(vit(8), vit(4), vit(16)), pictures())
    assert counts == [16, 16]
    expected = [first]
    for part, side in ((second, 8), (third, 2)):
        table = part.transpose(1, 2).reshape(2, 16, side, side)
        table = F.interpolate(table, (4, 4), mode="bilinear", align_corners=False, antialias=True)
        expected.append(table.flatten(2).transpose(1, 2))
    torch.testing.assert_close(features, torch.cat(expected, dim=2), atol=1e-6, rtol=0)


def test_places_keep_their_places() -> None:
    """A plane that rises to the right and twice as fast downwards does so on any grid, apart from its edges."""

    def plane(rows: int, cols: int) -> torch.Tensor:
        y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(cols) + 0.5) / cols
        return (2 * y[:, None] + x[None]).flatten()[:, None]

    own, wanted = torch.tensor([[6, 4], [8, 8]]), torch.tensor([[9, 12], [5, 7]])
    padded = torch.stack([F.pad(plane(6, 4), (0, 0, 0, 40), value=99.0), plane(8, 8)])
    found = to_grid(padded, own, wanted, 108)
    assert not found[1, 35:].any()
    first, second = found[0].view(9, 12)[2:-2, 2:-2], found[1, :35].view(5, 7)[1:-1, 1:-1]
    torch.testing.assert_close(first, plane(9, 12).view(9, 12)[2:-2, 2:-2], atol=1e-5, rtol=0)
    torch.testing.assert_close(second, plane(5, 7).view(5, 7)[1:-1, 1:-1], atol=0.02, rtol=0)


def test_sounds_are_interpolated_in_time() -> None:
    """Whisper's 50 a second and HuBERT's 49 are one sound's."""
    hubert = {"kind": "hubert", "architecture": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 32, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16,
              "num_conv_pos_embedding_groups": 4}}  # fmt: skip
    whisper = {"kind": "whisper", "architecture": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2,
               "encoder_ffn_dim": 32, "num_mel_bins": 16, "max_source_positions": 50}}  # fmt: skip
    features, mask, (first, second), counts = run(fused(whisper, hubert), sounds())
    assert counts == [50, 16, 75]
    assert mask.sum(1).tolist() == counts
    assert features.shape == (3, 75, 48)
    for row, count, steps in zip(range(3), counts, (49, 15, 74), strict=True):
        torch.testing.assert_close(features[row, :count, :16], first[row, :count], atol=1e-6, rtol=0)
        expected = F.interpolate(
            second[row, :steps].T[None, :, None], (1, count), mode="bilinear", align_corners=False, antialias=True
        )[0, :, 0].T
        torch.testing.assert_close(features[row, :count, 16:], expected, atol=1e-6, rtol=0)
        assert not features[row, count:].any()


def test_sounds_padded_as_in_salmonn() -> None:
    """The shorter of Whisper's and BEATs' features is filled up with zeros (arXiv 2310.13289, the authors' code)."""
    beats = {"kind": "beats", "architecture": {"embed_dim": 32, "encoder_layers": 1, "encoder_embed_dim": 32,
             "encoder_attention_heads": 2, "encoder_ffn_embed_dim": 32, "conv_pos": 16, "conv_pos_groups": 4}}  # fmt: skip
    whisper = {"kind": "whisper", "architecture": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2,
               "encoder_ffn_dim": 32, "num_mel_bins": 16, "max_source_positions": 50}}  # fmt: skip
    features, mask, (first, second), counts = run(fused(whisper, beats, lengths="pad"), sounds())
    assert counts == [50, 16, 75]  # whisper's: BEATs has 48, 8 and 72
    assert mask.sum(1).tolist() == counts
    for row, (count, patches) in enumerate(zip(counts, (48, 8, 72), strict=True)):
        assert torch.equal(features[row, :count, :16], first[row, :count])
        assert torch.equal(features[row, :patches, 16:], second[row, :patches])
        assert not features[row, patches:, 16:].any()


def test_one_behind_another() -> None:
    """Real features first, whatever each encoder's padding."""
    naflex = {"kind": "vit", "architecture": {"model_type": "siglip2_vision_model", "hidden_size": 16, "patch_size": 8,
              "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "num_patches": 16}}  # fmt: skip
    features, mask, (first, second), counts = run(fused(naflex, vit(8), along="sequence"), pictures())
    assert mask.sum(1).tolist() == counts
    for row, count in enumerate(counts):
        real = count - 16
        assert 1 <= real <= 16
        assert torch.equal(features[row, :real], first[row, :real])
        assert torch.equal(features[row, real:count], second[row])


def test_a_frozen_encoder_is_kept_by_reference(tmp_path: Path) -> None:
    """Each under its own path; not so where one of them could not come back."""
    model = ModelConfig.model_validate(
        {
            "inputs": {
                "image": {
                    "encoder": {"kind": "fused", "encoders": {"a": vit(8), "b": vit(4)}},
                    "projector": {"kind": "linear"},
                }
            },
            "backbone": {"kind": "causal_lm", "architecture": {"model_type": "llama", "hidden_size": 32,
                         "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 272}},
        }
    )  # fmt: skip
    built = MultimodalLM.from_config(model, NO_WEIGHTS)
    for name in "ab":
        built.inputs["image"].encoder.encoders[name].model.save_pretrained(tmp_path / name)
    tree = model.model_dump(mode="json")
    encoders = tree["inputs"]["image"]["encoder"]["encoders"]
    for name in "ab":
        encoders[name] |= {"pretrained": f"./{name}"}
    context, trained = BuildContext(root=tmp_path), ["inputs.image.projector"]
    both = ModelConfig.model_validate(tree)
    assert "inputs.image.encoder" not in stored_parts(built, both, context, trained)
    found = references(built, both, context, trained)
    assert {path: entry["pretrained"] for path, entry in found.items()} == {
        f"inputs.image.encoder.encoders.{name}": str(tmp_path / name) for name in "ab"
    }
    assert len({entry["sha256"] for entry in found.values()}) == 2
    encoders["b"] |= {"pretrained": None}
    one = ModelConfig.model_validate(tree)
    assert "inputs.image.encoder" in stored_parts(built, one, context, trained)
    assert references(built, one, context, trained) == {}


@pytest.mark.parametrize(
    ("encoders", "more", "message"),
    [
        ([vit(8), {"kind": "whisper", "arch": "tiny"}], {}, "encoders.b: takes audio, but the first encoder takes image"),
        (
            [{"kind": "whisper", "arch": "tiny"}, {"kind": "clap", "pretrained": "laion/clap-htsat-fused"}],
            {},
            "encoders.b: reads {'sample_rate': 48000}, but the first encoder",
        ),
        ([vit(8), vit(4, select="cls_patch")], {}, r"lengths: features cannot be interpolated \(a: 16 on \(4, 4\); b: 65 on no"),
        ([vit(8), vit(8, select_layer=-2), vit(8, select_layer=-3)], {}, "encoders.b.select_layer: found -2"),
        ([vit(8), vit(8, 24)], {"along": "sequence"}, r"along: the features have widths \[16, 24\]"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(encoders: list[dict[str, Any]], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(fused(*encoders, **more), pictures())


def test_one_encoder_needs_no_fusion() -> None:
    with pytest.raises(ValidationError, match="expected at least two"):
        fused(vit(8))
    with pytest.raises(ValidationError, match="`lengths` goes with `along: channels`"):
        fused(vit(8), vit(8), along="sequence", lengths="pad")
