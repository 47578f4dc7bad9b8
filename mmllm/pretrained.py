"""References to pretrained parts: a local folder or file, or a hub id; safetensors and JSON only.

``BuildContext.resolve`` has already turned ``./``, ``../``, ``~`` and absolute references into absolute paths, so here
an absolute path is local and everything else is a hub id. A hub id is looked up in the local cache first and downloaded
only by the functions of this module, which are called only when weights are really wanted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def is_local(reference: str) -> bool:
    """True for a path, False for a hub id. ``reference`` comes from ``BuildContext.resolve``."""
    return Path(reference).is_absolute()


def missing(folder: Path) -> CheckpointError:
    """The error for a local reference with nothing behind it."""
    return CheckpointError(
        f"found no folder {folder}; expected a checkpoint there: make or download it first (the comments in the "
        "configuration may say how), or correct `pretrained`"
    )


def find(reference: str, revision: str | None, names: Sequence[str]) -> Path | None:
    """The first of ``names`` that the folder or hub repository ``reference`` holds, as a local path; None without any.

    Raises ``CheckpointError`` when the folder does not exist or the hub cannot be reached.
    """
    if is_local(reference):
        folder = Path(reference)
        if not folder.exists():
            raise missing(folder)
        return next((folder / name for name in names if (folder / name).is_file()), None)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(reference, name, revision=revision))
        except LocalEntryNotFoundError as error:
            raise CheckpointError(
                f"cannot reach the hub for {reference}/{name}, and it is not in the local cache; "
                "connect once, or download the checkpoint and give its folder as ./path"
            ) from error
        except EntryNotFoundError:
            continue
        except HfHubHTTPError as error:
            raise CheckpointError(f"the hub refused {reference!r}: {error}; check the id and `revision`") from error
    return None


def cached_commit(reference: str, revision: str | None) -> str | None:
    """The commit that a hub id's branch or tag (default: ``main``) stood for when it was last read into the local cache.

    None where the cache does not tell.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=reference, repo_type="model")
    file = folder / "refs" / (revision or "main")
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object. Raises ``CheckpointError`` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"found a {type(value).__name__} in {path}, expected a JSON object")
    return value


def weight_files(reference: str, revision: str | None, names: Sequence[str]) -> list[Path]:
    """The safetensors files of a checkpoint: the file itself, one of ``names`` in its folder, or an index's shards.

    Raises ``CheckpointError`` when there are none, with a word on pickles when only those exist.
    """
    path = Path(reference)
    if is_local(reference) and path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"found {path}; {_only_safetensors(path.name)}")
        return [path]
    found = find(reference, revision, names)
    if found is not None:
        return [found]
    index = find(reference, revision, ["model.safetensors.index.json"])
    if index is not None:
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        located = [find(reference, revision, [shard]) for shard in shards]
        if not shards or None in located:
            raise CheckpointError(f"{index} names shards that are missing; fetch the checkpoint again")
        return [shard for shard in located if shard is not None]
    pickles = [p.name for p in sorted(path.iterdir()) if p.suffix in PICKLES] if is_local(reference) else []
    advice = f"; found {pickles[0]}, but {_only_safetensors(pickles[0])}" if pickles else ""
    raise CheckpointError(f"found no safetensors weights in {reference}; expected one of {', '.join(names)}{advice}")


def _only_safetensors(name: str) -> str:
    what = f"{name} is a pickle, which can run code when it is read" if name.endswith(PICKLES) else "it cannot be read"
    return f"{what}: only .safetensors are loaded. Convert it once with safetensors.torch.save_file(state_dict, …)"


def read_tensors(files: Sequence[Path], prefixes: Sequence[str]) -> dict[str, Tensor]:
    """The tensors whose names start with one of ``prefixes`` (``""`` takes all), under their full names."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {k: file.get_tensor(k) for k in file.keys() if k.startswith(tuple(prefixes))}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {path} as safetensors: {error}; fetch it again") from error
    return tensors


def tensor_names(files: Sequence[Path]) -> list[str]:
    """Names of all tensors, from the headers alone."""
    from safetensors import SafetensorError, safe_open

    names: list[str] = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names += file.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {path} as safetensors: {error}; fetch it again") from error
    return names


def load_into(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy ``tensors`` into ``module``; each of its parameters and saved buffers must be there with its shape.

    Tensors that the module lacks are left out (a checkpoint holds text towers and heads that mmllm does not build).
    Values are converted to the module's own dtype. Raises ``CheckpointError`` naming the first differences.
    """
    expected = module.state_dict()
    faults = [f"no {name}" for name in expected if name not in tensors]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{source} does not fit the architecture: {'; '.join(faults[:3])}{more}")
    module.load_state_dict({name: tensors[name] for name in expected})


def copy_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    """Copy ``found`` into ``expected``, in place and in its dtypes. Raises ``CheckpointError`` when names or shapes differ,
    in either direction.
    """
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(found[name].shape)}, the model has {tuple(expected[name].shape)}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit the model: {'; '.join(sorted(problems)[:5])} ({len(problems)} in all)"
        )
    for name, tensor in expected.items():
        tensor.detach().copy_(found[name])
