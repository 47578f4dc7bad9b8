"""Natural Language for Visual Reasoning (NLVR) -> messages JSONL: "Is this true? {sentence}" -> "yes" or "no".

    git clone https://github.com/lil-lab/nlvr
    python training/prepare_nlvr.py --source nlvr --output data/nlvr [--permutations] [--validation 5]

`--source` is the authors' repository, or a folder with {split}.jsonl and {split}-images.tar. The three boxes of a
picture can be put in any of six orders without changing what is true; `--permutations` writes all six for the training
split (every other split keeps the order 0). `--validation` puts directories of the training split aside: all pictures
of a sentence share a directory, so no sentence is on both sides.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

PROMPT = "Is this true? {}"
ORDERS = tuple(itertools.permutations(range(3)))
NAME = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*-0\.png")  # {split}-{identifier}-{order of the boxes}.png
BOX, STEP = 100, 150  # pixels: width of a box, distance between boxes
# A picture of the corpus is under 10 kB; a larger file is not one of them and is not read into memory.
MAX_BYTES = 200_000
README = """# NLVR in mmllm's messages format

Written by `training/prepare_nlvr.py`. One question per picture and sentence: "Is this true? ..." -> "yes" or "no".

Source: Alane Suhr, Mike Lewis, James Yeh, Yoav Artzi, "A Corpus of Natural Language for Visual Reasoning", ACL 2017,
https://github.com/lil-lab/nlvr (folder nlvr). Licence: Creative Commons Attribution 4.0 International (CC BY 4.0),
https://creativecommons.org/licenses/by/4.0/. Changes: sentences became questions{changes}.

{counts}
"""
Row = dict[str, Any]


def read_rows(source: Path, split: str) -> list[Row]:
    """Rows with id, sentence, label (bool), directory and image (a file name) from either layout.

    FileNotFoundError where neither is there, ValueError for a row that lacks a field."""
    table = source / f"{split}.jsonl"
    if table.is_file():
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
        required = ("id", "sentence", "label", "directory", "image")
        for number, row in enumerate(rows, 1):
            missing = [key for key in required if key not in row]
            if missing:
                raise ValueError(f"{table}:{number} lacks {', '.join(missing)}; expected {', '.join(required)}")
        return [{k: row[k] for k in required} | {"image": PurePosixPath(row["image"]).name} for row in rows]
    table = authors_folder(source, split) / f"{split}.json"
    rows = []
    for line in table.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.append(
            {
                "id": row["identifier"],
                "sentence": row["sentence"],
                "label": str(row["label"]).lower() == "true",
                "directory": str(row["directory"]),
                "image": f"{split}-{row['identifier']}-0.png",
            }
        )
    return rows


def authors_folder(source: Path, split: str) -> Path:
    """nlvr/{split} in the authors' repository, which may be the source or the folder above it."""
    for folder in (source / "nlvr" / split, source / split):
        if (folder / f"{split}.json").is_file():
            return folder
    raise FileNotFoundError(
        f"no {split} split in {source}: expected {split}.jsonl with {split}-images.tar, "
        f"or nlvr/{split}/{split}.json as in https://github.com/lil-lab/nlvr"
    )


def read_pictures(source: Path, split: str) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of the pictures in box order 0; archive members are read in memory, by their last name."""
    archive_path = source / f"{split}-images.tar"
    if archive_path.is_file():
        with tarfile.open(archive_path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                content = archive.extractfile(member) if member.isfile() and NAME.fullmatch(name) else None
                if content is not None:
                    check_size(f"{archive_path}:{member.name}", member.size)
                    yield name, content.read()
        return
    for path in sorted(authors_folder(source, split).glob("images/*/*-0.png")):
        if NAME.fullmatch(path.name):
            check_size(str(path), path.stat().st_size)
            yield path.name, path.read_bytes()


def check_size(name: str, size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"{name} holds {size} bytes; a picture has at most {MAX_BYTES}. Remove it from the source.")


def permute(picture: Image.Image, order: tuple[int, ...]) -> Image.Image:
    """Box `order[j]` of a 400x100 picture goes to place j; the grey between the boxes stays."""
    moved = picture.copy()
    for place, box in enumerate(order):
        moved.paste(picture.crop((box * STEP, 0, box * STEP + BOX, picture.height)), (place * STEP, 0))
    return moved


def message(identifier: str, image: str, questions: list[tuple[str, bool]]) -> Row:
    """One line of messages JSONL: the picture goes with the first question."""
    turns: list[Row] = []
    for sentence, label in questions:
        content = [{"type": "text", "text": PROMPT.format(sentence)}]
        if not turns:
            content.insert(0, {"type": "image", "path": image})
        turns.append({"role": "user", "content": content})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": "yes" if label else "no"}]})
    return {"id": identifier, "messages": turns}


def dialogues(rows: list[Row], contents: dict[str, bytes], group: bool) -> list[list[Row]]:
    """Rows that share a dialogue: each alone, or with `group` those whose pictures have the same content."""
    if not group:
        return [[row] for row in rows]
    together: dict[bytes, list[Row]] = {}
    for row in rows:
        together.setdefault(contents[row["image"]], []).append(row)
    return list(together.values())


def prepare(
    source: Path, output: Path, splits: list[str], permutations: bool, validation: set[str], group: bool
) -> str:
    """Write {split}.jsonl, validation.jsonl and images/ under output; returns the counts in words."""
    (output / "images").mkdir(parents=True, exist_ok=True)
    written: dict[str, list[Row]] = {}
    for split in splits:
        rows = read_rows(source, split)
        contents = dict(read_pictures(source, split))
        missing = sorted({row["image"] for row in rows} - contents.keys())
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} pictures of the {split} split are missing, the first is {missing[0]}"
            )
        for questions in dialogues(rows, contents, group):
            first = questions[0]
            name = "validation" if split == "train" and first["directory"] in validation else split
            asked = [(row["sentence"], row["label"]) for row in questions]
            for order in range(len(ORDERS) if permutations and name == "train" else 1):
                image = f"images/{first['image'].removesuffix('-0.png')}-{order}.png"
                save(contents[first["image"]], order, output / image)
                written.setdefault(name, []).append(message(f"nlvr-{split}-{first['id']}-{order}", image, asked))
    counts = []
    for name, lines in written.items():
        (output / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        counts.append(f"- {name}.jsonl: {len(lines)}")
    changes = ", box orders other than the first were made by moving the boxes" if permutations else ""
    (output / "README.md").write_text(README.format(changes=changes, counts="\n".join(counts)))
    return "\n".join(counts)


def save(content: bytes, order: int, path: Path) -> None:
    """The picture as it is for order 0, with its boxes moved for the others."""
    if order == 0:
        path.write_bytes(content)
        return
    with Image.open(io.BytesIO(content)) as picture:
        permute(picture.convert("RGB"), ORDERS[order]).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the authors' repository or a folder like it")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--splits", nargs="+", default=["train", "dev"], metavar="SPLIT")
    parser.add_argument("--permutations", action="store_true", help="all six box orders for training")
    parser.add_argument(
        "--validation", nargs="*", default=[], metavar="DIRECTORY", help="directories put aside, e.g. 5"
    )
    parser.add_argument("--group", action="store_true", help="one dialogue for all sentences about the same picture")
    a = parser.parse_args()
    print(prepare(a.source, a.output, a.splits, a.permutations, set(a.validation), a.group))


if __name__ == "__main__":
    main()
