"""transformers' own configs made from the numbers that a YAML declares: unknown names and impossible numbers are refused."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mmllm.config.base import suggest
from mmllm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def make_numbers(cls: type[PretrainedConfig], numbers: Mapping[str, Any]) -> PretrainedConfig:
    """A ``cls`` of ``numbers``. Raises ``ConfigError`` under ``architecture`` for names and values that it refuses."""
    from huggingface_hub.errors import StrictDataclassError

    known = field_names(cls)
    problems = [unknown_field(key, known) for key in numbers if key not in known]
    if problems:
        raise ConfigError(problems)
    try:
        return cls(**numbers)
    except (StrictDataclassError, ValueError, TypeError, ArithmeticError, KeyError, AttributeError) as error:
        # "Validation error for field …:\n    TypeError: Field 'hidden_size' expected int, got str"
        reason = re.sub(r"^\w+Error: ", "", str(error).strip().rpartition("\n")[2].strip())
        raise ConfigError([("architecture", f"transformers refuses it: {reason:.300}")]) from error


def check_declared(declared: Mapping[str, Any], config: PretrainedConfig, source: str | None) -> None:
    """Numbers that the YAML ``declared`` must be those of ``config``, read at ``source``. Raises ``ConfigError``."""
    known = {*field_names(type(config)), *vars(config)}
    problems = [unknown_field(key, known) for key in declared if key not in known]
    problems += [
        (
            f"architecture.{key}",
            f"is {value!r}, but {source} has {getattr(config, key)!r}; correct one of them",
        )
        for key, value in declared.items()
        if hasattr(config, key) and getattr(config, key) != value
    ]
    if problems:
        raise ConfigError(problems)


def field_names(cls: type[PretrainedConfig]) -> set[str]:
    """The names that a transformers config takes: its own, and the usual ones that it maps to them."""
    names = {*inspect.signature(cls.__init__).parameters, *cls.attribute_map, "model_type", "torch_dtype"} - {
        "self",
        "kwargs",
    }
    return names | {"rope_theta", "rope_scaling", "partial_rotary_factor"} if "rope_parameters" in names else names


def unknown_field(key: str, known: Iterable[str]) -> tuple[str, str]:
    """The problem of a key that the family's config does not have; transformers would keep it without a word."""
    return f"architecture.{key}", f"unknown to transformers' config of this model_type{suggest(key, known)}"
