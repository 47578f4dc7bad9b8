"""The clip encoder: every open_clip architecture on the meta device, ways of fitting a picture, and its refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from mmllm.config.base import BuildContext
from mmllm.encoders import clip_module
from mmllm.encoders.clip import ClipConfig, known_architectures
from mmllm.encoders.clip_module import ClipEncoder
from mmllm.encoders.clip_spec import TowerSpec, read_spec
from mmllm.errors import CheckpointError, ConfigError

VIT = {"layers": 3, "width": 32, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 8, "image_size": 32}
NO_WEIGHTS = BuildContext(weights=False)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_checkpoint(folder: Path, vision: dict[str, Any] = VIT, *, seed: int = 0) -> ClipEncoder:
    """An open_clip folder with random ``visual.*`` weights of ``vision``, all its blocks."""
    import open_clip

    torch.manual_seed(seed)
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(16, vision, text)
    folder.mkdir(exist_ok=True)
    content = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return ClipConfig(pretrained=f"./{folder.name}").build(BuildContext(root=folder.parent))


def test_every_open_clip_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each builds on the meta device, without a download, and gives ``output_dim`` features as many as its stride says.

    No architecture is an exception. Equal towers (CLIP models that differ in their text side) are run once, and
    transformers only up to an early block: each block has the same shape.
    """
    import open_clip

    built: dict[str, tuple[ClipEncoder, int, int]] = {}
    make_tower = clip_module._make_tower

    def once(config: ClipConfig, spec: TowerSpec) -> ClipEncoder:
        key = json.dumps([spec.vision, spec.size], sort_keys=True)
        if key not in built:
            tower = make_tower(config, spec)
            with torch.device("meta"):
                features, mask = tower({"pixels": torch.zeros(1, 3, *spec.size)})
            assert features.shape[2] == tower.output_dim, config.arch
            assert mask.shape == features.shape[:2]
            if spec.vision["timm_model_name"]:
                stride = tower.visual.feature_info[config.select_layer]["reduction"]  # type: ignore[index]
            else:
                stride = spec.vision["patch_size"] if isinstance(spec.vision["layers"], int) else 16
            built[key] = (tower, features.shape[1], (spec.size[0] // stride) * (spec.size[1] // stride))
        return built[key][0]

    monkeypatch.setattr(clip_module, "_make_tower", once)
    names = open_clip.list_models()
    assert len(names) > 140
    assert set(names) <= set(known_architectures())
    for name in names:
        staged = name.startswith(("RN", "convnext", "swin", "MobileCLIP-S", "MobileCLIP2-S"))
        config = ClipConfig(arch=name, select_layer=-2 if staged else -12)
        preprocess = config.preprocessor(NO_WEIGHTS)
        key = json.dumps([(spec := read_spec(config, NO_WEIGHTS)).vision, spec.size], sort_keys=True)
        _, tokens, expected = built[key]
        assert preprocess.num_tokens({}) == tokens == expected, name
    assert len(built) > 80


def test_an_unknown_architecture_is_suggested() -> None:
    with pytest.raises(ValidationError, match="did you mean 'ViT-L-14-336'"):
        ClipConfig(arch="ViT-L-14-366")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give `pretrained`, or `arch`"),
        ({"arch": "ViT-B-32", "vision_cfg": VIT}, "found arch and vision_cfg, expected one of them"),
        ({"arch": "ViT-B-32", "max_patches": 9}, "`max_patches` goes with `fit: native`"),
        ({"arch": "ViT-B-32", "min_patches": 9}, "`min_patches` goes with `fit: native`"),
        ({"arch": "ViT-B-32", "fit": "native", "min_patches": 9, "max_patches": 4}, "beyond `max_patches: 4`"),
        ({"arch": "ViT-B-32", "fit": "native", "image_size": 64}, "give `max_patches` instead"),
        ({"arch": "ViT-B-32", "select_layer": 0}, "less than or equal to -1"),
        ({"arch": "ViT-B-32", "select_layer": "pooled", "fit": "native"}, "leave out `fit: native`"),
        ({"arch": "ViT-B-32", "select_layer": "pooled", "keep_class_token": True}, "leave out `keep_class_token`"),
    ],
)
def test_contradictions_in_the_config(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ClipConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "ViT-B-32", "select_layer": -13}, r"select_layer: found -13, expected -12 to -1"),
        ({"arch": "RN50", "keep_class_token": True}, "keep_class_token: this tower has no class token"),
        ({"arch": "ViT-B-16-SigLIP", "keep_class_token": True}, "keep_class_token: this tower has no class token"),
        ({"arch": "RN50", "fit": "native"}, "fit: `native` needs"),
        ({"arch": "EVA02-B-16", "fit": "native"}, "fit: `native` needs"),
        ({"arch": "ViT-B-32", "image_size": 100}, "expected multiples of 32"),
        ({"pretrained": "someone/unknown-clip"}, "architecture: unknown for 'someone/unknown-clip' without reading it"),
    ],
)
def test_contradictions_with_the_tower(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        ClipConfig(**options).build(NO_WEIGHTS)


def test_a_config_imports_no_torch() -> None:
    code = "import sys; from mmllm.encoders.clip import ClipConfig; ClipConfig(arch='ViT-B-32'); "
    code += "from mmllm.encoders.whisper import WhisperConfig; WhisperConfig(arch='tiny'); "
    code += "sys.exit(bool({'torch', 'open_clip', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_later_blocks_are_neither_run_nor_kept() -> None:
    config = ClipConfig(vision_cfg=VIT, select_layer=-3)
    visual = config.build(NO_WEIGHTS).visual
    assert len(visual.transformer.resblocks) == 1
    assert not [name for name, _ in visual.named_parameters() if name.startswith(("ln_post", "proj"))]
    trunk = ClipConfig(arch="ViT-B-16-SigLIP", select_layer=-10)
    with torch.device("meta"):
        assert len(trunk.build(NO_WEIGHTS).visual.blocks) == 3
    stages = ClipConfig(vision_cfg={"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}, select_layer=-3)
    assert not list(stages.build(NO_WEIGHTS).visual.layer3.parameters())


def test_fits() -> None:
    """A picture twice as wide as high, its left half black and its right half white, in each square."""
    wide = Image.new("RGB", (128, 64), "white")
    wide.paste("black", (0, 0, 64, 64))
    seen = {}
    for fit in ("crop", "pad", "squash"):
        config = ClipConfig(vision_cfg=VIT, fit=fit)
        pixels = config.preprocessor(NO_WEIGHTS)(wide)["pixels"]
        assert pixels.shape == (3, 32, 32)
        seen[fit] = pixels
    black, white = seen["crop"][:, 16, 0], seen["crop"][:, 16, -1]
    for fit in seen:
        assert torch.allclose(seen[fit][:, 16, 0], black, atol=1e-5)
        assert torch.allclose(seen[fit][:, 16, -1], white, atol=1e-5)
    assert seen["pad"][:, 2].abs().max() < 0.01  # the mean colour is 0 after normalisation, up to a grey level
    assert not torch.equal(seen["crop"], seen["squash"])


def test_native_keeps_the_aspect_ratio() -> None:
    config = ClipConfig(vision_cfg=VIT, fit="native", max_patches=50)
    preprocess = config.preprocessor(NO_WEIGHTS)
    items = [preprocess(picture(*size)) for size in ((400, 100), (100, 400), (8, 8), (2000, 10))]
    assert [item["grid"].tolist() for item in items] == [[4, 12], [12, 4], [1, 1], [1, 50]]
    assert [preprocess.num_tokens(item) for item in items] == [48, 48, 1, 50]
    encoder = config.build(NO_WEIGHTS)
    features, mask = encoder(preprocess.collate(items))
    assert features.shape == (4, 50, 32)
    assert mask.sum(1).tolist() == [48, 48, 1, 50]
    assert not features[~mask].any()


def test_another_image_size_interpolates_positions(tmp_path: Path) -> None:
    """Twice the square: four times the patches; position embeddings keep their picture, corners stay corners."""
    write_checkpoint(tmp_path / "clip")
    context = BuildContext(root=tmp_path)
    small = ClipConfig(pretrained="./clip").build(context).visual.positional_embedding
    config = ClipConfig(pretrained="./clip", image_size=64)
    large = config.build(context).visual.positional_embedding
    assert large.shape == (1 + 64, 32)
    assert torch.equal(large[0], small[0])
    pooled = large[1:].reshape(4, 2, 4, 2, 32).mean(dim=(1, 3)).flatten(0, 1)
    correlation = torch.corrcoef(torch.stack([pooled.flatten(), small[1:].flatten()]))[0, 1]
    assert correlation > 0.8
    preprocess = config.preprocessor(context)
    assert preprocess.num_tokens(preprocess(picture(50, 30))) == 64


@pytest.mark.parametrize("arch", ["ViT-B-16-SigLIP-256", "EVA02-B-16", "convnext_tiny", "RN50"])
def test_image_size_on_other_towers(arch: str) -> None:
    config = ClipConfig(arch=arch, image_size=320)
    with torch.device("meta"):
        features, _ = config.build(NO_WEIGHTS)({"pixels": torch.zeros(1, 3, 320, 320)})
    assert features.shape[1] == 400
    assert config.preprocessor(NO_WEIGHTS).num_tokens({}) == 400


def test_batch_norm_statistics_do_not_move() -> None:
    config = ClipConfig(vision_cfg={"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}, select_layer=-1)
    encoder = config.build(NO_WEIGHTS).train()
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    encoder({"pixels": torch.randn(2, 3, 64, 64)})
    assert before
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())


# Checkpoints that do not fit ------------------------------------------------------------------------------------------
def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found no folder .*/nowhere; expected a checkpoint there"):
        ClipConfig(pretrained="./nowhere").build(BuildContext(root=tmp_path))


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "model.pt"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").rename(tmp_path / "clip" / name)
    with pytest.raises(CheckpointError, match=f"{name} is a pickle, which can run code when it is read: only .safeten"):
        ClipConfig(pretrained="./clip").build(BuildContext(root=tmp_path))
    with pytest.raises(CheckpointError, match="is a pickle"):
        ClipConfig(pretrained=f"./clip/{name}", vision_cfg=VIT).build(BuildContext(root=tmp_path))


def test_a_safetensors_file_with_its_architecture(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path / "clip")
    path = "./clip/open_clip_model.safetensors"
    found = ClipConfig(pretrained=path, vision_cfg=VIT).build(BuildContext(root=tmp_path))
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())
    with pytest.raises(ConfigError, match="give `arch` or `architecture`"):
        ClipConfig(pretrained=path).build(BuildContext(root=tmp_path))


def test_declared_numbers_are_checked(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "clip")
    config = ClipConfig(pretrained="./clip", vision_cfg={**VIT, "head_width": 8})
    with pytest.raises(CheckpointError, match="head_width: 8 in the YAML, 16 in the checkpoint"):
        config.build(BuildContext(root=tmp_path))
    assert config.build(NO_WEIGHTS).output_dim == 32  # a plan asks no checkpoint


def test_weights_that_do_not_fit_their_description(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "clip")
    path = tmp_path / "clip" / "open_clip_config.json"
    content = json.loads(path.read_text())
    for change, message in (
        ({"layers": 4}, "has 3 blocks, expected 4"),
        ({"mlp_ratio": 3.0}, r"mlp\.c_fc\.weight is \(64, 32\), expected \(96, 32\)"),
        ({"nonsense": 1}, "no open_clip vision_cfg .*nonsense"),
    ):
        changed = {**content["model_cfg"], "vision_cfg": {**VIT, **change}}
        path.write_text(json.dumps({"model_cfg": changed}))
        with pytest.raises(CheckpointError, match=message):
            ClipConfig(pretrained="./clip").build(BuildContext(root=tmp_path))


def test_a_truncated_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "clip")
    path = tmp_path / "clip" / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cannot read .*open_clip_model\.safetensors as safetensors"):
        ClipConfig(pretrained="./clip").build(BuildContext(root=tmp_path))


def test_a_sharded_transformers_checkpoint(tmp_path: Path) -> None:
    import transformers

    numbers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**numbers, image_size=32, patch_size=8))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = (ClipConfig(pretrained=f"./{n}").build(BuildContext(root=tmp_path)) for n in ("one", "many"))
    assert all(torch.equal(value, many.state_dict()[name]) for name, value in one.state_dict().items())


def test_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2", "vision_config": {"hidden_size": 8}}))
    with pytest.raises(CheckpointError, match="describes 'siglip2', expected a CLIP or SigLIP of fixed size"):
        ClipConfig(pretrained=str(tmp_path)).build(BuildContext())


def test_a_hub_id_offline_says_what_to_do() -> None:
    with pytest.raises(CheckpointError, match=r"cannot reach the hub for someone/clip/open_clip_config\.json"):
        ClipConfig(pretrained="someone/clip").build(BuildContext())
