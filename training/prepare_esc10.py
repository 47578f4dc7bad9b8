"""ESC-10 -> messages JSONL: "What do you hear?" -> "dog bark".

    git clone https://github.com/karolpiczak/ESC-50
    python training/prepare_esc10.py --source ESC-50 --output data/esc10

`--source` is the ESC-50 repository (audio/*.wav and meta/esc50.csv; only its ESC-10 clips are taken), the older ESC-10
repository (folders such as "001 - Dog bark"), or a folder with the clips, as files or in .zip or .tar archives, and
.jsonl files of rows {"file", "category", "fold", "author", ...}. The split is the authors' cross-validation: fold 5 is
the test set, folds 1-4 are training, of which fold `--validation` is put aside for development.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from pathlib import Path, PurePosixPath

from prepare_fsdd import media_files, message, numbers, write_splits

PROMPT = "What do you hear?"
TEST_FOLD = 5
CATEGORIES = (
    "dog bark",
    "rain",
    "sea waves",
    "baby cry",
    "clock tick",
    "person sneeze",
    "helicopter",
    "chainsaw",
    "rooster",
    "fire crackling",
)
# ESC-50 renamed some of the ten categories.
ESC50_NAMES = {
    "dog": "dog bark",
    "crying_baby": "baby cry",
    "sneezing": "person sneeze",
    "crackling_fire": "fire crackling",
    "sea_waves": "sea waves",
    "clock_tick": "clock tick",
}
CLIP = re.compile(r"(\d)-(\d+)-[A-Z]\.(ogg|wav)")
README = """# ESC-10 in mmllm's messages format

Written by `training/prepare_esc10.py`. One question per clip: "{prompt}" -> one of {categories}.

Source: Karol J. Piczak, "ESC: Dataset for Environmental Sound Classification", ACM Multimedia 2015,
https://github.com/karolpiczak/ESC-50. Licence of the ESC-10 subset: Creative Commons Attribution 3.0 (CC BY 3.0),
https://creativecommons.org/licenses/by/3.0/. The clips are unchanged. Each is an excerpt of a freesound.org recording
with an author and a licence of its own:

{counts}

## Clips

{clips}
"""


def read_categories(source: Path) -> tuple[dict[str, str], dict[str, str]]:
    """({clip stem: category}, {clip stem: attribution}) from .jsonl files, meta/esc50.csv and LICENSE of a source."""
    categories, credits = {}, {}
    for path in sorted(source.rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            stem = PurePosixPath(row["file"]).stem
            categories[stem] = row["category"]
            credits[stem] = f"{row['source_title']} by {row['author']}, {row['source_url']}, {row['licence']}"
    for path in sorted(source.rglob("esc50.csv")):
        with path.open(newline="") as lines:
            for row in csv.DictReader(lines):
                if row["esc10"] == "True":
                    name = ESC50_NAMES.get(row["category"], row["category"])
                    categories[PurePosixPath(row["filename"]).stem] = name
    for path in sorted(source.rglob("LICENSE*")):
        for found in re.finditer(r"(?m)^\W*(\d-\d+-[A-Z])\.\w+\W+(.+)$", path.read_text(errors="replace")):
            credits.setdefault(found[1], found[2].strip())
    return categories, credits


def folder_category(path: PurePosixPath) -> str:
    """ "001 - Dog bark/1-100032-A.ogg" -> "dog bark"; "" where the folder names none of the ten."""
    name = path.parent.name.split(" - ")[-1].lower()
    return name if name in CATEGORIES else ""


def split_of(fold: int, validation: set[int]) -> str:
    if fold == TEST_FOLD:
        return "test"
    return "validation" if fold in validation else "train"


def prepare(source: Path, output: Path, validation: set[int]) -> str:
    """Copy the clips to output/audio and write the splits; returns the counts in words."""
    (output / "audio").mkdir(parents=True, exist_ok=True)
    categories, credits = read_categories(source)
    rows, clips = {}, {}
    for suffix in (".ogg", ".wav"):
        for member, content in media_files(source, suffix):
            path = PurePosixPath(member)
            found = CLIP.fullmatch(path.name)
            category = categories.get(path.stem) or folder_category(path)
            if found is None or not category:
                continue
            if category not in CATEGORIES:
                raise ValueError(f"{path.name}: category {category!r}, expected one of {', '.join(CATEGORIES)}")
            (output / "audio" / path.name).write_bytes(content)
            split = split_of(int(found[1]), validation)
            rows[path.stem] = (split, message(f"esc10-{path.stem}", f"audio/{path.name}", PROMPT, category))
            credit = credits.get(path.stem, f"https://freesound.org/s/{found[2]}/")
            clips[path.stem] = f"- {path.name} ({category}): {credit}"
    if not rows:
        raise FileNotFoundError(
            f"no ESC-10 clip in {source}, its folders or its archives; expected files called {{fold}}-{{id}}-{{take}} "
            "with .wav or .ogg, and their categories in meta/esc50.csv, in .jsonl files or as folder names"
        )
    counts = write_splits(output, [rows[name] for name in sorted(rows)])
    readme = README.format(
        prompt=PROMPT,
        categories=", ".join(CATEGORIES),
        counts=counts,
        clips="\n".join(clips[name] for name in sorted(clips)),
    )
    (output / "README.md").write_text(readme)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the clips or archives of them")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--validation", type=numbers, default="4", help="folds for validation, or none (default 4)")
    arguments = parser.parse_args()
    print(prepare(arguments.source, arguments.output, arguments.validation))


if __name__ == "__main__":
    main()
