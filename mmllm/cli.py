"""The ``mmllm`` command. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmllm.data_command import data_commands
from mmllm.errors import ConfigError, MmllmError
from mmllm.plan_command import plan_options

# Where the shipped configurations are: beside the package in a checkout, inside it in an installed wheel.
CONFIG_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")
# What can be sent from files, and how the help calls one of each.
FILES = {"image": "a picture", "audio": "a sound", "video": "a clip", "point_cloud": "a mesh or point cloud"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage or a contradictory configuration."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no second group of positional words: overrides behind an option are left over.
    overrides = [word for word in rest if "=" in word and not word.startswith("-") and hasattr(options, "overrides")]
    if len(overrides) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in overrides)}")
    if overrides:
        options.overrides += overrides
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except ConfigError as error:
        # What is found in building does not know the file that it came from.
        named = error.source == "config" and hasattr(options, "config")
        print(ConfigError(error.problems, str(find_config(options.config))) if named else error, file=sys.stderr)
        return 2
    except MmllmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output has gone (`mmllm list | head`); Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; expected at least 1")
    return number


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmllm", description="Assemble, train and talk to multimodal LLMs.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(command=lambda options: _version(parser, options))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=run)
        return sub

    def config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped configuration")
        sub.add_argument("overrides", metavar="a.b=c", nargs="*", help="values that replace those of the file")
        sub.add_argument("--trust-remote-code", action="store_true", help="let hub repositories run their own code")

    def model(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", default="embedded", help="`embedded`, a checkpoint folder or a run directory")
        sub.add_argument("--device", help="cpu, cuda, cuda:1, …; default: cuda where there is one")

    def retrieval(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--retrieve", action="append", default=[], metavar="INDEX", help="existing media to answer with; repeatable"
        )
        sub.add_argument(
            "--decide",
            default="auto",
            choices=["auto", "trained", "generate", "retrieve"],
            help="when: by similarity (default), by the model's decision head, never, always",
        )
        sub.add_argument("--threshold", type=float, default=0.5, help="least similarity for auto, -1 to 1; default 0.5")

    sub = add("list", _list, "list component kinds and shipped configurations")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = add("new", _new, "write a configuration, from options or in a short dialogue")
    sub.add_argument("file", type=Path, metavar="FILE", help="the YAML file to write; never one that is there")
    sub.add_argument("overrides", metavar="a.b=c", nargs="*", help="values to set in it")
    way = "NAME=KIND[:PROJECTOR]"
    sub.add_argument("--input", action="append", default=[], metavar=way, help="an encoder: image=clip:mlp; repeatable")
    sub.add_argument("--output", action="append", default=[], metavar=way, help="a generator: image=stable_diffusion")
    sub.add_argument("--backbone", metavar="KIND", help="default: causal_lm")
    sub.add_argument("--adapter", metavar="KIND", help="of the backbone, or none; default: lora")
    sub.add_argument("--stages", metavar="NAME,…", help="of align, generate, instruct; default: all that apply")
    sub.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="a module with kinds of its own")

    sub = add(
        "plan", _plan, "print what a configuration amounts to: parts, parameters, memory, time, downloads; offline"
    )
    config(sub)
    plan_options(sub, positive)

    sub = add("train", _train, "run the stages of a configuration")
    config(sub)
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on from the run directory's newest valid checkpoint")
    how.add_argument("--dry-run", action="store_true", help="try all of it in seconds: tiny parts, made-up data")
    how.add_argument(
        "--replay",
        metavar="STEP",
        help="compute a logged step (7, or align:7) again and compare; exit 1 when it differs",
    )
    sub.add_argument("--keep", type=Path, metavar="DIR", help="with --dry-run: leave what it wrote in this folder")

    sub = add("cache", _cache, "compute ahead what a run's frozen parts give: features, latents, text conditions")
    config(sub)
    sub.add_argument("--processes", type=positive, default=1, help="how many share the work; default 1")

    sub = add("index", _index, "embed existing pictures or sounds, to be answered with")
    model(sub)
    sub.add_argument("--data", required=True, metavar="PATH", help='a folder, or JSON lines {"path": …}')
    sub.add_argument("--output", required=True, metavar="DIR", help="folder of the index")
    sub.add_argument("--modality", help="which of the model's outputs; default: the only one that can retrieve")
    sub.add_argument("--batch-size", type=positive, default=16)

    sub = add("chat", _chat, "talk to a model in the terminal")
    model(sub)
    retrieval(sub)
    sub.add_argument("--system", help="system prompt")

    sub = add("generate", _generate, "answer one prompt")
    model(sub)
    retrieval(sub)
    for name, what in FILES.items():
        flag = f"--{name.replace('_', '-')}"
        sub.add_argument(flag, action="append", default=[], metavar="FILE", help=f"{what}; may be repeated")
    sub.add_argument("--prompt", required=True, metavar="TEXT")
    sub.add_argument("--system", help="system prompt")
    sub.add_argument("--output", metavar="DIR", help="folder for the pictures, sounds and clips that the model makes")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="MODALITY.OPTION=VALUE",
        help="a generator's option: image.steps=20",
    )
    sub.add_argument("--seed", type=int, help="seed of the sampling (with --temperature) and of the generators")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--max-new-tokens", type=positive, default=256)
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = add("eval", _eval, "score a model's answers on a data file")
    model(sub)
    sub.add_argument("--data", required=True, metavar="FILE", help="messages JSONL")
    sub.add_argument("--metric", default="exact_match", choices=["exact_match"])
    sub.add_argument("--group-by", metavar="FIELD", help="also report by this extra field of the samples")
    sub.add_argument("--batch-size", type=positive, default=16)
    sub.add_argument("--max-new-tokens", type=positive, default=64)
    sub.add_argument("--json", action="store_true", help="print JSON (the default; kept for scripts)")

    sub = add("demo", _demo, "open the chat demo in the browser")
    sub.add_argument("--model", default="embedded", help="`embedded`, a checkpoint folder or a run directory")
    sub.add_argument("--models", metavar="DIR", help="folder whose model folders can be picked in the page")
    sub.add_argument("--port", type=int, default=7860)
    sub.add_argument("--feedback", metavar="FILE", help="where thumbs up and down are kept (JSON lines)")
    sub.add_argument("--no-browser", action="store_true", help="do not open a browser window")

    data_commands(commands.add_parser("data", help="check, show and shard training data"), config, _load, positive)
    return parser


def find_config(name: str) -> Path:
    """A configuration file by path, or by its name among the shipped ones."""
    path = Path(name)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    for folder in CONFIG_FOLDERS:
        for match in sorted(folder.rglob("*.yaml")):
            if f"/{match.relative_to(folder).with_suffix('').as_posix()}".endswith(f"/{name}"):
                return match
    return path


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    from mmllm.config.base import BuildContext
    from mmllm.config.load import load

    path = find_config(options.config)
    config = load(path, options.overrides, local_plugins=True)
    return config, BuildContext(root=path.resolve().parent, trust_remote_code=options.trust_remote_code)


def _version(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if not options.version:
        return _usage(parser)
    from mmllm import __version__

    print(f"mmllm {__version__}")
    return 0


def _usage(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 2


def _list(options: argparse.Namespace) -> int:
    from mmllm.listing import run_list

    return run_list(next(folder for folder in CONFIG_FOLDERS if folder.is_dir()), as_json=options.json)


def _new(options: argparse.Namespace) -> int:
    from mmllm.new import run_new

    chosen = {name: vars(options)[name] for name in ("input", "output", "backbone", "adapter", "stages", "plugin")}
    return run_new(options.file, chosen, options.overrides)


def _plan(options: argparse.Namespace) -> int:
    from mmllm.plan_command import run_plan

    return run_plan(*_load(options), options)


def _train(options: argparse.Namespace) -> int:
    if options.keep is not None and not options.dry_run:
        raise ConfigError(
            [("", "goes with --dry-run; a run keeps what it writes in the `output` of its file")], "--keep"
        )
    config, context = _load(options)
    if options.dry_run:
        from mmllm.dry_run import run_dry_run

        return run_dry_run(config, str(find_config(options.config)), options.keep)
    if options.replay is not None:
        from mmllm.training.replay import run_replay

        return run_replay(config, context, options.replay)
    from mmllm.training.run import train

    train(config, context, resume=options.resume)
    return 0


def _cache(options: argparse.Namespace) -> int:
    from mmllm.training.filling import run_fill

    path = find_config(options.config)
    return run_fill(path, options.overrides, options.processes, trust_remote_code=options.trust_remote_code)


def _chat(options: argparse.Namespace) -> int:
    from mmllm.assistant import load
    from mmllm.chat.terminal import run_terminal

    assistant = load(options.model, device=options.device)
    _use_indexes(assistant, options)
    return run_terminal(assistant, system=options.system)


def _use_indexes(assistant: Any, options: argparse.Namespace) -> None:
    for index in options.retrieve:
        assistant.use_index(index, options.decide, options.threshold)


def _index(options: argparse.Namespace) -> int:
    from mmllm.assistant import load
    from mmllm.retrieval import build_index

    assistant = load(options.model, device=options.device)
    index = build_index(assistant.model, assistant.processor, options.data, options.modality, options.batch_size)
    index.save(Path(options.output))
    for _, reason in index.skipped:
        print(f"left out: {reason}", file=sys.stderr)
    print(f"{len(index.files)} files in {options.output}")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from mmllm.assistant import load

    assistant = load(options.model, device=options.device)
    _use_indexes(assistant, options)
    content = [{"type": kind, "path": path} for kind in FILES for path in vars(options)[kind]]
    messages: list[dict[str, Any]] = [{"role": "system", "content": options.system}] if options.system else []
    messages.append({"role": "user", "content": [*content, {"type": "text", "text": options.prompt}]})
    reply = assistant.chat(
        messages,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        media=_media_options(options.set),
    )
    media: list[dict[str, Any]] = []
    for number, item in enumerate(reply.media, start=1):
        media.append({"type": item.type})
        if item.path is not None and item.similarity is not None:
            media[-1] |= {"path": str(item.path), "source": item.source, "similarity": round(item.similarity, 4)}
        if options.output is not None:
            path = Path(options.output) / f"{number}-{item.type}{item.suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            item.save(path)
            media[-1]["path"] = str(path)
    if lost := sum("path" not in item for item in media):
        print(f"made {lost} file(s), not kept: give --output DIR", file=sys.stderr)
    if options.json:
        answer: dict[str, Any] = {"text": reply, "media": media}
        print(json.dumps(answer | ({"truncated": reply.truncated} if reply.truncated else {}), ensure_ascii=False))
        return 0
    for line in (reply, *(item.get("path", f"[{item['type']}]") for item in media)):
        print(line)
    if reply.truncated:
        print(f"cut off by --max-new-tokens: {', '.join(reply.truncated)}", file=sys.stderr)
    return 0


def _media_options(words: list[str]) -> dict[str, dict[str, Any]]:
    """``image.steps=20`` as ``{"image": {"steps": 20}}``."""
    from mmllm.config.load import parse_value
    from mmllm.errors import ConfigError

    options: dict[str, dict[str, Any]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        modality, dot, option = name.partition(".")
        if not equals or not dot:
            raise ConfigError([("", f"{word!r}: expected MODALITY.OPTION=VALUE, such as image.steps=20")], "--set")
        options.setdefault(modality, {})[option] = parse_value(value, f"--set {name}")
    return options


def _eval(options: argparse.Namespace) -> int:
    from mmllm.assistant import load
    from mmllm.config.base import BuildContext
    from mmllm.data.readers import MessagesConfig
    from mmllm.evaluation import evaluate

    assistant = load(options.model, device=options.device)
    samples = MessagesConfig(path=str(Path(options.data).resolve())).read(BuildContext())
    report = evaluate(
        assistant,
        samples,
        options.metric,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        group_by=options.group_by,
    )
    print(json.dumps(report))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from mmllm.ui import launch

    launch(
        model=options.model,
        port=options.port,
        models_dir=options.models,
        feedback=options.feedback,
        open_browser=not options.no_browser,
    )
    return 0
