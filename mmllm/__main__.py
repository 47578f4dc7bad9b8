"""``python -m mmllm``: the command line, also for launchers such as torchrun."""

import sys

from mmllm.cli import main

sys.exit(main())
