"""Generators of codes equal the libraries' own models: tiny random folders of every class."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.config.base import BuildContext
from mmllm.config.families import Codes
from mmllm.config.load import parse
from mmllm.errors import CheckpointError, ConfigError, MmllmError
from mmllm.generators.base import CodeGenerator, Sound
from mmllm.generators.codes import AudioCodecConfig, PretrainedCodesConfig, VQConfig
from mmllm.generators.codes_module import load_model

CONTEXT = BuildContext(dtype=torch.float32)
OFFLINE = BuildContext(weights=False)
SIZES: dict[str, tuple[type[PretrainedCodesConfig], dict[str, Any]]] = {
    "VQModel": (VQConfig, {"width": 8, "height": 12}),
    "EncodecModel": (AudioCodecConfig, {"seconds": 0.02, "codebooks": 2}),
    "DacModel": (AudioCodecConfig, {"seconds": 0.02, "codebooks": 3}),
}
CODES = {"VQModel": Codes(24, 16), "EncodecModel": Codes(8, 16, 2), "DacModel": Codes(10, 16, 3)}


@pytest.fixture(scope="module", params=list(SIZES))
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PretrainedCodesConfig:
    """Of a folder that the library itself has written."""
    cls, size = SIZES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    load_model(cls(architecture={"model": request.param}).tiny(), CONTEXT).save_pretrained(folder)
    return cls(pretrained=str(folder), **size)


def name_of(config: PretrainedCodesConfig) -> str:
    return Path(config.pretrained or "").name.rstrip("0")


@pytest.fixture(scope="module")
def generator(config: PretrainedCodesConfig) -> CodeGenerator:
    return config.build(CONTEXT)  # type: ignore[return-value]


def own_model(config: PretrainedCodesConfig) -> Any:
    name = name_of(config)
    return getattr(importlib.import_module(config.families[name].library), name).from_pretrained(config.pretrained)


def targets_of(config: PretrainedCodesConfig) -> torch.Tensor:
    rng, target = np.random.default_rng(0), config.target(CONTEXT)
    if config.media == "image":
        noise = [rng.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(3)]
        return torch.stack([target(Image.fromarray(one)) for one in noise])
    return torch.stack([target(rng.normal(0, 0.3, size).astype(np.float32)) for size in (1, 100, 999)])


def most(model: Any) -> dict[str, float]:
    """The argument that makes EnCodec use all its codebooks; DAC does so anyway."""
    return {"bandwidth": model.config.target_bandwidths[-1]} if "target_bandwidths" in model.config.to_dict() else {}


def own_codes(config: PretrainedCodesConfig, model: Any, targets: torch.Tensor) -> torch.Tensor:
    """``(N, P)`` as the library's calls give them."""
    if "VQ" in name_of(config):
        return model.quantize(model.encode(targets).latents)[2][2].reshape(len(targets), -1)  # type: ignore[no-any-return]
    found = model.encode(targets, **most(model)).audio_codes
    codes = found if "Dac" in name_of(config) else found[0]
    return codes.permute(0, 2, 1).reshape(len(targets), -1)  # type: ignore[no-any-return]


def test_the_codes_are_the_librarys(config: PretrainedCodesConfig, generator: CodeGenerator) -> None:
    targets = targets_of(config)
    found = generator.encode(targets)
    with torch.no_grad():
        assert torch.equal(found, own_codes(config, own_model(config), targets))
    assert len(found.unique()) >= 3


def test_what_is_made_is_the_librarys_own_reconstruction(
    config: PretrainedCodesConfig, generator: CodeGenerator
) -> None:
    targets, model = targets_of(config), own_model(config)
    made: list[Any] = generator.generate(generator.encode(targets))
    with torch.no_grad():
        if "VQ" in name_of(config):
            expected = model(targets).sample
            pixels = ((expected + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
            # Measured: 0.5, the rounding. The model's own forward adds and takes away the latents around the codes.
            found = np.stack([np.asarray(picture, dtype=np.float32) for picture in made])
            assert np.abs(found - pixels).max() <= 0.51
            return
        expected = model(targets, **most(model)).audio_values.reshape(3, -1)
    for sound, wave in zip(made, expected, strict=True):
        assert isinstance(sound, Sound)
        assert sound.sample_rate == 8000
        np.testing.assert_allclose(sound.samples, wave.clamp(-1, 1).numpy()[: len(sound.samples)], atol=1e-5)


def test_numbers_are_known_from_json_alone(config: PretrainedCodesConfig, generator: CodeGenerator) -> None:
    assert config.codes(OFFLINE) == generator.codes == CODES[name_of(config)]
    assert config.build(OFFLINE) is None
    group, codes = config.tokens(OFFLINE, None), generator.codes
    assert group.rows == codes.size * codes.codebooks + 2
    assert len(group.places) == codes.length * codes.codebooks + 2
    first, last = group.places[0], group.places[-1]
    assert (list(first), list(last)) == ([0], [group.rows - 1])
    for place, choice in zip(group.free, group.places[1:-1], strict=True):
        book = (place - 1) % codes.codebooks
        assert choice == range(1 + book * codes.size, 1 + (book + 1) * codes.size)


def test_bfloat16_around_it_changes_no_code(config: PretrainedCodesConfig, generator: CodeGenerator) -> None:
    targets = targets_of(config)
    low = config.build(BuildContext(dtype=torch.bfloat16))
    assert low is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low.encode(targets), generator.encode(targets))


def test_amused_has_pixels_from_zero_and_looks_codes_up_itself(tmp_path: Path) -> None:
    from diffusers import VQModel

    numbers = VQConfig.families["VQModel"].tiny
    torch.manual_seed(3)
    model = VQModel(**numbers, lookup_from_codebook=True).eval()
    model.save_pretrained(tmp_path / "vqvae")
    config = VQConfig(pretrained=str(tmp_path), subfolder="vqvae", width=8, height=8, pixel_range=(0.0, 1.0))
    generator: Any = config.build(CONTEXT)
    targets = targets_of(config)
    codes = generator.encode(targets)
    with torch.no_grad():
        unit = (targets + 1) / 2
        assert torch.equal(codes, model.quantize(model.encode(unit).latents)[2][2].reshape(3, -1))
        pixels = model.decode(codes, force_not_quantize=True, shape=(3, 4, 4, 4)).sample.clamp(0, 1)
    found = np.stack([np.asarray(picture) for picture in generator.generate(codes)])
    assert np.array_equal(found, (pixels * 255).round().permute(0, 2, 3, 1).numpy())


def write(folder: Path, **numbers: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(numbers))
    return str(folder)


def test_what_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found a AutoencoderKL, expected one of VQModel"):
        VQConfig(pretrained=write(tmp_path / "kl", _class_name="AutoencoderKL")).codes(OFFLINE)
    with pytest.raises(CheckpointError, match=r"no vqvae/config\.json"):
        VQConfig(pretrained=str(tmp_path), subfolder="vqvae").codes(OFFLINE)
    with pytest.raises(MmllmError, match="not known offline; give `architecture"):
        VQConfig(pretrained="amused/amused-256").codes(OFFLINE)
    vq = write(tmp_path / "vq", _class_name="VQModel", num_vq_embeddings=64, block_out_channels=[8, 8])
    with pytest.raises(CheckpointError, match=r"'num_vq_embeddings': 64.*'num_vq_embeddings': 32"):
        VQConfig(pretrained=vq, architecture={"num_vq_embeddings": 32}).codes(OFFLINE)
    assert VQConfig(pretrained=vq, architecture={"block_out_channels": [8, 8]}).codes(OFFLINE) == Codes(128 * 128, 64)
    with pytest.raises(MmllmError, match="15 x 16 pixels; both must be multiples of 2"):
        VQConfig(pretrained=vq, width=15, height=16).codes(OFFLINE)
    stereo = write(
        tmp_path / "48", architectures=["EncodecModel"], chunk_length_s=1.0, normalize=True, audio_channels=2
    )
    with pytest.raises(CheckpointError, match="choose a mono model"):
        AudioCodecConfig(pretrained=stereo).codes(OFFLINE)
    mono = write(tmp_path / "24", architectures=["EncodecModel"])
    # facebook/encodec_24khz: 75 positions a second, 32 codebooks of 1024.
    assert AudioCodecConfig(pretrained=mono).codes(OFFLINE) == Codes(150, 1024, 2)
    with pytest.raises(MmllmError, match="33 codebooks asked for, it has 32"):
        AudioCodecConfig(pretrained=mono, codebooks=33).codes(OFFLINE)
    typo = {"model": "EncodecModel", "codebook_sise": 5}
    with pytest.raises(ConfigError, match=r"architecture\.codebook_sise: unknown.* did you mean 'codebook_size'"):
        AudioCodecConfig(pretrained="facebook/encodec_24khz", architecture=typo).codes(OFFLINE)
    (tmp_path / "vq" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="cannot load the generator"):
        VQConfig(pretrained=vq).build(CONTEXT)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ({"generator": {"kind": "vq"}, "projector": {"kind": "mlp"}}, r"image\.projector: the backbone itself writes"),
        ({"generator": {"kind": "vq"}, "signal_tokens": 4}, r"image\.signal_tokens: the backbone itself writes"),
        ({"generator": {"kind": "stable_diffusion"}}, r"image\.projector: required, but not given"),
    ],
)
def test_an_output_has_what_its_generator_needs(output: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse({"model": {"backbone": {"kind": "causal_lm"}, "outputs": {"image": output}}})
