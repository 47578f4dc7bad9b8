"""Open the chat demo in the browser: pictures and sounds in, text, pictures, sounds and clips out, all on this computer.

python demo/app.py                                  # the embedded assistant
python demo/app.py --model runs/mine                # a model you trained
python demo/app.py --models runs --port 8000        # choose among all models below a folder
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmllm.errors import MmllmError
from mmllm.ui import launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="`embedded` or the folder of a trained model")
    parser.add_argument("--models", type=Path, help="a folder with more models to choose from on the page")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--feedback", type=Path, help="the file that keeps thumbs up and down")
    options = parser.parse_args()
    try:
        launch(options.model, options.port, models_dir=options.models, feedback=options.feedback, open_browser=True)
    except MmllmError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
