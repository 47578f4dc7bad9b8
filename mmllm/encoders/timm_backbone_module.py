"""Backbones of timm (timm's own modules underneath), and the pictures that they read."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.config.base import BuildContext, suggest
from mmllm.encoders.base import Encoder
from mmllm.encoders.pictures import SquarePreprocessor, grid_of, square_transform
from mmllm.encoders.pruning import drop_unused, unused_parameters
from mmllm.encoders.timm_backbone import TimmConfig
from mmllm.errors import CheckpointError, ConfigError, brief
from mmllm.pretrained import find, is_local, load_into, missing, read_json, read_tensors, weight_files

NAME = "timm encoder"
# With these timm and torch refuse arguments and sizes.
REFUSALS = (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class Source:
    """What is to be created: ``name`` without a tag, ``arguments``, timm's description of the weights (``settings``)."""

    name: str
    arguments: dict[str, Any]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """What is known of a backbone before there are weights.

    ``index`` is the level that is read; ``unused`` are the names of parameters that have no part in the features, after
    later levels are gone; ``prefix`` tokens stand before the patches; ``grid`` is that of the patches; ``dim`` their width.
    """

    index: int | None
    unused: frozenset[str]
    prefix: int
    grid: tuple[int, int] | None
    tokens: int
    dim: int


class TimmEncoder(Encoder):
    """timm's backbone without the levels after the selected one."""

    def __init__(self, model: Any, layout: Layout, config: TimmConfig) -> None:
        super().__init__()
        prune(model, layout.index, config)
        drop_unused(model, layout.unused)
        self.model, self.output_dim = model, layout.dim
        self.index, self.prefix, self.select = layout.index, layout.prefix, config.select
        self.whole, self.norm = config.whole, bool(config.norm)

    def train(self, mode: bool = True) -> TimmEncoder:
        """As ``nn.Module.train``, but the backbone underneath stays without noise and with its statistics."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``batch`` from ``SquarePreprocessor.collate``; features (N, S, D) and their mask, all true."""
        pixels = batch["pixels"].to(next(self.model.parameters()).dtype)
        seen, _ = tokens_of(self.model, pixels, None if self.whole else self.index, self.norm, self.prefix > 0)
        parts = {"cls": [seen[:, :1]], "patch": [seen[:, self.prefix :]]}
        features = torch.cat(parts.get(self.select, [*parts["cls"], *parts["patch"]]), dim=1)
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)


def tokens_of(
    model: Any, pixels: Tensor, level: int | None, norm: bool, prefixed: bool
) -> tuple[Tensor, tuple[int, int] | None]:
    """Tokens (N, L, D) of a level, or of None the backbone's own output, and the grid of the patches among them.

    Of a level come those before the patches too where it is ``prefixed``. The grid is None where it does not show.
    """
    prefix = []
    if level is None:
        found: Tensor = model.forward_features(pixels)
        if found.ndim == 3:
            return found, None
        if hasattr(model, "output_fmt") and model.output_fmt == "NHWC":
            found = found.permute(0, 3, 1, 2)
    else:
        extra = {"return_prefix_tokens": True} if prefixed else {}
        (found,) = model.forward_intermediates(pixels, indices=[level], norm=norm, intermediates_only=True, **extra)
        if prefixed:
            found, before = found
            prefix = [before]
    rows, cols = found.shape[2:]
    return torch.cat([*prefix, found.flatten(2).transpose(1, 2)], dim=1), (rows, cols)


def prune(model: Any, index: int | None, config: TimmConfig) -> None:
    """Take the levels behind ``index`` and the head away; without a level the head alone."""
    if index is not None:
        model.prune_intermediate_layers([index], prune_norm=not config.whole and not config.norm, prune_head=True)


def make_preprocessor(config: TimmConfig, context: BuildContext) -> SquarePreprocessor:
    """See ``TimmConfig.preprocessor``."""
    from timm.data import create_transform

    source = read_source(config, context)
    layout = read_layout(config, source)
    given = data_config(config, source)
    size = given["input_size"][1:]
    if config.fit == "checkpoint":
        transform = create_transform(**given, is_training=False)
    else:
        way = "bilinear" if given["interpolation"] == "bilinear" else "bicubic"
        transform = square_transform(config.fit, size, given["mean"], given["std"], way)
    return SquarePreprocessor(transform, layout.tokens, layout.grid if config.select == "patch" else None)


def make_encoder(config: TimmConfig, context: BuildContext) -> TimmEncoder:
    """See ``TimmConfig.build``."""
    source = read_source(config, context)
    layout = read_layout(config, source)
    model = create(source)
    if config.pretrained is not None and context.weights:
        reference = context.resolve(config.pretrained)
        load_into(model, read_tensors(weight_files(reference, config.revision, ["model.safetensors"]), [""]), reference)
    resize(model, config)
    return TimmEncoder(model, layout, config).to(context.dtype).train(False)


def read_source(config: TimmConfig, context: BuildContext) -> Source:
    """The backbone's name and arguments, from the YAML, timm's own table or the checkpoint's ``config.json``.

    A hub is asked only when ``context.weights``. Raises ``ConfigError`` when nothing tells the name or YAML and checkpoint
    contradict each other, ``CheckpointError`` for a folder that is not timm's.
    """
    import timm

    arch, content = config.arch, {}
    if config.pretrained is not None:
        reference = context.resolve(config.pretrained)
        if is_local(reference) and not Path(reference).exists() and (context.weights or arch is None):
            raise missing(Path(reference))
        if Path(reference).is_dir() or (context.weights and not is_local(reference)):
            path = find(reference, config.revision, ["config.json"])
            content = read_json(path) if path is not None else {}
        elif arch is None and reference.startswith("timm/"):
            arch = reference.removeprefix("timm/")
    told = content.get("architecture")
    if told is not None and arch is not None and arch.split(".")[0] != told:
        raise CheckpointError(f"{config.pretrained} is a {told!r}, the YAML says {arch!r}; correct `arch`")
    arch = arch or told
    if arch is None:
        problem = f"unknown for {config.pretrained!r} without reading it; give the name of a timm model"
        raise ConfigError([("arch", problem)], NAME)
    name = arch.split(".")[0]
    if not timm.is_model(name):
        raise ConfigError([("arch", f"timm has no model {name!r}{suggest(name, timm.list_models())}")], NAME)
    settings = content.get("pretrained_cfg")
    if settings is None:
        try:
            registered = timm.get_pretrained_cfg(arch)
        except RuntimeError as error:
            raise ConfigError([("arch", f"timm refuses it: {brief(error)}")], NAME) from error
        settings = registered.to_dict() if registered is not None else {}
    return Source(name, content.get("model_args", {}) | config.arguments, settings)


def create(source: Source) -> Any:
    """timm's model without a classifier, at random values. Raises ``ConfigError`` for arguments that it refuses."""
    import timm

    arguments = source.arguments | {"num_classes": 0} | ({"pretrained_cfg": source.settings} if source.settings else {})
    try:
        return timm.create_model(source.name, pretrained=False, **arguments).eval()
    except REFUSALS as error:
        raise ConfigError([("arguments", f"timm refuses them: {brief(error, 200)}")], NAME) from error


def data_config(config: TimmConfig, source: Source) -> dict[str, Any]:
    """timm's settings of the preprocessing, for squares of ``image_size`` where that is given."""
    from timm.data import resolve_data_config

    wanted = {"input_size": (3, config.image_size, config.image_size)} if config.image_size else {}
    if "img_size" in source.arguments and not wanted:
        sides = source.arguments["img_size"]
        wanted = {"input_size": (3, *((sides, sides) if isinstance(sides, int) else sides))}
    found: dict[str, Any] = resolve_data_config(wanted, pretrained_cfg=source.settings)
    return found


def resize(model: Any, config: TimmConfig) -> None:
    """Interpolate the positions of a transformer for ``image_size``; convolutional networks take any size as they are."""
    if config.image_size is not None and hasattr(model, "set_input_size"):
        model.set_input_size((config.image_size, config.image_size))


# Layouts found before: a network as deep as NFNet-F6 takes seconds, and encoder and each preprocessor ask.
_LAYOUTS: dict[str, Layout] = {}


def read_layout(config: TimmConfig, source: Source) -> Layout:
    """Which of the backbone's parameters the features need, and where the patches are.

    Raises ``ConfigError`` for backbones without feature maps or patch tokens.
    """
    key = repr((config, source))
    if key not in _LAYOUTS:
        _LAYOUTS[key] = _find_layout(config, source)
    return _LAYOUTS[key]


def _find_layout(config: TimmConfig, source: Source) -> Layout:
    """Run the backbone without memory to see."""
    height, width = data_config(config, source)["input_size"][1:]
    with torch.device("meta"):
        model, pixels = create(source), torch.zeros(1, 3, height, width)
        try:
            resize(model, config)
            # Third parties' backbones may have no levels, only an output.
            maps = model.forward_intermediates(pixels, intermediates_only=True) if _has_levels(model) else []
        except REFUSALS as error:
            raise ConfigError(
                [("image_size", f"timm refuses {height} x {width}: {brief(error, 200)}")], NAME
            ) from error
    if not config.whole and -config.select_layer > len(maps):
        expected = f"-{len(maps)} to -1" if maps else "-1, for this model has no levels"
        raise ConfigError([("select_layer", f"found {config.select_layer}, expected {expected}")], NAME)
    index = len(maps) + config.select_layer if maps else None
    has_class = any(name.rpartition(".")[2] == "cls_token" for name, _ in model.named_parameters())
    if config.select != "patch" and not has_class:
        raise ConfigError([("select", "this model has no class token; leave it out")], NAME)
    prefixed = has_class and config.select != "patch"
    if (
        prefixed
        and not config.whole
        and "return_prefix_tokens" not in inspect.signature(model.forward_intermediates).parameters
    ):
        raise ConfigError([("select", "timm gives no class token at the levels of this model; take -1")], NAME)
    prune(model, index, config)
    try:
        with torch.enable_grad():
            seen, grid = tokens_of(model, pixels, None if config.whole else index, bool(config.norm), prefixed)
            unused = unused_parameters(model, seen)
    except REFUSALS as error:
        raise ConfigError(
            [("select_layer", f"the output of {source.name} is no feature map; set norm: false")], NAME
        ) from error
    if grid is None:  # of the output's tokens; it is that of the last level
        grid = tuple(maps[-1].shape[2:]) if maps else grid_of(seen.shape[1], (height, width))
    prefix = seen.shape[1] - grid[0] * grid[1] if grid is not None else 0
    if prefix < 0:
        problem = f"the output of {source.name} is {seen.shape[1]} tokens, not a grid of patches; set norm: false"
        raise ConfigError([("select_layer", problem)], NAME)
    patches = seen.shape[1] - prefix
    counts = {"patch": patches, "cls": 1, "cls_patch": 1 + patches}
    return Layout(index, unused, prefix, grid, counts[config.select], seen.shape[2])


def _has_levels(model: Any) -> bool:
    return hasattr(model, "forward_intermediates") and hasattr(model, "prune_intermediate_layers")


def tiny_name(config: TimmConfig) -> str:
    """timm's test model from the file of the same model; ``test_vit`` where that file has none."""
    import timm
    from timm.models import list_models, model_entrypoint

    name = (config.arch or (config.pretrained or "").rpartition("/")[2]).split(".")[0]
    if not timm.is_model(name):  # a checkpoint that is not here
        return "test_vit"
    module = model_entrypoint(name).__module__
    alike = [test for test in list_models("test_*") if model_entrypoint(test).__module__ == module]
    return alike[0] if alike else "test_vit"
