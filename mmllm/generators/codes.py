"""The ``vq`` and ``audio_codec`` generators: frozen models of discrete codes, which the backbone writes as tokens of its own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt

from mmllm.config.base import BuildContext, suggest
from mmllm.config.families import CodeGeneratorConfig, Codes
from mmllm.errors import CheckpointError, ConfigError, MmllmError, brief
from mmllm.pretrained import find, read_json

if TYPE_CHECKING:
    from mmllm.generators.base import CodeGenerator
    from mmllm.generators.targets import ImageTarget, WaveTarget

MODULE = "mmllm.generators.codes_module"


@dataclass(frozen=True)
class Family:
    """What mmllm knows of one class of code models: the ``library`` that has it, ``module:Class`` of its
    ``CodeGenerator``, and the numbers of the random one that ``tiny()`` runs.
    """

    library: str
    module: str
    tiny: dict[str, Any]


class PretrainedCodesConfig(CodeGeneratorConfig):
    """``pretrained`` is a folder (``./`` is relative to the config file) or a hub id, ``subfolder`` a folder in it.

    ``architecture`` has the model's class and its own numbers, ``{model: VQModel, num_vq_embeddings: 8192, …}``: enough for
    a plan without the files, with which it is compared when they are there. Without ``pretrained`` the weights are random.
    """

    families: ClassVar[Mapping[str, Family]]
    pretrained: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    architecture: dict[str, Any] | None = None

    def tiny(self) -> Self:
        name = (self.architecture or {}).get("model") or next(iter(self.families))
        architecture = {"model": name, **self.families[name].tiny} if name in self.families else {"model": name}
        none = {"pretrained": None, "revision": None, "subfolder": None}
        return self.model_copy(update={**none, "architecture": architecture})

    def model(self, context: BuildContext) -> tuple[str, dict[str, Any]]:
        """The class of the model and all numbers of its config. Raises ``CheckpointError`` for a model of another class."""
        given = dict(self.architecture or {})
        asked = given.pop("model", None)
        found = self._found(context)
        name = (
            asked if found is None else found.get("_class_name") or next(iter(found.get("architectures") or ()), None)
        )
        if name is None and self.pretrained is None:
            name = next(iter(self.families))
        if not isinstance(name, str) or name not in self.families:
            known = ", ".join(self.families)
            if name is None and found is None:
                raise MmllmError(
                    f"{self.kind} {self.pretrained}: its class is not known offline; give `architecture: {{model: …}}` (one of "
                    f"{known}) with the model's numbers, or a local folder as `pretrained`"
                )
            raise CheckpointError(
                f"{self.kind} {self.pretrained}: found a {name}, expected one of {known}{suggest(str(name), self.families)}"
            )
        numbers = _complete(self.families[name].library, name, given, found)
        wrong = {key: value for key, value in given.items() if _plain(numbers.get(key)) != _plain(value)}
        if asked not in (None, name) or wrong:
            has = {key: numbers.get(key, "nothing") for key in wrong}
            raise CheckpointError(
                f"{self.kind} {self.pretrained}: found a {name} with {has}, `architecture` says {asked or name} with {wrong}"
            )
        return name, numbers

    def _found(self, context: BuildContext) -> dict[str, Any] | None:
        """The folder's config; None without a folder, and on the hub without leave to download."""
        if self.pretrained is None:
            return None
        reference = context.resolve(self.pretrained)
        if not context.weights and not Path(reference).is_dir():
            return None
        file = f"{self.subfolder}/config.json" if self.subfolder else "config.json"
        path = find(reference, self.revision, [file])
        if path is None:
            raise CheckpointError(
                f"found no {file} in {reference}; expected a model of codes (perhaps in a `subfolder`)"
            )
        return read_json(path)

    @abstractmethod
    def build(self, context: BuildContext) -> CodeGenerator | None: ...


def _complete(library: str, name: str, given: Mapping[str, Any], found: Mapping[str, Any] | None) -> dict[str, Any]:
    """All numbers of a model's config: those of its file, or else those ``given``, and the library's own for the rest.

    Raises ``ConfigError`` for given ones that the library does not know or refuses.
    """
    import importlib
    import inspect

    from huggingface_hub.errors import StrictDataclassError

    cls = getattr(importlib.import_module(library), name)
    arguments = inspect.signature(cls.__init__ if library == "diffusers" else cls.config_class.__init__).parameters
    problems = [
        (f"architecture.{key}", f"unknown to {library}' {name}{suggest(key, arguments)}")
        for key in given
        if key not in arguments
    ]
    if problems:
        raise ConfigError(problems)
    numbers = given if found is None else found
    if library == "diffusers":
        return {key: argument.default for key, argument in arguments.items() if key != "self"} | dict(numbers)
    try:
        return dict(cls.config_class(**numbers).to_dict())
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError([("architecture", f"transformers refuses it: {brief(error)}")]) from error


def _plain(value: Any) -> Any:
    """JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value


class VQConfig(PretrainedCodesConfig):
    """Pictures by the codes of diffusers' ``VQModel`` (VQGAN, MoVQ; the autoencoder of aMUSEd, Kandinsky 2, LDM).

    ``width`` and ``height`` in pixels decide the number of codes. ``pixel_range`` is what the model was trained on: -1 to 1
    for most, 0 to 1 for aMUSEd's.
    """

    media: ClassVar[str] = "image"
    families: ClassVar[Mapping[str, Family]] = {
        "VQModel": Family(
            "diffusers",
            f"{MODULE}:ImageVQ",
            {
                "block_out_channels": [8, 16],
                "down_block_types": ["DownEncoderBlock2D"] * 2,
                "up_block_types": ["UpDecoderBlock2D"] * 2,
                "latent_channels": 4,
                "norm_num_groups": 4,
                "num_vq_embeddings": 16,
            },
        )
    }
    suggested: ClassVar[Mapping[str, Any]] = {
        "image": {
            "pretrained": "amused/amused-256",
            "subfolder": "vqvae",
            "pixel_range": [0, 1],
            "architecture": {
                "model": "VQModel",
                "num_vq_embeddings": 8192,
                "block_out_channels": [128, 256, 256, 512, 768],
            },
        }
    }
    kind: Literal["vq"] = "vq"
    width: PositiveInt = 256
    height: PositiveInt = 256
    pixel_range: tuple[float, float] = (-1.0, 1.0)

    def tiny(self) -> Self:
        return super().tiny().model_copy(update={"width": 8, "height": 8})

    def grid(self, context: BuildContext) -> tuple[int, int]:
        """Rows and columns of codes. Raises ``MmllmError`` for a size that they do not fill."""
        _, numbers = self.model(context)
        step = 2 ** (len(numbers["block_out_channels"]) - 1)
        if self.width % step or self.height % step:
            raise MmllmError(f"{self.kind}: {self.width} x {self.height} pixels; both must be multiples of {step}")
        return self.height // step, self.width // step

    def codes(self, context: BuildContext) -> Codes:
        rows, columns = self.grid(context)
        return Codes(rows * columns, int(self.model(context)[1]["num_vq_embeddings"]))

    def target(self, context: BuildContext) -> ImageTarget:
        from mmllm.generators.targets import ImageTarget

        return ImageTarget(self.width, self.height)

    def build(self, context: BuildContext) -> CodeGenerator | None:
        if self.pretrained is not None and not context.weights:
            return None
        from mmllm.generators.codes_module import ImageVQ, load_model

        return ImageVQ(load_model(self, context), self.codes(context), self.grid(context), self.pixel_range)


class AudioCodecConfig(PretrainedCodesConfig):
    """Sounds by the codes of transformers' ``EncodecModel`` (mono, without chunks: EnCodec's 24 kHz) or ``DacModel``.

    ``seconds`` is how long every sound is (filled up with silence). ``codebooks`` is how many of the residual codebooks are
    used, the first ones: more sound better and take more tokens.
    """

    media: ClassVar[str] = "audio"
    families: ClassVar[Mapping[str, Family]] = {
        "EncodecModel": Family(
            "transformers",
            f"{MODULE}:Encodec",
            {
                "hidden_size": 8,
                "num_filters": 4,
                "num_lstm_layers": 1,
                "upsampling_ratios": [5, 4],
                "codebook_size": 16,
                "sampling_rate": 8000,
                "target_bandwidths": [1.6, 3.2],
            },
        ),
        "DacModel": Family(
            "transformers",
            f"{MODULE}:Dac",
            {
                "encoder_hidden_size": 4,
                "decoder_hidden_size": 16,
                "downsampling_ratios": [4, 4],
                "n_codebooks": 3,
                "codebook_size": 16,
                "codebook_dim": 4,
                "sampling_rate": 8000,
            },
        ),
    }
    suggested: ClassVar[Mapping[str, Any]] = {
        "audio": {
            "pretrained": "facebook/encodec_24khz",
            "architecture": {"model": "EncodecModel", "codebook_size": 1024, "sampling_rate": 24000},
        }
    }
    kind: Literal["audio_codec"] = "audio_codec"
    seconds: Annotated[float, Field(gt=0)] = 2.0
    codebooks: PositiveInt = 2

    def tiny(self) -> Self:
        return super().tiny().model_copy(update={"seconds": 0.02, "codebooks": 2})

    def samples(self, context: BuildContext) -> int:
        """Samples of a sound: whole positions."""
        _, numbers = self.model(context)
        return math.ceil(round(self.seconds * int(numbers["sampling_rate"]) / _hop(numbers), 6)) * _hop(numbers)

    def codes(self, context: BuildContext) -> Codes:
        name, numbers = self.model(context)
        if (
            numbers.get("chunk_length_s") is not None
            or numbers.get("normalize")
            or numbers.get("audio_channels", 1) != 1
        ):
            raise CheckpointError(
                f"{self.kind} {self.pretrained}: a {name} with chunks, scales or two channels (as EnCodec's 48 kHz) does not "
                "put a sound into codes alone; choose a mono model without them, such as the 24 kHz one"
            )
        available = _codebooks(numbers)
        if self.codebooks > available:
            raise MmllmError(f"{self.kind} {self.pretrained}: {self.codebooks} codebooks asked for, it has {available}")
        return Codes(self.samples(context) // _hop(numbers), int(numbers["codebook_size"]), self.codebooks)

    def target(self, context: BuildContext) -> WaveTarget:
        from mmllm.generators.targets import WaveTarget

        return WaveTarget(int(self.model(context)[1]["sampling_rate"]), self.samples(context), channels=1)

    def build(self, context: BuildContext) -> CodeGenerator | None:
        if self.pretrained is not None and not context.weights:
            return None
        import importlib

        from mmllm.generators.codes_module import load_model

        name, numbers = self.model(context)
        module, _, cls = self.families[name].module.partition(":")
        built: CodeGenerator = getattr(importlib.import_module(module), cls)(
            load_model(self, context), self.codes(context), int(numbers["sampling_rate"])
        )
        return built


def _hop(numbers: Mapping[str, Any]) -> int:
    """Samples per position."""
    return math.prod(numbers.get("downsampling_ratios") or numbers["upsampling_ratios"])


def _codebooks(numbers: Mapping[str, Any]) -> int:
    """How many residual codebooks a codec has: DAC says so, EnCodec as many as its greatest bandwidth pays for."""
    if "n_codebooks" in numbers:
        return int(numbers["n_codebooks"])
    bits = math.ceil(math.log2(numbers["codebook_size"])) * math.ceil(numbers["sampling_rate"] / _hop(numbers))
    return int(1000 * numbers["target_bandwidths"][-1] // bits)
