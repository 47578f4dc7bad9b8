"""Build the embedded assistant from nothing: data sets, base parts, MM-PT, MM-IT, evaluation, packaging.

    python demo/build.py --nlvr nlvr --fsdd free-spoken-digit-dataset --esc10 ESC-50 [--device cuda] [--steps clip llm]

The three arguments are clones of the authors' repositories or folders like them (see `training/prepare_*.py`).
Everything goes to `--work` (runs/embedded); the finished model to `--package` (mmllm/embedded). Every step leaves
`STEP.done` behind and is passed over when that is there; a step that was interrupted goes on from its last checkpoint.
On two cores the picture encoder is trained on one while the other makes the sound encoder, the language model and the data;
then the generators of pictures and clips are trained on the first, that of sounds on the other. With `--smoke` every step does
next to nothing: the model is worthless, but all of the recipe has run, in minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the base parts are given at `--scale 1`: minutes of one CPU core, and steps.
MINUTES = {"clip": 130.0, "llm": 190.0, "draw": 110.0, "sing": 165.0, "animate": 104.0}
AUDIO_STEPS = 4000
TEXT_STEPS = 700
JUDGE_STEPS = 1500  # of the classifier that hears what is made
STAGE_DATA = ("pretrain", "draw", "instruct")
PROCESSES = 2  # of the two stages on a CPU
GENERATORS = {"image": "draw", "audio": "sing", "video": "clips"}  # folder of each output
JUDGE = "judge.safetensors"
# With `--smoke`: what is given to the base parts and of the data, steps of each stage, and requests to each evaluation.
SMOKE_SHARE, SMOKE_STEPS = 0.004, 2
SMOKE_TRIALS = {
    "": ("--limit", "4"),
    "_drawing": ("--count", "3", "--changes", "2", "--decisions", "4", "--timed", "1", "--searched", "50"),
    "_sounds": ("--count", "3", "--timed", "1"),
    "_clips": ("--count", "2", "--timed", "1"),
}


def run(*command: str | Path) -> None:
    """Run a Python script or module of this repository; CalledProcessError when it fails."""
    print("$ python", *command, flush=True)
    # One thread each: threads that wait for each other on busy cores are many times slower.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, env=environment)


def prepare(arguments: argparse.Namespace) -> None:
    """The three real sets as messages JSONL."""
    for name in ("nlvr", "fsdd", "esc10"):
        run(
            f"training/prepare_{name}.py",
            "--source",
            getattr(arguments, name),
            "--output",
            arguments.work / "sets" / name,
        )


def clip(arguments: argparse.Namespace) -> None:
    minutes = MINUTES["clip"] * arguments.scale
    run(
        "demo/train_clip.py",
        "--output",
        arguments.work / "clip",
        "--minutes",
        str(minutes),
        "--device",
        arguments.device,
        "--lr",
        "2.2e-3",
        "--captions",
        "2",
        *(["--resume"] if (arguments.work / "clip" / "training_state.safetensors").exists() else []),
    )


def whisper(arguments: argparse.Namespace) -> None:
    """The audio encoder; `whisper` in the work folder is what the configuration refers to."""
    sets, output = arguments.work / "sets", arguments.work / "audio"
    steps = str(round(AUDIO_STEPS * arguments.scale))
    script = ("demo/train_audio_encoder.py", "--fsdd", sets / "fsdd", "--esc10", sets / "esc10", "--output", output)
    run(*script, "--steps", steps, "--device", arguments.device, "--resume")
    shutil.copytree(output / "whisper", arguments.work / "whisper", dirs_exist_ok=True)


def llm(arguments: argparse.Namespace) -> None:
    minutes = MINUTES["llm"] * arguments.scale
    script = ("demo/train_llm.py", "--output", arguments.work / "llm", "--nlvr", arguments.work / "sets" / "nlvr")
    run(*script, "--minutes", str(minutes), "--device", arguments.device, "--seed", str(arguments.seed), "--resume")


def draw(arguments: argparse.Namespace) -> None:
    generator(arguments, "draw", "demo/train_image_generator.py", "--output", arguments.work / "draw")


def sing(arguments: argparse.Namespace) -> None:
    """The sound generator, and the classifier that is to judge it."""
    fsdd = ("--fsdd", arguments.work / "sets" / "fsdd")
    generator(arguments, "sing", "demo/train_sound_generator.py", "--output", arguments.work / "sing", *fsdd)
    steps = str(max(1, round(JUDGE_STEPS * arguments.scale)))
    run("demo/sound_judge.py", *fsdd, "--output", arguments.work / JUDGE, "--steps", steps)


def animate(arguments: argparse.Namespace) -> None:
    generator(arguments, "animate", "demo/train_video_generator.py", "--output", arguments.work / "clips")


def generator(arguments: argparse.Namespace, name: str, *script: str | Path) -> None:
    steps = str(max(1, round(TEXT_STEPS * arguments.scale)))
    budget = ("--minutes", str(MINUTES[name] * arguments.scale), "--text-steps", steps)
    run(*script, *budget, "--seed", str(arguments.seed), "--resume")


def data(arguments: argparse.Namespace) -> None:
    sets = [value for name in ("nlvr", "fsdd", "esc10") for value in (f"--{name}", arguments.work / "sets" / name)]
    size = ("--size", str(arguments.size), "--seed", str(arguments.seed), "--workers", "1")
    run("demo/make_data.py", "--output", arguments.work / "data", *sets, *size)


def stages(arguments: argparse.Namespace) -> None:
    """MM-PT, alignment of the outputs and MM-IT through the public trainer, with the parts and data of the work folder.

    The largest frozen parts are rounded first (`small_weights`): what is trained on them gets used to it.
    """
    from package_embedded import WEIGHTS
    from small_weights import rewrite, rounded

    work = arguments.work
    for name in ("clip", "llm"):
        rewrite(work / name / WEIGHTS[name], work / name / WEIGHTS[name], rounded)
    overrides = [
        f"output={work / 'run'}",
        f"model.inputs.image.encoder.pretrained={work / 'clip'}",
        f"model.inputs.audio.encoder.pretrained={work / 'whisper'}",
        f"model.backbone.pretrained={work / 'llm'}",
        *(f"model.outputs.{modality}.generator.pretrained={work / name}" for modality, name in GENERATORS.items()),
        *(f"stages.{index}.data=[{work / 'data' / name}.jsonl]" for index, name in enumerate(STAGE_DATA)),
        *(
            f"stages.3.data.{index}.reader.path={work / 'data' / name}.jsonl"
            for index, name in enumerate(("draw", "instruct"))
        ),
        *(f"stages.{index}.eval_data=[{work / 'data' / 'validation.jsonl'}]" for index in (0, 2)),
        *([f"stages.{index}.max_steps={SMOKE_STEPS}" for index in range(4)] if arguments.smoke else []),
        *arguments.override,
    ]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(PROCESSES)] if arguments.device == "cpu" else []
    run(*launcher, "-m", "mmllm", "train", ROOT / "configs" / "embedded.yaml", "--resume", *overrides)


def evaluate(arguments: argparse.Namespace) -> None:
    work, sets = arguments.work, arguments.work / "sets"
    names = {"NLVR": "nlvr", "spoken digits": "fsdd", "ESC-10": "esc10"}
    files = [f"{name}={held_out(sets / folder)}" for name, folder in names.items()]
    asked: dict[str, tuple[str | Path, ...]] = {
        "": (work / "data" / "test.jsonl", *files),
        "_drawing": (),
        "_sounds": ("--judge", work / JUDGE, "--fsdd", sets / "fsdd"),
        "_clips": (),
    }
    for name, words in asked.items():
        few = SMOKE_TRIALS[name] if arguments.smoke else ()
        run(f"demo/evaluate{name}.py", *words, "--model", work / "run", "--output", work / "scores", *few)


def held_out(folder: Path) -> Path:
    """The split of a prepared set that no training used: its test split, else the one for development."""
    found = [
        folder / f"{split}.jsonl" for split in ("test", "dev", "validation") if (folder / f"{split}.jsonl").exists()
    ]
    if not found:
        raise FileNotFoundError(f"{folder} holds no test, dev or validation split; prepare it again")
    return found[0]


def package(arguments: argparse.Namespace) -> None:
    from package_embedded import package as write

    write(arguments.work, arguments.package, arguments.seed)


STEPS: dict[str, Callable[[argparse.Namespace], None]] = {
    "prepare": prepare,
    "clip": clip,
    "whisper": whisper,
    "llm": llm,
    "draw": draw,
    "sing": sing,
    "animate": animate,
    "data": data,
    "stages": stages,
    "evaluate": evaluate,
    "package": package,
}


LANES = (("clip", "draw", "animate"), ("whisper", "llm", "data", "sing"))  # at the same time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("nlvr", "fsdd", "esc10"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="source folder of this set")
    parser.add_argument("--work", type=Path, help="default: runs/embedded, with --smoke runs/smoke")
    parser.add_argument(
        "--package", type=Path, help="default: mmllm/embedded, with --smoke `embedded` in the work folder"
    )
    parser.add_argument("--steps", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--again", action="store_true", help="do the steps even if they are done")
    parser.add_argument("--scale", type=float, default=1.0, help="of the time given to the base parts")
    parser.add_argument("--size", type=float, default=1.0, help="of the generated data")
    parser.add_argument("--smoke", action="store_true", help="every step, at a size that teaches nothing")
    parser.add_argument("--override", nargs="*", default=[], metavar="A.B=C", help="of configs/embedded.yaml")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.scale, arguments.size = SMOKE_SHARE, SMOKE_SHARE
    # What ships is never replaced by a model that has learnt nothing.
    arguments.work = arguments.work or ROOT / "runs" / ("smoke" if arguments.smoke else "embedded")
    arguments.package = arguments.package or (arguments.work if arguments.smoke else ROOT / "mmllm") / "embedded"
    for name in ("nlvr", "fsdd", "esc10", "work", "package"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    arguments.work.mkdir(parents=True, exist_ok=True)
    do("prepare", arguments)
    with ThreadPoolExecutor() as pool:
        lanes = [pool.submit(lambda lane=lane: [do(name, arguments) for name in lane]) for lane in LANES]
        for lane in lanes:
            lane.result()
    for name in ("stages", "evaluate", "package"):
        do(name, arguments)


def do(name: str, arguments: argparse.Namespace) -> None:
    """One step, unless it is done or not asked for."""
    marker = arguments.work / f"{name}.done"
    if name not in arguments.steps or (marker.exists() and not arguments.again):
        return
    print(f"== {name}", flush=True)
    begin = time.monotonic()
    STEPS[name](arguments)
    marker.write_text(json.dumps({"seconds": round(time.monotonic() - begin)}) + "\n")


if __name__ == "__main__":
    main()
