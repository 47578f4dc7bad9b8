"""``mmllm data``: the options of its commands, and what they call."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any


def data_commands(
    parser: argparse.ArgumentParser,
    config: Callable[[argparse.ArgumentParser], None],
    load: Callable[[argparse.Namespace], tuple[Any, Any]],
    positive: Callable[[str], int],
) -> None:
    """Add the commands. ``config`` adds the arguments of a configuration, ``load`` reads it, ``positive`` checks a number."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    validate = commands.add_parser("validate", help="report every fault of data as file:line; exit 1 if there is any")
    validate.add_argument("file", metavar="FILE", help="a file of rows; tar shards or tables, also by pattern")
    validate.add_argument("--format", help="the kind of reader (mmllm list); guessed when not given")
    validate.add_argument("--root", metavar="DIR", help="folder that media paths start from; default: the file's own")
    validate.add_argument("--fast", action="store_true", help="do not decode media, only look whether they are there")
    validate.set_defaults(command=_validate)

    show = commands.add_parser("show", help="print a batch with the supervised text coloured")
    config(show)
    show.add_argument("--stage", help="stage name; default: the first")
    show.add_argument("--n", type=positive, default=4, help="number of samples")
    show.set_defaults(command=lambda options: _show(load, options))

    shard = commands.add_parser("shard", help="write samples with their media into tar shards with an index")
    shard.add_argument(
        "source", metavar="CONFIG_OR_FILE", help="a data file, or a YAML file whose stage's data are meant"
    )
    shard.add_argument("--output", required=True, metavar="DIR", help="an empty or new folder")
    shard.add_argument("--stage", help="of the YAML file; default: the first")
    shard.add_argument("--format", help="of the data file: the kind of reader; guessed when not given")
    shard.add_argument("--root", metavar="DIR", help="folder that media paths start from; default: the file's own")
    size = shard.add_mutually_exclusive_group()
    size.add_argument("--samples-per-shard", type=positive, metavar="N", help="default: 10,000")
    size.add_argument("--bytes-per-shard", type=byte_size, metavar="SIZE", help="500MB, 1GiB, or a number of bytes")
    shard.set_defaults(command=_shard)


def byte_size(text: str) -> int:
    """``500MB``, ``1GiB`` or a number, in bytes, for argparse."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KkMGT])(i?)B)?", text.strip())
    power = 0 if found is None else " KMGT".index((found[2] or " ").upper())
    size = 0 if found is None else int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a size such as 500MB")
    return size


def _validate(options: argparse.Namespace) -> int:
    from mmllm.data.validate import run_validate

    return run_validate(options.file, format=options.format, fast=options.fast, root=options.root)


def _show(load: Callable[[argparse.Namespace], tuple[Any, Any]], options: argparse.Namespace) -> int:
    loaded, context = load(options)
    from mmllm.data.show import run_show

    return run_show(loaded, context, stage=options.stage, n=options.n)


def _shard(options: argparse.Namespace) -> int:
    from mmllm.data.shard_writer import run_shard

    return run_shard(
        options.source,
        options.output,
        format=options.format,
        root=options.root,
        stage=options.stage,
        samples_per_shard=options.samples_per_shard,
        bytes_per_shard=options.bytes_per_shard,
    )
