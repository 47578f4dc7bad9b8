"""MM instruction tuning: train the stages after pretraining, usually the input projectors and the LoRA adapter.

    python training/instruct.py CONFIG [a.b=c …] [--stage NAME] [--from FOLDER] [--resume]
    accelerate launch --multi_gpu --num_processes 2 training/instruct.py CONFIG     (two GPUs, or two CPU processes)

Without `--from` the run that `training/pretrain.py CONFIG` began goes on in the same run folder. With `--from RUN` (or
a checkpoint, or a final model) the weights of that one are loaded and a new run starts; `--resume` goes on with it
later.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmllm.config.base import BuildContext
from mmllm.config.contradictions import with_lengths
from mmllm.config.load import load
from mmllm.errors import MmllmError, TrainingError
from mmllm.training.run import finish, open_run, select_stages, train_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--stage", help="the stage to train (default: all but the first)")
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="FOLDER", help="run, checkpoint or model to start from"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run folder")
    options = parser.parse_intermixed_args()

    context = BuildContext(root=options.config.resolve().parent)
    config = with_lengths(load(options.config, options.overrides, local_plugins=True), context)
    stages = select_stages(config, [options.stage] if options.stage else [stage.name for stage in config.stages[1:]])

    # The parts trained so far come from the folder, all others from their own pretrained weights.
    resume = options.resume or options.start is None
    run = open_run(config, context, stages, resume=resume, start_from=options.start)
    if run.position is None and options.start is None:
        raise TrainingError(f"no checkpoint in {run.folder}; run training/pretrain.py first, or give --from FOLDER")
    # Each stage starts from the weights that the one before has left.
    for stage in stages:
        train_stage(run, stage)
    finish(run)


if __name__ == "__main__":
    try:
        main()
    except MmllmError as error:
        sys.exit(f"error: {error}")
