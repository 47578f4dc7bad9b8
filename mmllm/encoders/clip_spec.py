"""What a CLIP-style tower is made of and how its pictures are prepared, read from a config or a checkpoint's JSON.

There are two descriptions, open_clip's ``vision_cfg`` and transformers' ``vision_config``; both become a ``TowerSpec``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from mmllm.config.base import BuildContext
from mmllm.encoders.clip import ClipArchitecture, ClipConfig
from mmllm.errors import CheckpointError, ConfigError
from mmllm.pretrained import find, is_local, read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of every channel, from the code of CLIP (arXiv 2103.00020)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and deviation

# Numbers of often used transformers checkpoints, so that a plan knows their shapes without a file.
_B = ClipArchitecture()
_L = _B.model_copy(update={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24})
_L = _L.model_copy(update={"num_attention_heads": 16, "patch_size": 14})
_SB = ClipArchitecture(model_type="siglip_vision_model", patch_size=16)
_SO = _SB.model_copy(update={"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27})
_SO = _SO.model_copy(update={"num_attention_heads": 16, "patch_size": 14})
KNOWN = {
    "openai/clip-vit-base-patch32": _B,
    "openai/clip-vit-base-patch16": _B.model_copy(update={"patch_size": 16}),
    "openai/clip-vit-large-patch14": _L,
    "openai/clip-vit-large-patch14-336": _L.model_copy(update={"image_size": 336}),
    "google/siglip-base-patch16-224": _SB,
    "google/siglip-base-patch16-384": _SB.model_copy(update={"image_size": 384}),
    "google/siglip-so400m-patch14-224": _SO,
    "google/siglip-so400m-patch14-384": _SO.model_copy(update={"image_size": 384}),
    "google/siglip2-base-patch16-224": _SB,
    "google/siglip2-so400m-patch14-384": _SO.model_copy(update={"image_size": 384}),
}


@dataclass(frozen=True)
class Preprocessing:
    """Normalisation (per channel, values in 0-1) and how a picture becomes the square; names as in open_clip."""

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int | tuple[int, ...] = 0


@dataclass(frozen=True)
class TowerSpec:
    """``layout`` names the reference class: open_clip's ``CLIP.visual`` (arguments ``vision``) or transformers' Siglip.

    ``size`` is (height, width) in pixels. ``transformers_names`` tells that the weights carry transformers' CLIP names.
    ``embed_dim`` is the width of CLIP's shared space, in which a few towers' own pooling ends.
    """

    layout: Literal["open_clip", "siglip"]
    vision: dict[str, Any]
    size: tuple[int, int]
    quick_gelu: bool = False
    transformers_names: bool = False
    embed_dim: int = 64
    preprocessing: Preprocessing = field(default_factory=Preprocessing)


def read_spec(config: ClipConfig, context: BuildContext) -> TowerSpec:
    """The spec of ``config``. JSON beside local weights is read; a hub is asked only when ``context.weights``.

    Raises ``ConfigError`` when nothing describes the architecture and ``CheckpointError`` when the YAML and the
    checkpoint disagree.
    """
    declared = _declared(config)
    found = None
    if config.pretrained is not None:
        reference = context.resolve(config.pretrained)
        readable = not reference.endswith(".safetensors") and (is_local(reference) or context.weights)
        if readable and (declared is None or context.weights):
            found = _read_folder(reference, config)
        elif declared is None and config.pretrained in KNOWN:
            found = from_transformers(KNOWN[config.pretrained])
    if declared is not None and found is not None:
        _compare(config, declared, found)
    spec = found or declared
    if spec is None:
        raise ConfigError(
            [("architecture", f"unknown for {config.pretrained!r} without reading it; give `arch` or `architecture`")],
            "clip encoder",
        )
    return replace(spec, size=(config.image_size, config.image_size)) if config.image_size else spec


def _declared(config: ClipConfig) -> TowerSpec | None:
    if config.architecture is not None:
        return from_transformers(config.architecture)
    if config.vision_cfg is not None:
        return from_open_clip({"vision_cfg": config.vision_cfg}, {}, "vision_cfg")
    if config.arch is not None:
        import open_clip

        siglip = "SigLIP" in config.arch or "siglip" in config.arch
        preprocess = {"mean": HALF, "std": HALF, "resize_mode": "squash"} if siglip else {}
        return from_open_clip(open_clip.get_model_config(config.arch), preprocess, config.arch)
    return None


def _read_folder(reference: str, config: ClipConfig) -> TowerSpec | None:
    """The JSON of a checkpoint; None for a folder of bare weights whose architecture the YAML declares."""
    path = find(reference, config.revision, ["open_clip_config.json"])
    if path is not None:
        content = read_json(path)
        if "model_cfg" not in content:
            raise CheckpointError(f"{path} has no `model_cfg`; expected open_clip's own layout")
        return from_open_clip(content["model_cfg"], content.get("preprocess_cfg", {}), str(path))
    path = find(reference, config.revision, ["config.json"])
    if path is None:
        if config.arch or config.vision_cfg or config.architecture:
            return None
        raise CheckpointError(f"found neither open_clip_config.json nor config.json in {reference}; give `arch`")
    content = read_json(path)
    vision = content.get("vision_config", content)
    model_type = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(
        content.get("model_type", ""), content.get("model_type")
    )
    fields = {k: v for k, v in vision.items() if k in ClipArchitecture.model_fields and k != "model_type"}
    if model_type == "siglip_vision_model":  # what a file leaves out has SigLIP's defaults, not CLIP's
        fields = {"patch_size": 16} | fields
    try:
        spec = from_transformers(ClipArchitecture.model_validate({"model_type": model_type, **fields}))
    except ValueError as error:
        raise CheckpointError(
            f"{path} describes {content.get('model_type')!r}, expected a CLIP or SigLIP of fixed size: {error}"
        ) from error
    processor = find(reference, config.revision, ["preprocessor_config.json"])
    if processor is None:
        return spec
    preprocessing = _read_processor(read_json(processor), spec)
    if preprocessing is None and config.fit == "checkpoint":
        raise CheckpointError(f"{processor} resizes to another size than it crops; set `fit` to crop, pad or squash")
    return replace(spec, preprocessing=preprocessing or spec.preprocessing)


def from_open_clip(model_cfg: dict[str, Any], preprocess: dict[str, Any], source: str) -> TowerSpec:
    """A spec from open_clip's ``model_cfg`` and ``preprocess_cfg``. Raises ``CheckpointError`` on unknown keys."""
    from open_clip.model import CLIPVisionCfg

    try:
        vision = CLIPVisionCfg(**model_cfg["vision_cfg"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: no open_clip vision_cfg ({error})") from error
    # What only concerns training is not wanted here.
    vision = replace(vision, patch_dropout=0.0, output_tokens=False, timm_model_pretrained=False)
    size = vision.image_size
    keys = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    known = {k: preprocess[k] for k in keys if preprocess.get(k) is not None}
    known |= {k: tuple(known[k]) for k in ("mean", "std") if k in known}
    return TowerSpec(
        "open_clip",
        asdict(vision),
        (size, size) if isinstance(size, int) else (size[0], size[1]),
        bool(model_cfg.get("quick_gelu", False)),
        embed_dim=model_cfg.get("embed_dim", 64),
        preprocessing=Preprocessing(**known),
    )


def from_transformers(numbers: ClipArchitecture) -> TowerSpec:
    """A spec from transformers' numbers: CLIP becomes open_clip's VisionTransformer, SigLIP stays as it is."""
    size = (numbers.image_size, numbers.image_size)
    heads = numbers.num_attention_heads
    if numbers.hidden_size % heads:
        problem = f"found {heads}, expected a divisor of hidden_size {numbers.hidden_size}"
        raise ConfigError([("architecture.num_attention_heads", problem)], "clip encoder")
    if numbers.model_type == "siglip_vision_model":
        vision = numbers.model_dump(exclude={"model_type"})
        vision["hidden_act"] = numbers.hidden_act or "gelu_pytorch_tanh"
        vision["layer_norm_eps"] = numbers.layer_norm_eps or 1e-6
        return TowerSpec("siglip", vision, size, preprocessing=Preprocessing(HALF, HALF, resize_mode="squash"))
    tanh = {"approximate": "tanh"} if numbers.hidden_act in ("gelu_pytorch_tanh", "gelu_new") else None
    model_cfg = {
        "quick_gelu": numbers.hidden_act in (None, "quick_gelu"),
        "vision_cfg": {
            "width": numbers.hidden_size,
            "layers": numbers.num_hidden_layers,
            "head_width": numbers.hidden_size // heads,
            # open_clip computes int(width * ratio); the half keeps rounding from losing the last unit
            "mlp_ratio": (numbers.intermediate_size + 0.5) / numbers.hidden_size,
            "patch_size": numbers.patch_size,
            "image_size": numbers.image_size,
            "norm_kwargs": {"eps": numbers.layer_norm_eps or 1e-5},
            "act_kwargs": tanh,
        },
    }
    return replace(from_open_clip(model_cfg, {}, "architecture"), transformers_names=True)


def _read_processor(content: dict[str, Any], spec: TowerSpec) -> Preprocessing | None:
    """transformers' ``preprocessor_config.json``; None for one that open_clip's three ways of resizing cannot follow."""
    size = content.get("size", {})
    shortest = size if isinstance(size, int) else size.get("shortest_edge")
    crop = content.get("crop_size", shortest)
    crop = crop["height"] if isinstance(crop, dict) else crop
    if shortest is not None and content.get("do_center_crop", True) and shortest != crop:
        return None
    interpolation: Literal["bicubic", "bilinear"] = "bilinear" if content.get("resample", 3) == 2 else "bicubic"
    mean = tuple(content.get("image_mean", spec.preprocessing.mean))
    std = tuple(content.get("image_std", spec.preprocessing.std))
    return Preprocessing(mean, std, interpolation, "squash" if shortest is None else "shortest")


def _compare(config: ClipConfig, declared: TowerSpec, found: TowerSpec) -> None:
    """Numbers written in the YAML must be the checkpoint's."""
    if declared.layout != found.layout or declared.transformers_names != found.transformers_names:
        kind = "transformers' SigLIP" if found.layout == "siglip" else "CLIP"
        names = "transformers" if found.transformers_names or found.layout == "siglip" else "open_clip"
        raise CheckpointError(f"{config.pretrained} is a {kind} in {names} layout, the YAML describes another tower")
    # These concern dropout and the projection, which are not built, and a pooled output that is not asked for.
    free = {"timm_drop", "timm_drop_path", "timm_proj", "timm_proj_bias"}
    if config.select_layer != "pooled":
        free |= {"timm_pool", "pool_type", "final_ln_after_pool", "attentional_pool"}
    differences = [
        f"{key}: {declared.vision[key]!r} in the YAML, {found.vision[key]!r} in the checkpoint"
        for key in found.vision
        if key not in free and declared.vision[key] != found.vision[key]
    ]
    if declared.quick_gelu != found.quick_gelu:
        differences.append(f"quick_gelu: {declared.quick_gelu} in the YAML, {found.quick_gelu} in the checkpoint")
    if differences:
        raise CheckpointError(f"{config.pretrained} is not the declared architecture; {'; '.join(differences)}")
