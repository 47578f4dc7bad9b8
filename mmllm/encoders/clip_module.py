"""The towers of the ``clip`` encoder. Every class runs the reference library's own module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmllm.config.base import BuildContext
from mmllm.encoders.base import Encoder
from mmllm.encoders.clip import ClipConfig, SelectLayer
from mmllm.encoders.clip_preprocess import NativePreprocessor
from mmllm.encoders.clip_spec import TowerSpec, read_spec
from mmllm.encoders.pictures import PicturePreprocessor, SquarePreprocessor, grid_of, square_transform
from mmllm.encoders.vit import interpolate_positions, vit_features
from mmllm.errors import CheckpointError, ConfigError
from mmllm.pretrained import load_into, read_tensors, tensor_names, weight_files

WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")


def make_preprocessor(config: ClipConfig, context: BuildContext) -> PicturePreprocessor:
    """See ``ClipConfig.preprocessor``."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    spec = read_spec(config, context)
    wanted = spec.preprocessing
    if config.fit == "native":
        _check_native(spec)
        patch, extra = spec.vision["patch_size"], int(config.keep_class_token)
        own = (spec.size[0] // patch) * (spec.size[1] // patch)
        most = config.max_patches or own
        return NativePreprocessor(patch, (min(config.min_patches or 1, most), most), extra, wanted.mean, wanted.std)
    if config.fit == "checkpoint":
        transform = image_transform_v2(PreprocessCfg(size=spec.size, **asdict(wanted)), is_train=False)
    else:
        transform = square_transform(config.fit, spec.size, wanted.mean, wanted.std, wanted.interpolation)
    # The tower itself says how many tokens it gives, without weights or memory: no arithmetic to keep in step with it.
    with torch.device("meta"):
        tower = _make_tower(config, spec)
        tokens = tower({"pixels": torch.zeros(1, 3, *spec.size)})[0].shape[1]
    bare = config.select_layer != "pooled" and not config.keep_class_token
    return SquarePreprocessor(transform, tokens, grid_of(tokens, spec.size) if bare else None)


class ClipEncoder(Encoder):
    """Base of the towers below. ``visual`` is the reference library's module up to ``select_layer``."""

    def __init__(self, visual: nn.Module, output_dim: int, keep_class_token: bool) -> None:
        super().__init__()
        self.visual, self.output_dim, self.keep_class_token = visual, output_dim, keep_class_token

    @property
    def dtype(self) -> torch.dtype:
        return next(self.visual.parameters()).dtype

    def train(self, mode: bool = True) -> ClipEncoder:
        """As ``nn.Module.train``, but the running statistics of batch norms never move: none is declared."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    @abstractmethod
    def features(self, batch: dict[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """(N, S, D), or that and its mask (N, S) where pictures differ in length."""

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        found = self.features(batch)
        if isinstance(found, tuple):
            return found
        return found, torch.ones(found.shape[:2], dtype=torch.bool, device=found.device)

    @property
    def has_class_token(self) -> bool:
        return False

    def finish(self) -> None:
        """Drop what was only needed to check a checkpoint against the whole tower. Called once, after ``load``."""

    @abstractmethod
    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy a checkpoint's tensors (``CheckpointError`` where they do not fit)."""


class VitTower(ClipEncoder):
    """open_clip's ``VisionTransformer`` (all of its ViT, CLIPA and CoCa architectures, and transformers' CLIP)."""

    def __init__(self, spec: TowerSpec, select_layer: SelectLayer, keep_class_token: bool, native: bool) -> None:
        total = spec.vision["layers"]
        layers = _block_count(total, select_layer)
        if spec.size[0] % spec.vision["patch_size"] or spec.size[1] % spec.vision["patch_size"]:
            raise _bad_size(spec, spec.vision["patch_size"])
        self.pooled = select_layer == "pooled"
        pooling = {} if self.pooled else {"attentional_pool": False}
        visual = _open_clip_visual(spec, layers=layers, **pooling)
        visual.proj = None
        width = visual.ln_post.normalized_shape[0]
        if not self.pooled:
            visual.ln_post = nn.Identity()
        super().__init__(visual, width, keep_class_token)
        self.total, self.layers = total, layers
        self.native, self.transformers_names = native, spec.transformers_names

    @property
    def has_class_token(self) -> bool:
        return True

    def features(self, batch: dict[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        if self.native:
            seen = vit_features(self.visual, batch["patches"].to(self.dtype), batch["grids"], self.layers)
            if not self.keep_class_token:
                return seen.tokens, seen.mask
            mask = torch.cat([torch.ones_like(seen.mask[:, :1]), seen.mask], dim=1)
            return torch.cat([seen.class_token[:, None], seen.tokens], dim=1), mask
        if self.pooled:
            return _single(self.visual(batch["pixels"].to(self.dtype)))
        found = self.visual.forward_intermediates(  # type: ignore[operator]
            batch["pixels"].to(self.dtype),
            indices=[self.layers - 1],
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        patches: Tensor = found["image_intermediates"][0]
        return torch.cat([found["image_intermediates_prefix"][0], patches], 1) if self.keep_class_token else patches

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        state = _from_transformers_clip(tensors, source) if self.transformers_names else _strip(tensors, "visual.")
        _check_depth(state, "transformer.resblocks.", self.total, source)
        rows, cols = self.visual.grid_size  # type: ignore[misc]
        if "positional_embedding" in state:
            state["positional_embedding"] = interpolate_positions(state["positional_embedding"], int(rows), int(cols))
        load_into(self.visual, state, source)


class ResNetTower(ClipEncoder):
    """open_clip's ``ModifiedResNet``: the feature map of a stage (stem, layer1-4), row by row. No class token."""

    STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")

    def __init__(self, spec: TowerSpec, select_layer: SelectLayer, keep_class_token: bool) -> None:
        if spec.size[0] % 32 or spec.size[1] % 32:
            raise _bad_size(spec, 32)
        visual = _open_clip_visual(spec)
        stages = _block_count(len(self.STAGES), select_layer)
        width = spec.vision["width"]
        output_dim = [width, 4 * width, 8 * width, 16 * width, 32 * width][stages - 1]
        pooled = select_layer == "pooled"
        if not pooled:
            visual.attnpool = nn.Identity()
        for later in self.STAGES[stages:]:
            setattr(visual, later, nn.Identity())
        super().__init__(visual, spec.embed_dim if pooled else output_dim, keep_class_token)
        self.stages, self.pooled = stages, pooled

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        if self.pooled:
            return _single(self.visual(batch["pixels"].to(self.dtype)))
        found = self.visual.forward_intermediates(  # type: ignore[operator]
            batch["pixels"].to(self.dtype), indices=[self.stages - 1], intermediates_only=True
        )
        level: Tensor = found["image_intermediates"][0]
        return level.flatten(2).transpose(1, 2)

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        load_into(self.visual, _strip(tensors, "visual."), source)


class TimmTower(ClipEncoder):
    """A timm trunk in open_clip (EVA-CLIP, SigLIP, PE, MobileCLIP, ViTamin, ConvNeXt, Swin), one block or stage."""

    def __init__(self, spec: TowerSpec, select_layer: SelectLayer, keep_class_token: bool) -> None:
        trunk = _open_clip_visual(spec).trunk
        levels = list(trunk.feature_info)
        index = _block_count(len(levels), select_layer) - 1
        self.pooled = select_layer == "pooled"
        if self.pooled and spec.vision["timm_pool"] in ("abs_attn", "rot_attn"):
            raise ConfigError(
                [("select_layer", "this tower pools within its projection; take a layer")], "clip encoder"
            )
        super().__init__(trunk, trunk.head_hidden_size if self.pooled else levels[index]["num_chs"], keep_class_token)
        self.index = index
        self.resize_to = None if spec.size == _pair(spec.vision["image_size"]) else spec.size

    def finish(self) -> None:
        if self.resize_to is not None and hasattr(self.visual, "set_input_size"):  # ConvNets take any size as they are
            self.visual.set_input_size(self.resize_to)  # type: ignore[operator]
        if self.pooled:
            self.visual.reset_classifier(0)  # type: ignore[operator]  # the projection; the pooling stays
            return
        self.visual.prune_intermediate_layers([self.index], prune_norm=True, prune_head=True)  # type: ignore[operator]

    @property
    def has_class_token(self) -> bool:
        return hasattr(self.visual, "num_prefix_tokens") and bool(self.visual.num_prefix_tokens)

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        if self.pooled:
            return _single(self.visual(batch["pixels"].to(self.dtype)))
        extra = {"return_prefix_tokens": True} if self.keep_class_token else {}
        level = self.visual.forward_intermediates(  # type: ignore[operator]
            batch["pixels"].to(self.dtype), indices=[self.index], intermediates_only=True, **extra
        )[0]
        if not self.keep_class_token:
            flat: Tensor = level.flatten(2).transpose(1, 2)
            return flat
        return torch.cat([level[1], level[0].flatten(2).transpose(1, 2)], dim=1)

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        load_into(self.visual, _strip(tensors, "visual.trunk."), source)


class SiglipTower(ClipEncoder):
    """transformers' ``SiglipVisionModel`` (SigLIP, and SigLIP 2 of fixed size). No class token."""

    def __init__(self, spec: TowerSpec, select_layer: SelectLayer, keep_class_token: bool) -> None:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        total = spec.vision["num_hidden_layers"]
        numbers = spec.vision | {"num_hidden_layers": _block_count(total, select_layer), "image_size": spec.size[0]}
        self.pooled = select_layer == "pooled"
        visual = SiglipVisionModel(SiglipVisionConfig(**numbers, vision_use_head=self.pooled))
        if not self.pooled:
            visual.post_layernorm = nn.Identity()
        super().__init__(visual, spec.vision["hidden_size"], keep_class_token)
        self.total, self.grid = total, spec.size[0] // spec.vision["patch_size"]

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        found = self.visual(pixel_values=batch["pixels"].to(self.dtype))
        features: Tensor = _single(found.pooler_output) if self.pooled else found.last_hidden_state
        return features

    def load(self, tensors: dict[str, Tensor], source: str) -> None:
        state = _strip(tensors, _prefix(tensors, "embeddings.patch_embedding.weight", source))
        _check_depth(state, "encoder.layers.", self.total, source)
        name = "embeddings.position_embedding.weight"
        if name in state:
            state[name] = interpolate_positions(state[name], self.grid, self.grid)
        load_into(self.visual, state, source)


def make_encoder(config: ClipConfig, context: BuildContext) -> ClipEncoder:
    """See ``ClipConfig.build``."""
    spec = read_spec(config, context)
    tensors: dict[str, Tensor] = {}
    if config.pretrained is not None and context.weights:
        files = weight_files(context.resolve(config.pretrained), config.revision, WEIGHT_NAMES)
        names = tensor_names(files)
        visual = [n for n in names if n.startswith("visual.")] or [n for n in names if not n.startswith("text_model.")]
        if not visual:
            raise CheckpointError(f"{config.pretrained} holds no vision tower")
        tensors = read_tensors(files, visual)
    return _make_tower(config, spec, tensors).to(context.dtype)


def _make_tower(config: ClipConfig, spec: TowerSpec, tensors: dict[str, Tensor] | None = None) -> ClipEncoder:
    tower: ClipEncoder
    arguments = (spec, config.select_layer, config.keep_class_token)
    if config.fit == "native":
        _check_native(spec)
    if spec.layout == "siglip":
        tower = SiglipTower(*arguments)
    elif spec.vision["timm_model_name"]:
        tower = TimmTower(*arguments)
    elif isinstance(spec.vision["layers"], int):
        tower = VitTower(*arguments, native=config.fit == "native")
    else:
        tower = ResNetTower(*arguments)
    if tensors:
        tower.load(tensors, str(config.pretrained))
    tower.finish()
    if config.keep_class_token and not tower.has_class_token:
        raise ConfigError([("keep_class_token", "this tower has no class token; leave it out")], "clip encoder")
    return tower.train(False)


def tiny_architecture(config: ClipConfig) -> dict[str, Any]:
    """The part of ``ClipConfig.tiny`` that chooses a small tower of the same class."""
    numbers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    numbers |= {"image_size": 32, "patch_size": 8}
    try:
        spec = read_spec(config, BuildContext(weights=False))
    except (ConfigError, CheckpointError):  # a checkpoint that is not here: the usual class
        return {"architecture": numbers}
    if spec.layout == "siglip":
        return {"architecture": {**numbers, "model_type": "siglip_vision_model"}}
    if spec.transformers_names:
        return {"architecture": numbers}
    if spec.vision["timm_model_name"]:
        return {"vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}}
    if isinstance(spec.vision["layers"], int):
        kept = {k: spec.vision[k] for k in ("ls_init_value", "no_ln_pre", "pos_embed_type", "pool_type", "block_type")}
        small = {"layers": 3, "width": 32, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 8, "image_size": 32}
        return {"vision_cfg": kept | small}
    return {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 64}}


def _open_clip_visual(spec: TowerSpec, **changes: Any) -> Any:
    """open_clip's tower. It comes out of a whole ``CLIP`` (the public way), here with a text tower of one word."""
    from open_clip.model import CLIP

    text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    vision = spec.vision | changes
    if not vision["timm_model_name"]:  # timm trunks are resized after loading
        vision["image_size"] = spec.size
    if isinstance(vision["layers"], list):  # JSON and asdict give lists; ModifiedResNet wants a number for its pooling
        vision["image_size"] = spec.size[0]
    return CLIP(spec.embed_dim, vision, text, quick_gelu=spec.quick_gelu).visual


def _single(pooled: Tensor) -> Tensor:
    """One feature per picture, (N, D), as (N, 1, D); a few poolings give the latter already."""
    return pooled.reshape(len(pooled), 1, -1)


def _block_count(total: int, select_layer: SelectLayer) -> int:
    """How many blocks run. Raises ``ConfigError`` when ``select_layer`` lies before the first."""
    if select_layer == "pooled":
        return total
    count = total + 1 + select_layer
    if count < 1:
        raise ConfigError([("select_layer", f"found {select_layer}, expected -{total} to -1")], "clip encoder")
    return count


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _bad_size(spec: TowerSpec, step: int) -> ConfigError:
    return ConfigError([("image_size", f"found {spec.size}, expected multiples of {step} pixels")], "clip encoder")


def _check_native(spec: TowerSpec) -> None:
    if spec.layout == "siglip" or spec.vision["timm_model_name"] or not isinstance(spec.vision["layers"], int):
        raise ConfigError(
            [("fit", "`native` needs open_clip's VisionTransformer or transformers' CLIP; use `pad` for this tower")],
            "clip encoder",
        )


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Names without ``prefix``; a file that holds the tower alone has none."""
    stripped = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return stripped or dict(tensors)


def _prefix(tensors: dict[str, Tensor], ending: str, source: str) -> str:
    found = next((name for name in tensors if name.endswith(ending)), None)
    if found is None:
        raise CheckpointError(f"{source} has no tensor {ending}; expected a transformers CLIP or SigLIP vision tower")
    return found.removesuffix(ending)


def _check_depth(state: dict[str, Tensor], blocks: str, total: int, source: str) -> None:
    """``select_layer`` counts from the end, so the checkpoint must be exactly as deep as its description."""
    found = {int(name.removeprefix(blocks).split(".")[0]) for name in state if name.startswith(blocks)}
    if len(found) != total:
        raise CheckpointError(f"{source} has {len(found)} blocks, expected {total}; correct the architecture's numbers")


def _from_transformers_clip(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename transformers' CLIP vision tensors to open_clip's; query, key and value are one matrix there."""
    prefix = _prefix(tensors, "embeddings.patch_embedding.weight", source)
    state = _strip(tensors, prefix)
    top = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm.weight": "ln_pre.weight",
        "pre_layrnorm.bias": "ln_pre.bias",
        "post_layernorm.weight": "ln_post.weight",
        "post_layernorm.bias": "ln_post.bias",
    }
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    parts["self_attn.out_proj"] = "attn.out_proj"
    renamed = {new: state[old] for old, new in top.items() if old in state}
    for name, value in state.items():
        if not name.startswith("encoder.layers."):
            continue
        index, rest = name.removeprefix("encoder.layers.").split(".", 1)
        part, kind = rest.rsplit(".", 1)
        block = f"transformer.resblocks.{index}."
        if part in parts:
            renamed[f"{block}{parts[part]}.{kind}"] = value
        elif part == "self_attn.q_proj":
            names = [name.replace("q_proj", other) for other in ("q_proj", "k_proj", "v_proj")]
            renamed[f"{block}attn.in_proj_{kind}"] = torch.cat([state[n] for n in names if n in state])
    return renamed
