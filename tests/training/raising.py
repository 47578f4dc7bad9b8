"""A training script of which process 1 fails while it puts the batch of step 3 together: test_T22.

accelerate launch --multi_gpu --num_processes 2 tests/training/raising.py CONFIG
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from mmllm.config.base import BuildContext
from mmllm.config.load import load
from mmllm.processing.processor import Processor
from mmllm.training.run import train

collate, calls = Processor.collate, 0


def failing(self: Processor, *arguments: Any, **named: Any) -> Any:
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls > 2:  # one micro-batch a step
        Path(sys.argv[1]).with_name("raised").touch()
        raise IndexError("the row that nobody thought of")
    return collate(self, *arguments, **named)


Processor.collate = failing  # type: ignore[method-assign]
config = Path(sys.argv[1])
train(load(config), BuildContext(root=config.parent))
