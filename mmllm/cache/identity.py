"""A hash of all that an object computes with: its tensors, its numbers, the classes and functions that it is made of."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import types
from collections.abc import Mapping
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.errors import MmllmError

# Who decodes media, prepares them and computes with them.
LIBRARIES = ("mmllm", "torch", "torchvision", "transformers", "diffusers", "open_clip_torch", "timm", "numpy", "pillow",
             "soundfile", "soxr", "scipy", "av", "trimesh")  # fmt: skip
VERSIONED = {"torch", "torchvision", "transformers", "diffusers", "open_clip", "timm", "numpy", "PIL", "scipy"}
PLAIN = (bool, int, float, complex, str, bytes, bytearray, range, slice, type(None), type(Ellipsis), os.PathLike)


def identity(*things: Any) -> str:
    """64 hexadecimal digits for ``things`` and the versions of the libraries that they compute with.

    Two objects with one identity have the same classes, functions (by name; lambdas by code), numbers and tensors, to the
    last bit, wherever these are kept in them; ``training``, a module's mode, does not count. It depends neither on
    addresses nor on the order of sets and mappings. Raises ``MmllmError`` for what cannot be looked into.
    """
    total = hashlib.sha256(json.dumps({name: _version(name) for name in LIBRARIES}).encode())
    for thing in things:
        total.update(_described(thing, ()))
    return total.hexdigest()


def tensor_digest(value: Tensor) -> bytes:
    """SHA-256 of a tensor's dtype, shape and bits."""
    total = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}\n".encode())
    total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return total.digest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _described(thing: Any, above: tuple[int, ...]) -> bytes:
    """A digest of ``thing``; ``above`` are the ids of the objects that it was reached through."""
    kind = type(thing)
    if id(thing) in above:  # an object that holds itself: how far above it is says which
        return _digest("itself", str(len(above) - above.index(id(thing))).encode())
    inner = (*above, id(thing))

    def all_of(values: Any) -> list[bytes]:
        return [_described(value, inner) for value in values]

    if isinstance(thing, Tensor):
        return _digest("tensor", tensor_digest(thing))
    if isinstance(thing, np.ndarray) and thing.dtype != object:
        return _digest("array", str((thing.dtype, thing.shape)).encode(), np.ascontiguousarray(thing).tobytes())
    if isinstance(thing, (*PLAIN, Enum, np.generic, torch.dtype, torch.device)):
        return _digest(_name(kind), repr(thing).encode())
    if isinstance(thing, (types.FunctionType, types.BuiltinFunctionType, type)):
        parts = [_name(thing).encode()]
        if isinstance(thing, types.FunctionType) and "<" in thing.__qualname__:  # a lambda, or made within a function
            parts += [thing.__code__.co_code, repr(thing.__code__.co_names).encode()]
            constants = [value for value in thing.__code__.co_consts if isinstance(value, PLAIN)]
            parts += all_of([constants, thing.__defaults__, [cell.cell_contents for cell in thing.__closure__ or ()]])
        return _digest("named", *parts)
    if isinstance(thing, types.MethodType):
        return _digest("method", *all_of([thing.__func__, thing.__self__]))
    if isinstance(thing, functools.partial):
        return _digest("partial", *all_of([thing.func, thing.args, thing.keywords]))
    if isinstance(thing, (set, frozenset)):
        return _digest("set", *sorted(all_of(thing)))
    held = all_of(thing) if isinstance(thing, (list, tuple)) else []
    if isinstance(thing, Mapping):
        held = sorted(_described(key, inner) + _described(value, inner) for key, value in thing.items())
    own = _attributes(thing)
    if own is None and not isinstance(thing, (list, tuple, Mapping)):
        held = all_of(_reduced(thing))
    if isinstance(thing, torch.nn.Module) and own is not None:
        own = {key: value for key, value in own.items() if key != "training"}
    attributes = sorted((key.encode(), _described(value, inner)) for key, value in (own or {}).items())
    return _digest(_name(kind), *held, b"attributes", *(part for pair in attributes for part in pair))


def _attributes(thing: Any) -> dict[str, Any] | None:
    """An object's attributes; None for one that has none of Python's own."""
    slots = [name for cls in type(thing).__mro__ for name in _slots(cls) if hasattr(thing, name)]
    if not slots and not hasattr(thing, "__dict__"):
        return None
    return {**(thing.__dict__ if hasattr(thing, "__dict__") else {}), **{name: getattr(thing, name) for name in slots}}


def _slots(cls: type) -> list[str]:
    found = cls.__dict__.get("__slots__", ())
    names = [found] if isinstance(found, str) else list(found)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _reduced(thing: Any) -> list[Any]:
    """What an object without attributes says of itself when it is copied."""
    try:
        reduced = thing.__reduce_ex__(4)
    except TypeError as error:
        raise MmllmError(f"cannot tell what a {type(thing).__qualname__} computes with: {error}") from None
    return [reduced] if isinstance(reduced, str) else list(reduced[:3])


def _name(thing: Any) -> str:
    """A class or function by name; of packages whose version is not asked for, with what its file says."""
    module = str(thing.__module__)
    return f"{module}.{thing.__qualname__} {_source(module)}"


@functools.cache
def _source(module: str) -> str:
    """A hash of a module's file. mmllm's own and those of plugins change without their version changing."""
    package = module.partition(".")[0]
    if package in sys.stdlib_module_names or package in VERSIONED:
        return ""
    file = getattr(sys.modules.get(module), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and file.endswith(".py") else ""


def _digest(kind: str, *parts: bytes) -> bytes:
    total = hashlib.sha256(kind.encode())
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))  # so that no part can run over into the next
        total.update(part)
    return total.digest()
