"""Score the whole assistant on a fold of ESC-10 that no part of it was trained on.

    python demo/held_out_esc10.py --esc10 ESC-50 --output runs/held-out

`demo/build.py` keeps fold 4 to itself from the beginning, so an assistant that it built needs none of this. This is for one
whose sound encoder was given all folds while its dialogues lacked the fold: an encoder is trained anew without the fold and takes
the place of the assistant's own; then come the recipe's two stages on the recipe's dialogues with sounds, MM-PT of the sound
projector and MM-IT of it and the adapter. Everything else stays as it is in `--model`. A fold that the assistant's dialogues hold
is refused. Needs the sets and the data of `build.py` in `--work`; goes on where it was interrupted. Writes into `--output`:

* `esc10/`, `encoder/`: the set with the fold aside, the encoder; `pretrain.jsonl`, `instruct.jsonl`, `esc10.jsonl`: dialogues;
* `run/`: the stages, and their model in `run/final`;
* `esc10.json`: {question type: {"n", "accuracy", "interval", "majority", "blind"}}, as `evaluate.py` writes. The model card shows
  it when it lies in `scores/` of the work folder that is packaged.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import evaluate
from build import AUDIO_STEPS, ROOT, run
from make_data import ESC10, joined
from real_sets import Row, read_rows, sound_rows

from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.config.run import RunConfig
from mmllm.training.run import train

SHARE = 1 / 3  # of the dialogues about ESC-10's clips in a stage
HEARD = "inputs.audio.projector"


def recording(row: Row) -> str:
    """What a clip was cut from: 1234 of `esc10-4-1234-A`. Clips of one recording are in one fold."""
    return str(row["id"]).split("-")[2]


def check_apart(training: list[Row], held_out: list[Row], advice: str) -> None:
    """Raise ``ValueError`` when a recording is in both."""
    shared = sorted({recording(row) for row in training} & {recording(row) for row in held_out})
    if shared:
        raise ValueError(f"{len(shared)} recordings of the fold are trained on ({', '.join(shared[:5])}, …); {advice}")


def is_heard(row: Row, alone: bool) -> bool:
    """Whether a row of the recipe's data has sounds, and none of ESC-10's; with ``alone``, and no other media."""
    media = evaluate.media_of(row)
    sounds = [part["path"] for part in media if part["type"] == "audio"]
    others = len(media) - len(sounds)
    return bool(sounds) and not (alone and others) and not any(path.startswith("audio/esc10/") for path in sounds)


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def dialogues(data: Path, esc10: Path, output: Path, seed: int) -> None:
    """The recipe's dialogues with sounds (captions: of nothing else), and those about the other folds' clips, made anew."""
    for name, alone in (("pretrain", True), ("instruct", False)):
        write_rows(output / f"{name}.jsonl", [row for row in read_rows(data, name) if is_heard(row, alone)])
    rng = random.Random(f"{seed}/held out")
    rows = joined(sound_rows(esc10, output, rng, *ESC10), rng)
    write_rows(output / "esc10.jsonl", [{"id": f"esc10-{index}", **row} for index, row in enumerate(rows)])


def configuration(arguments: argparse.Namespace) -> RunConfig:
    """The assistant's own, with the new encoder, and the recipe's two stages on these dialogues."""
    output, clips = arguments.output, len(read_rows(arguments.output, "esc10"))
    recipe = {stage.name: stage.model_dump(mode="json") for stage in load(ROOT / "configs" / "embedded.yaml").stages}
    # The assistant can read and answer; its adapter is to get used to another ear, not to learn anew.
    changes = (
        ("align", "pretrain", {"train": [HEARD], "max_steps": arguments.align}),
        (
            "instruct",
            "instruct",
            {
                "train": [HEARD, "backbone.adapter"],
                "lr": 5e-4,
                "part_lr": {HEARD: 1e-3},
                "max_steps": arguments.instruct,
            },
        ),
    )
    stages = []
    for name, data, changed in changes:
        others = {"kind": "messages", "path": str(output / f"{data}.jsonl"), "root": str(arguments.work / "data")}
        weight = SHARE / (1 - SHARE) * len(read_rows(output, data)) / clips
        sources = [
            {"reader": others},
            {"reader": {"kind": "messages", "path": str(output / "esc10.jsonl")}, "weight": round(weight, 3)},
        ]
        given = {"data": sources, "eval_data": [], "objectives": {"text": 1.0}, "epochs": 100, "save_every": 10}
        stages.append(recipe[name] | given | changed)
    tree = load(arguments.model / "config.yaml").model_dump(mode="json")
    tree["model"]["inputs"]["audio"]["encoder"]["pretrained"] = str(output / "encoder" / "whisper")
    return RunConfig.model_validate(tree | {"stages": stages, "output": str(output / "run"), "compile": False})


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Do all of it; returns the scores. Raises ``ValueError`` when a recording of the fold is trained on."""
    sets, output = arguments.work / "sets", arguments.output
    esc10 = output / "esc10"
    prepare = ("training/prepare_esc10.py", "--source", arguments.esc10, "--output", esc10)
    run(*prepare, "--validation", str(arguments.fold))
    held_out = read_rows(esc10, "validation")
    check_apart(read_rows(esc10, "train"), held_out, "expected clips split by recording, as the authors did")
    check_apart(read_rows(sets / "esc10", "train"), held_out, "choose the fold that the assistant's dialogues lack")
    encoder = ("demo/train_audio_encoder.py", "--fsdd", sets / "fsdd", "--esc10", esc10, "--output", output / "encoder")
    run(*encoder, "--steps", str(arguments.audio_steps), "--device", arguments.device, "--resume")
    if not (output / "esc10.jsonl").exists():  # written last
        dialogues(arguments.work / "data", esc10, output, arguments.seed)
    context = BuildContext(root=arguments.model)
    final = train(configuration(arguments), context, resume=True, start_from=arguments.model)

    import mmllm

    name = f"ESC-10, fold {arguments.fold} held out from every part"
    scores = evaluate.evaluate(mmllm.load(final), [f"{name}={esc10 / 'validation.jsonl'}"])
    (output / "esc10.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    return scores


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--esc10", type=Path, required=True, help="source folder of the set, as for build.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--fold", type=int, default=4, help="1 to 4 (5 is the test set, which nothing is trained on)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "embedded", help="work folder of build.py")
    parser.add_argument("--model", type=Path, default=ROOT / "mmllm" / "embedded", help="the assistant")
    parser.add_argument("--audio-steps", type=int, default=AUDIO_STEPS)
    parser.add_argument("--align", type=int, default=30, help="steps of MM-PT")
    parser.add_argument("--instruct", type=int, default=20, help="steps of MM-IT")
    parser.add_argument("--device", default="cpu", help="of the sound encoder's training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    for name in ("esc10", "output", "work", "model"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    return arguments


if __name__ == "__main__":
    print(evaluate.table(measure(parse())))
