"""Vision transformers (transformers' own modules underneath), and what their image processors make of pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from mmllm.config.architecture import check_declared, field_names, make_numbers
from mmllm.config.base import BuildContext, suggest
from mmllm.encoders.base import Encoder
from mmllm.encoders.pictures import PicturePreprocessor, SquarePreprocessor, square_transform
from mmllm.encoders.pruning import drop_unused, unused_parameters
from mmllm.encoders.vision_transformer import KNOWN, KNOWN_SIZES, Numbers, VitConfig
from mmllm.errors import CheckpointError, ConfigError, brief
from mmllm.pretrained import find, is_local, missing, weight_files

NAME = "vit encoder"
# With these transformers and torch refuse numbers that do not fit together.
REFUSALS = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, ImportError, RuntimeError)


class ProcessedPicture:
    """A picture as transformers' image processor prepares it: the tensors of its output, without the batch axis."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def tensors(self, picture: Image.Image) -> dict[str, Tensor]:
        found = self.processor(images=picture.convert("RGB"), return_tensors="pt")
        return {name: value[0] for name, value in found.items() if isinstance(value, Tensor)}

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.tensors(picture)["pixel_values"]


class FlexiblePreprocessor(PicturePreprocessor):
    """NaFlex: ``patches`` (L, 3*p*p), zeros behind the real ones, ``mask`` (L,) bool, ``shape`` (2,) rows and cols."""

    def __init__(self, transform: ProcessedPicture) -> None:
        super().__init__()
        self.transform = transform

    def __call__(self, media: Image.Image) -> dict[str, Tensor]:
        found = self.transform.tensors(media)
        mask, shape = found["pixel_attention_mask"].bool(), found["spatial_shapes"]
        return {"patches": found["pixel_values"], "mask": mask, "shape": shape}

    def num_tokens(self, item: dict[str, Tensor]) -> int:
        return int(item["mask"].sum())

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def grid(self, item: dict[str, Tensor]) -> tuple[int, ...] | None:
        return int(item["shape"][0]), int(item["shape"][1])


@dataclass(frozen=True)
class Shell:
    """What is known of a model before there are weights.

    ``numbers`` is transformers' config with as many blocks as run; ``unused`` are the names of parameters that have no part
    in the features; ``options`` go to every forward; ``prefix`` tokens stand before the patches; ``grid`` is that of the
    patches (None for NaFlex, where every picture has its own).
    """

    numbers: Any
    unused: frozenset[str]
    options: dict[str, bool]
    prefix: int
    grid: tuple[int, int] | None


class VitEncoder(Encoder):
    """transformers' model without the blocks after the selected one."""

    def __init__(self, model: Any, shell: Shell, select: str) -> None:
        super().__init__()
        drop_unused(model, shell.unused)
        self.model, self.output_dim = model, int(shell.numbers.hidden_size)
        self.options, self.prefix, self.select, self.flexible = shell.options, shell.prefix, select, shell.grid is None

    def train(self, mode: bool = True) -> VitEncoder:
        """As ``nn.Module.train``, but the model underneath stays without the noise of its pretraining."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``batch`` from the preprocessor's ``collate``; features (N, S, D), zero on the padding, and their mask."""
        if self.flexible:
            mask = batch["mask"]
            inputs = {"pixel_attention_mask": mask.long(), "spatial_shapes": batch["shape"]}
            patches = self.model(pixel_values=batch["patches"].to(self.model.dtype), **inputs).last_hidden_state
            return patches.masked_fill(~mask[..., None], 0), mask
        seen: Tensor = self.model(pixel_values=batch["pixels"].to(self.model.dtype), **self.options).last_hidden_state
        parts = {"cls": [seen[:, :1]], "patch": [seen[:, self.prefix :]]}
        features = torch.cat(parts.get(self.select, [*parts["cls"], *parts["patch"]]), dim=1)
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)


def make_preprocessor(config: VitConfig, context: BuildContext) -> PicturePreprocessor:
    """See ``VitConfig.preprocessor``."""
    numbers = read_numbers(config, context)
    transform, size = _transform(config, context, numbers)
    if size is None:
        return FlexiblePreprocessor(cast(ProcessedPicture, transform))
    shell = read_shell(config, numbers, size)
    assert shell.grid is not None
    patches, tokens = shell.grid[0] * shell.grid[1], {"cls": 1}
    tokens |= {"patch": patches, "cls_patch": 1 + patches}
    return SquarePreprocessor(transform, tokens[config.select], shell.grid if config.select == "patch" else None)


def make_encoder(config: VitConfig, context: BuildContext) -> VitEncoder:
    """See ``VitConfig.build``."""
    from transformers import AutoModel

    numbers = read_numbers(config, context)
    shell = read_shell(config, numbers, _transform(config, context, numbers)[1])
    if config.pretrained is None or not context.weights:
        model = AutoModel.from_config(shell.numbers, dtype=context.dtype or torch.float32)
    else:
        model = load_model(config, context, shell.numbers, shell.unused)
    return VitEncoder(model, shell, config.select).to(context.dtype).train(False)


class Described(Protocol):
    """A config that names a transformers model."""

    @property
    def architecture(self) -> Numbers | None: ...
    @property
    def pretrained(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...


def load_model(config: Described, context: BuildContext, numbers: Any, unused: frozenset[str]) -> Any:
    """transformers' model of ``numbers`` from ``config.pretrained``, which may lack the parameters ``unused``.

    Raises ``CheckpointError``.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    pretrained = str(config.pretrained)
    reference = context.resolve(pretrained)
    if is_local(reference):
        weight_files(
            reference, config.revision, ["model.safetensors"]
        )  # says so where there are none, or pickles alone
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # blocks and heads that are left out would be told as a mistake
    try:
        model, report = AutoModel.from_pretrained(
            reference,
            config=numbers,
            revision=config.revision,
            dtype=context.dtype or torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read the weights of {pretrained}: {brief(error)}") from error
    except (SafetensorError, *REFUSALS) as error:
        raise CheckpointError(f"{pretrained} does not fit its config: {brief(error)}") from error
    finally:
        logging.set_verbosity(level)
    absent = sorted(set(report["missing_keys"]) - unused)
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise CheckpointError(f"{pretrained} does not fit the architecture: no {', '.join(absent[:3])}{more}")
    return model


def config_class(model_type: Any) -> Any:
    """transformers' config class of a family of vision transformers. Raises ``ConfigError`` for any other."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES as FAMILIES

    if model_type not in FAMILIES:
        found = "required, but not given" if model_type is None else f"transformers has no model {model_type!r}"
        near = suggest(str(model_type), FAMILIES) or "; for example vit, dinov2 or siglip_vision_model"
        raise ConfigError([("architecture.model_type", found + near)], NAME)
    cls = CONFIG_MAPPING[model_type]
    if not {"num_hidden_layers", "patch_size", "hidden_size"} <= field_names(cls):
        problem = f"{model_type!r} is no vision transformer of equal blocks; use the encoder `timm` for others"
        raise ConfigError([("architecture.model_type", problem)], NAME)
    return cls


def taken_names(architecture: Mapping[str, Any]) -> set[str]:
    """The names that the family of ``architecture`` takes."""
    return field_names(config_class(architecture.get("model_type")))


def read_numbers(config: Described, context: BuildContext, known: Mapping[str, Numbers] = KNOWN) -> Any:
    """transformers' config, from the checkpoint, the YAML or ``known``. A hub is asked only when ``context.weights``.

    Raises ``ConfigError`` when nothing tells it or YAML and checkpoint contradict each other, ``CheckpointError``.
    """
    declared = config.architecture
    if config.pretrained is not None:
        reference = context.resolve(config.pretrained)
        if is_local(reference) and not Path(reference).exists() and (context.weights or declared is None):
            raise missing(Path(reference))
        if context.weights or Path(reference).is_dir():
            found = _read_config(reference, config.revision)
            config_class(found.model_type)
            check_declared(declared or {}, found, config.pretrained)
            return found
        declared = declared or known.get(config.pretrained)
    if declared is None:
        problem = f"unknown for {config.pretrained!r} without reading it; give `architecture`"
        raise ConfigError([("architecture", problem)], NAME)
    cls = config_class(declared.get("model_type"))
    return make_numbers(cls, {name: value for name, value in declared.items() if name != "model_type"})


def _read_config(reference: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(reference, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read the config of {reference}: {brief(error)}") from error
    return found.vision_config if "vision_config" in found.sub_configs else found


def read_shell(config: VitConfig, numbers: Any, size: tuple[int, int] | None) -> Shell:
    """Run the model without memory and see which of its parameters the features need, and where the patches are.

    ``size`` is (height, width) of the pictures; None for NaFlex. Raises ``ConfigError`` for models without patch tokens.
    """
    from transformers import AutoModel

    total = numbers.num_hidden_layers
    blocks = total + 1 + config.select_layer
    if blocks < 1:
        raise ConfigError([("select_layer", f"found {config.select_layer}, expected -{total} to -1")], NAME)
    numbers.num_hidden_layers = blocks
    one = deepcopy(numbers)  # blocks are alike, so one tells what stands around them
    # The last of `hidden_states` is the last block's own output then, in every family.
    one.num_hidden_layers, one.tie_last_hidden_states = 1, False
    options = {}
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(one, dtype=torch.float32).eval()
        inputs = _blank(numbers, size)
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            options["interpolate_pos_encoding"] = size != pair(numbers.image_size)
        with torch.enable_grad():
            out = model(**inputs, **options, output_hidden_states=True)
            seen = out.last_hidden_state if config.normed else out.hidden_states[-1]
            unused = unused_parameters(model, seen)
    except REFUSALS as error:
        raise ConfigError([("architecture", f"transformers refuses it: {brief(error, 200)}")], NAME) from error
    if size is None:
        if config.select != "patch":
            raise ConfigError([("select", "this model has no class token; leave it out")], NAME)
        return Shell(numbers, unused, options, 0, None)
    rows, cols = (pixels // patch for pixels, patch in zip(size, pair(numbers.patch_size), strict=True))
    prefix = seen.shape[1] - rows * cols if seen.ndim == 3 else -1
    if prefix < 0:
        found = f"{numbers.model_type!r} gives {tuple(seen.shape)} of a picture of {size[0]} x {size[1]} pixels"
        problem = f"{found}, expected a token for each of {rows} x {cols} patches; use the encoder `timm` for others"
        raise ConfigError([("architecture.model_type", problem)], NAME)
    if config.select != "patch" and not prefix:
        raise ConfigError([("select", "this model has no class token; leave it out")], NAME)
    return Shell(numbers, unused, options, prefix, (rows, cols))


def _blank(numbers: Any, size: tuple[int, int] | None) -> dict[str, Tensor | None]:
    """An empty picture for a model on the meta device."""
    if size is not None:
        return {"pixel_values": torch.zeros(1, 3, *size, device="meta")}
    width = 3 * numbers.patch_size**2
    return {
        "pixel_values": torch.zeros(1, numbers.num_patches, width, device="meta"),
        "pixel_attention_mask": None,
        "spatial_shapes": torch.tensor([[1, numbers.num_patches]], device="cpu"),  # its values are read
    }


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _transform(
    config: VitConfig, context: BuildContext, numbers: Any
) -> tuple[Callable[[Image.Image], Tensor], tuple[int, int] | None]:
    """How pictures become tensors, and their height and width; None where every picture keeps its own (NaFlex)."""
    processor = _read_processor(config, context, numbers)
    found = ProcessedPicture(processor)
    first, second = (found.tensors(Image.new("RGB", size)) for size in ((60, 40), (40, 60)))
    if "spatial_shapes" in first:
        if config.fit != "checkpoint" or config.image_size is not None:
            key = "image_size" if config.fit == "checkpoint" else "fit"
            raise ConfigError([(key, "this model keeps the picture's aspect ratio; leave it out")], NAME)
        return found, None
    shape = tuple(first["pixel_values"].shape)
    fixed = len(shape) == 3 and shape == tuple(second["pixel_values"].shape)
    if config.image_size is not None:
        size = (config.image_size, config.image_size)
    elif fixed:
        size = (shape[1], shape[2])
    else:
        problem = f"the image processor gives pictures of different sizes ({shape} of 60 x 40 pixels); set it"
        raise ConfigError([("image_size", problem)], NAME)
    if config.fit == "checkpoint" and fixed:
        return (found if size == shape[1:] else ProcessedPicture(resized(processor, size[0], shape[1:]))), size
    if config.fit == "checkpoint":
        problem = "the image processor keeps aspect ratios; choose crop, pad or squash"
        raise ConfigError([("fit", problem)], NAME)
    way = "bilinear" if int(processor.resample or 3) == 2 else "bicubic"
    return square_transform(config.fit, size, processor.image_mean, processor.image_std, way), size


def resized(processor: Any, side: int, own: tuple[int, ...]) -> Any:
    """The same image processor for squares of ``side`` pixels; what it resizes to before it crops grows alike."""
    given = processor.to_dict()
    scaled = {key: round(value * side / own[0]) for key, value in given["size"].items() if value is not None}
    crop = {"crop_size": {"height": side, "width": side}} if given.get("do_center_crop") else {}
    return type(processor).from_dict(given | {"size": scaled} | crop)


def _read_processor(config: VitConfig, context: BuildContext, numbers: Any) -> Any:
    """The checkpoint's image processor; the family's own for the model's size where no file tells."""
    from transformers import AutoImageProcessor

    if config.pretrained is not None:
        reference = context.resolve(config.pretrained)
        here = Path(reference).is_dir() or (context.weights and not is_local(reference))
        if here and find(reference, config.revision, ["preprocessor_config.json", "processor_config.json"]) is not None:
            try:
                return AutoImageProcessor.from_pretrained(reference, revision=config.revision)
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(f"cannot read the image processor of {reference}: {brief(error)}") from error
    return family_processor(numbers, KNOWN_SIZES.get(config.pretrained or ""))


def family_processor(numbers: Any, side: int | None = None) -> Any:
    """The image processor that transformers has for a family, for squares of ``side`` or of the model's own size."""
    from transformers import ViTImageProcessor
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as NAMES
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

    family = numbers.model_type.removesuffix("_vision_model")
    name = NAMES.get(numbers.model_type, NAMES.get(family, {})).get("torchvision")
    processor = ViTImageProcessor() if name is None else get_image_processor_class_from_name(name)()
    if "num_patches" in taken_names({"model_type": numbers.model_type}) and "max_num_patches" in processor.to_dict():
        return type(processor)(patch_size=numbers.patch_size, max_num_patches=numbers.num_patches)
    side = side or pair(numbers.image_size)[0]
    own = ProcessedPicture(processor)(Image.new("RGB", (60, 40))).shape[1:]
    return resized(processor, side, tuple(own))
