"""Typed configuration: the ``Config`` base, components chosen by ``kind``, and their registry.

Importing this module costs pydantic only; torch and the model libraries are imported when something is built.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from mmllm.errors import CheckpointError, ConfigError, MmllmError, brief

if TYPE_CHECKING:
    import torch

# kind -> "module:Class" for the components that ship with mmllm. Written out so that the list can be read, searched and
# printed without importing anything; a third party adds to it by the entry-point group `mmllm.components` or `plugins:`.
BUILTIN: dict[str, dict[str, str]] = {
    "encoder": {
        "beats": "mmllm.encoders.beats:BeatsConfig",
        "cformer": "mmllm.encoders.cformer:CFormerConfig",
        "clap": "mmllm.encoders.clap:ClapConfig",
        "clip": "mmllm.encoders.clip:ClipConfig",
        "frames": "mmllm.encoders.frames:FramesConfig",
        "fused": "mmllm.encoders.fused:FusedConfig",
        "hubert": "mmllm.encoders.hubert:HubertConfig",
        "imagebind": "mmllm.encoders.imagebind:ImageBindConfig",
        "point_bert": "mmllm.encoders.point_bert:PointBertConfig",
        "tiled": "mmllm.encoders.tiled:TiledConfig",
        "timm": "mmllm.encoders.timm_backbone:TimmConfig",
        "videomae": "mmllm.encoders.video_transformer:VideoMAEConfig",
        "vit": "mmllm.encoders.vision_transformer:VitConfig",
        "vjepa2": "mmllm.encoders.video_transformer:VJEPA2Config",
        "whisper": "mmllm.encoders.whisper:WhisperConfig",
    },
    "input_projector": {
        "linear": "mmllm.projectors.mlp:LinearConfig",
        "mlp": "mmllm.projectors.mlp:MLPConfig",
        "qformer": "mmllm.projectors.qformer:QFormerConfig",
        "mq_former": "mmllm.projectors.qformer:MQFormerConfig",
        "cross_attention": "mmllm.projectors.cross_attention:CrossAttentionConfig",
        "group": "mmllm.projectors.group:GroupConfig",
        "pixel_shuffle": "mmllm.projectors.grid:PixelShuffleConfig",
        "pool": "mmllm.projectors.grid:PoolConfig",
        "ldp": "mmllm.projectors.grid:LDPConfig",
        "temporal_qformer": "mmllm.projectors.temporal_qformer:TemporalQFormerConfig",
    },
    "fusion": {"gated_cross_attention": "mmllm.fusion.gated_cross_attention:GatedCrossAttentionConfig"},
    "output_projector": {
        "linear": "mmllm.projectors.output:LinearOutputConfig",
        "mlp": "mmllm.projectors.output:MLPOutputConfig",
        "tiny_transformer": "mmllm.projectors.output:TinyTransformerConfig",
        "qformer": "mmllm.projectors.output:QFormerOutputConfig",
    },
    "generator": {
        "stable_diffusion": "mmllm.generators.image:StableDiffusionConfig",
        "audio_diffusion": "mmllm.generators.audio:AudioDiffusionConfig",
        "video_diffusion": "mmllm.generators.video:VideoDiffusionConfig",
        "vq": "mmllm.generators.codes:VQConfig",
        "audio_codec": "mmllm.generators.codes:AudioCodecConfig",
    },
    "backbone": {
        "causal_lm": "mmllm.backbones.causal_lm:CausalLMConfig",
        "seq2seq": "mmllm.backbones.seq2seq:Seq2SeqConfig",
    },
    "adapter": {
        "lora": "mmllm.adapters.lora:LoraConfig",
        "ia3": "mmllm.adapters.ia3:IA3Config",
        "prefix_tuning": "mmllm.adapters.prefix_tuning:PrefixTuningConfig",
        "adapter": "mmllm.adapters.bottleneck:BottleneckConfig",
    },
    "reader": {
        "messages": "mmllm.data.readers:MessagesConfig",
        "llava": "mmllm.data.readers:LlavaConfig",
        "sharegpt": "mmllm.data.readers:ShareGPTConfig",
        "nextgpt": "mmllm.data.readers:NextGPTConfig",
        "webdataset": "mmllm.data.webdataset:WebDatasetConfig",
        "hf_datasets": "mmllm.data.hf_datasets:HFDatasetsConfig",
    },
}
ENTRY_POINT_GROUP = "mmllm.components"


class Config(BaseModel):
    """Base of every configuration object: unknown keys are errors, values do not change after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ComponentConfig(Config):
    """Base of a component's configuration. Subclasses set ``family`` and a ``kind: Literal["…"] = "…"`` field."""

    family: ClassVar[str]
    # By modality (of a backbone: text) what `mmllm new` writes beside `kind`: a checkpoint that is known to work, with the
    # numbers that a plan needs offline. Empty for what needs nothing and has no modality.
    suggested: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    kind: str

    @abstractmethod
    def tiny(self) -> Self:
        """The same code path at a few thousand random parameters; what tests and dry runs execute."""

    def members(self) -> dict[str, ComponentConfig]:
        """The components that this one's weights come from, each by its dotted path below this one ("": itself).

        A frozen component can be left out of a checkpoint where every piece has a ``pretrained`` to come back from.
        """
        return {"": self}


@dataclass(frozen=True)
class BuildContext:
    """What a component needs to know beyond its YAML when its module is made.

    ``weights=False`` builds from the architecture alone (random values; nothing is read or downloaded).
    ``root`` is the folder that relative ``pretrained: ./…`` references start from.
    ``trust_remote_code`` comes from the caller of the API or the command line, never from a config.
    """

    dtype: torch.dtype | None = None
    weights: bool = True
    root: Path = Path()
    trust_remote_code: bool = False

    def resolve(self, reference: str) -> str:
        """Turn a ``./``, ``../`` or absolute reference into an absolute path; leave a hub id as it is."""
        if reference.startswith(("./", "../", "/", "~")):
            return str((self.root / Path(reference).expanduser()).resolve())
        return reference


_registered: dict[str, dict[str, type[ComponentConfig]]] = {}
_packages: dict[type[ComponentConfig], str] = {}  # of those that an installed package announces: its name and version
AnyComponent = TypeVar("AnyComponent", bound=type[ComponentConfig])


def register(cls: AnyComponent) -> AnyComponent:
    """Add a component class from outside mmllm (use as a decorator). Raises ``ConfigError`` on a kind taken by another."""
    family, kind = cls.family, cls.__pydantic_fields__["kind"].default
    if family not in BUILTIN:
        raise ConfigError(
            [("", f"unknown component family {family!r}; the families are {', '.join(BUILTIN)}")], cls.__name__
        )
    taken = _registered.setdefault(family, {})
    if kind in BUILTIN[family] or taken.get(kind, cls) is not cls:
        raise ConfigError([("", f"{family} kind {kind!r} is already taken; choose another name")], cls.__name__)
    taken[kind] = cls
    return cls


@cache
def _load_entry_points() -> None:
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        cls = register(entry.load())
        if entry.dist is not None:
            _packages[cls] = f"{entry.dist.name} {entry.dist.version}"


def load_plugins(modules: Iterable[str], folder: Path | None = None) -> list[tuple[str, str]]:
    """Import plugin modules (they call ``register``) and return the problems met.

    Modules are looked for where Python finds all others, and then in ``folder``.
    """
    problems = []
    search = [str(folder.resolve())] if folder is not None else []
    sys.path += search
    try:
        for index, name in enumerate(modules):
            problem = _load_plugin(name)
            if problem is not None:
                problems.append((f"plugins.{index}", problem))
    finally:
        for entry in search:
            sys.path.remove(entry)
    return problems


def _load_plugin(name: str) -> str | None:
    """Import one module; what is wrong with it, if anything. A plugin is foreign code and may raise whatever it likes."""
    if not all(word.isidentifier() for word in name.split(".")):
        return f"{name!r} is not the name of a Python module; expected something like my_parts or my_package.parts"
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        where = "install the package that holds it, or add its folder to PYTHONPATH"
        return f"cannot import {name!r}: {error}; {where}"
    except ConfigError as error:  # `register` refused its kind
        return "; ".join(text for _, text in error.problems)
    except Exception as error:
        return f"importing {name!r} failed: {type(error).__name__}: {brief(error)}"
    return None


def kinds(family: str) -> list[str]:
    """All known kinds of a family, shipped and third-party, sorted."""
    _load_entry_points()
    return sorted({*BUILTIN[family], *_registered.get(family, {})})


def component_class(family: str, kind: str) -> type[ComponentConfig]:
    """The config class of ``kind``. Raises ``KeyError`` when there is none."""
    _load_entry_points()
    if kind in _registered.get(family, {}):
        return _registered[family][kind]
    module, name = BUILTIN[family][kind].split(":")
    cls: type[ComponentConfig] = getattr(importlib.import_module(module), name)
    return cls


def package(family: str, kind: str) -> str | None:
    """Where a kind comes from that does not ship with mmllm: ``name version`` of its package, or the plugin's module."""
    cls = component_class(family, kind)
    return None if kind in BUILTIN[family] else _packages.get(cls, cls.__module__)


def summary(family: str, kind: str) -> str:
    """What a kind is, in one line: the first of its class's docstring."""
    return (component_class(family, kind).__doc__ or "").strip().split("\n")[0].replace("``", "`")


@contextmanager
def problems_at(path: str, problems: list[tuple[str, str]], context: BuildContext) -> Iterator[None]:
    """Collect what a component at the dotted ``path`` refuses while it is built, under that path.

    Takes our errors and the ``ValueError`` with which the libraries refuse sizes. A damaged checkpoint is no mistake of
    the configuration: where weights are read it stays a ``CheckpointError``, raised at once.
    """
    try:
        yield
    except ConfigError as error:
        problems += [(f"{path}.{inner}" if inner else path, text) for inner, text in error.problems]
    except CheckpointError as error:
        if context.weights:
            raise CheckpointError(f"{path}: {error}") from error
        problems.append((path, str(error)))
    except MmllmError as error:
        problems.append((path, str(error)))
    except ValueError as error:
        problems.append((path, brief(error)))


def suggest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known word, else an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _dispatch(family: str, value: Any) -> Any:
    if isinstance(value, ComponentConfig):
        if value.family != family:
            raise PydanticCustomError("wrong_family", f"found a {value.family} ({value.kind!r}), expected a {family}")
        return value
    known = kinds(family)
    if not isinstance(value, Mapping):
        raise PydanticCustomError(
            "no_mapping", f"expected a mapping with `kind`, one of {', '.join(known)}; found {value!r}"
        )
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in known:
        found = "no `kind`" if kind is None else f"unknown {family} kind {kind!r}"
        raise PydanticCustomError("unknown_kind", f"{found}; known: {', '.join(known)}{suggest(str(kind), known)}")
    try:
        return component_class(family, kind).model_validate(value)
    except ValidationError as error:
        # Carried outwards as one error that `problems_of` unfolds, so that every nested mistake keeps its own path.
        nested = problems_of(error, component_class(family, kind))
        raise PydanticCustomError("component", "{nested}", {"nested": nested}) from error


def problems_of(error: ValidationError, cls: type[BaseModel]) -> list[tuple[str, str]]:
    """Flatten a pydantic error into ``(dotted path, message)`` pairs, with suggestions for unknown keys."""
    problems: list[tuple[str, str]] = []
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"] if part != "[key]"]
        if item["type"] == "component":
            problems += [
                (".".join([*path, inner]) if inner else ".".join(path), text) for inner, text in item["ctx"]["nested"]
            ]
        elif item["type"] == "extra_forbidden":
            known = _fields_at(cls, item["loc"][:-1])
            problems.append(
                (".".join(path), f"unknown key{suggest(path[-1], known) or '; known: ' + ', '.join(known)}")
            )
        elif item["type"] == "missing":
            problems.append((".".join(path), "required, but not given"))
        else:
            text = item["msg"].removeprefix("Value error, ")
            found = "" if item["type"].endswith(("_kind", "_mapping", "_family")) else f" (found {item['input']!r:.80})"
            problems.append((".".join(path), f"{text}{found}"))
    return problems


def _fields_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the config reached from ``cls`` by ``loc``; dict keys and list indices are stepped over."""
    for part in loc:
        field = cls.model_fields.get(str(part))
        if field is not None:
            cls = next((inner for inner in _configs_in(field.annotation)), cls)
    return list(cls.model_fields)


def _configs_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _configs_in(argument)
