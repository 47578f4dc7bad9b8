"""MM pretraining: train the first stage of a configuration, usually the input projectors alone.

    python training/pretrain.py CONFIG [a.b=c …] [--stage NAME] [--resume]
    accelerate launch --multi_gpu --num_processes 2 training/pretrain.py CONFIG     (two GPUs, or two CPU processes)

`CONFIG` is a YAML file, `a.b=c` sets one of its values. The run folder (`output` in the config) gets checkpoints to
resume from, the model so far in `final/`, `run.md`, `loss.png` and `metrics.jsonl`. `training/instruct.py` goes on
from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmllm.config.base import BuildContext
from mmllm.config.contradictions import with_lengths
from mmllm.config.load import load
from mmllm.errors import MmllmError
from mmllm.training.run import finish, open_run, select_stages, train_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--stage", help="the stage to train (default: the first)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run folder")
    options = parser.parse_intermixed_args()

    context = BuildContext(root=options.config.resolve().parent)
    config = with_lengths(load(options.config, options.overrides, local_plugins=True), context)
    stage = select_stages(config, options.stage and [options.stage])[0]

    # Builds encoders, projectors and backbone; random parts come from the config's seed, the same on every process.
    run = open_run(config, context, [stage], resume=options.resume)
    # Freezes everything but the stage's parts, then: batch, loss, gradients, step; evaluates and saves now and then.
    train_stage(run, stage)
    # Writes the model, the plot and the summary.
    finish(run)


if __name__ == "__main__":
    try:
        main()
    except MmllmError as error:
        sys.exit(f"error: {error}")
