"""Weights in few bytes: what is lost, what is not, and that libraries read them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

from generator_training import shrink
from small_weights import SMALL, rewrite, rounded, stored

from mmllm.config.base import BuildContext
from mmllm.generators.image import StableDiffusionConfig
from mmllm.generators.tiny import tiny_pipeline


def test_rounding_loses_a_few_percent_once_and_spares_what_is_no_matrix() -> None:
    torch.manual_seed(0)
    weight, bias, ids = torch.randn(64, 32), torch.randn(64), torch.arange(6).view(2, 3)
    small = rounded(weight)
    assert small.dtype == weight.dtype
    assert 0.02 < (small - weight).norm() / weight.norm() < 0.035
    assert torch.equal(rounded(small), small)
    assert torch.equal(rounded(bias), bias)
    assert torch.equal(rounded(ids), ids)


def test_only_what_fits_exactly_is_stored_in_eight_bits() -> None:
    weight = torch.randn(8, 8)
    assert stored(rounded(weight)).dtype == SMALL
    assert torch.equal(stored(rounded(weight)).float(), rounded(weight))
    assert stored(weight).dtype == torch.float16
    assert stored(torch.arange(3)).dtype == torch.int64


def test_a_file_is_written_again_with_its_metadata_and_without_what_is_unused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    tensors = {"visual.a": torch.randn(4, 4), "visual.b": torch.randn(4), "text.a": torch.randn(4, 4)}
    save_file(tensors, file, metadata={"format": "pt"})
    rewrite(file, file, rounded)
    rewrite(file, tmp_path / "copy.safetensors", stored, "visual.", ("visual.b",))
    (name, copy), *rest = load_file(tmp_path / "copy.safetensors").items()
    assert (name, rest) == ("visual.a", [])
    assert torch.equal(copy.float(), rounded(tensors["visual.a"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.safetensors", "weights.safetensors"]


def test_a_shrunk_pipeline_is_read_as_it_was_rounded(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("StableDiffusionPipeline")
    pipeline.save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    shrink(tmp_path)
    assert SMALL in {value.dtype for value in load_file(next((tmp_path / "unet").glob("*.safetensors"))).values()}
    config = StableDiffusionConfig(pretrained=str(tmp_path), steps=1)
    after = config.build(BuildContext(dtype=torch.float32)).pipeline.unet.state_dict()
    assert {value.dtype for value in after.values()} == {torch.float32}
    # Biases and norms are kept in half precision.
    assert all(torch.allclose(after[name], rounded(value), atol=1e-3) for name, value in before.items())
