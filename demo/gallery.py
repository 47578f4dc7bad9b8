"""Write the gallery of what an assistant makes: one page in Markdown, with its files in a folder beside it.

    python demo/gallery.py                                   # the embedded assistant; docs/gallery.md and docs/gallery/
    python demo/gallery.py --model runs/embedded/run --output /tmp/gallery.md --judge runs/embedded/judge.safetensors

Nothing is chosen: each section shows the first of its held-out requests, in the order in which they come. There is a section for
each modality that is in SECTIONS and that the assistant makes. An assistant that makes none of them is an error, and no page is
written. The same model, seed and machine give the same page.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gallery_clips
import gallery_pictures
import gallery_sounds
from gallery_page import Choice, Page, escape

from mmllm.errors import MmllmError

if TYPE_CHECKING:
    from mmllm import Assistant

ROOT = Path(__file__).resolve().parent.parent

# What writes the sections about a modality. An assistant may make others too; those are named at the end of the page.
SECTIONS: dict[str, Callable[[Any, Page, Choice], None]] = {
    "image": gallery_pictures.write,
    "audio": gallery_sounds.write,
    "video": gallery_clips.write,
}


def write(assistant: Assistant, name: str, page: Page, choice: Choice) -> None:
    """All sections that the assistant can fill. Raises ``MmllmError`` when there are none."""
    from mmllm.assistant import model_folder

    shown = [modality for modality in SECTIONS if modality in assistant.makes]
    if not shown:
        makes = ", ".join(assistant.makes) or "text alone"
        wanted = ", ".join(SECTIONS)
        raise MmllmError(f"{name} makes {makes}: there is nothing to show (a gallery is made of {wanted})")
    page.add(
        "# Gallery",
        f"What the assistant *{escape(Path(name).name)}* makes, written by `python demo/gallery.py` with seed {choice.seed}. "
        "**Nothing here is chosen**: every section shows the first of the requests that were kept from all trainings, in their "
        "order, failures included. Greedy answers; the generators' own steps and guidance.",
    )
    card = model_folder(name) / "README.md"
    if card.is_file():
        page.add(f"Scores on many more, with intervals: the [model card]({os.path.relpath(card, page.path.parent)}).")
    for modality in shown:
        SECTIONS[modality](assistant, page, choice)
    if others := [modality for modality in assistant.makes if modality not in SECTIONS]:
        page.add(f"It also makes {', '.join(others)}, which this page does not show.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "gallery.md", help="the page; files lie beside it"
    )
    parser.add_argument("--count", type=int, default=60, help="held-out requests")
    parser.add_argument("--shown", type=int, default=12, help="of these, and of the failures among them")
    parser.add_argument("--searched", type=int, default=20_000, help="training samples compared with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training-seed", type=int, default=0, help="that the generators were trained with")
    parser.add_argument("--judge", type=Path, help="weights of `sound_judge.py`, which says what is heard in sounds")
    arguments = parser.parse_args()
    if arguments.output.suffix != ".md":
        parser.error(f"--output is a page and ends in .md, not {arguments.output}")
    if not 1 <= arguments.shown <= arguments.count:
        parser.error(f"--shown is 1 to --count ({arguments.count}), not {arguments.shown}")
    if arguments.judge and not arguments.judge.is_file():
        parser.error(f"--judge is a file that demo/sound_judge.py wrote; there is no {arguments.judge}")
    import mmllm

    page = Page(arguments.output)
    choice = Choice(
        arguments.count,
        arguments.shown,
        arguments.searched,
        arguments.seed,
        arguments.training_seed,
        arguments.judge,
    )
    try:
        write(mmllm.load(arguments.model), arguments.model, page, choice)
    except MmllmError as error:
        raise SystemExit(f"gallery: {error}") from error
    page.save()
    size = sum(path.stat().st_size for path in (page.path, *(page.folder / name for name in page.files)))
    print(f"{page.path}: {len(page.files)} files, {size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
