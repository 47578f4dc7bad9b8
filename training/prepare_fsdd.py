"""Free Spoken Digit Dataset -> messages JSONL: "Which digit is spoken?" -> "seven".

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset
    python training/prepare_fsdd.py --source free-spoken-digit-dataset --output data/fsdd

`--source` is the authors' repository (recordings/*.wav) or any folder that holds the recordings as files or inside .zip
or .tar archives; only the file names, {digit}_{speaker}_{take}.wav, are read. The split is the authors': takes 0-4 are
the test set, all others are training, of which `--validation` takes are put aside for development.
"""

from __future__ import annotations

import argparse
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT = "Which digit is spoken?"
TEST_TAKES = range(5)
NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")
# A recording of either set is under 0.7 MB; a larger member is not one of them and is not read into memory.
MAX_BYTES = 4_000_000
README = """# Free Spoken Digit Dataset in mmllm's messages format

Written by `training/prepare_fsdd.py`. One question per recording: "{prompt}" -> "zero" ... "nine".

Source: Zohar Jackson and contributors, Free Spoken Digit Dataset (FSDD),
https://github.com/Jakobovski/free-spoken-digit-dataset, speakers {speakers}.
Licence: Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0),
https://creativecommons.org/licenses/by-sa/4.0/. The recordings are unchanged; this folder is under the same licence.

{counts}
"""


def media_files(source: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(path inside the source, content) of every file called *suffix under a folder and in its .zip and .tar archives.

    Archive members are read in memory and never written under the name they carry. ValueError for a file over
    MAX_BYTES, FileNotFoundError where the source is not a folder."""
    if not source.is_dir():
        raise FileNotFoundError(f"--source {source} is not a folder")
    for path in sorted(source.rglob("*")):
        if path.name.endswith(suffix) and path.is_file():
            check_size(str(path), path.stat().st_size)
            yield path.relative_to(source).as_posix(), path.read_bytes()
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if info.filename.endswith(suffix):
                        check_size(f"{path}:{info.filename}", info.file_size)
                        yield info.filename, archive.read(info)
        elif path.suffix in (".tar", ".tgz") or path.name.endswith(".tar.gz"):
            with tarfile.open(path) as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is not None and member.name.endswith(suffix):
                        check_size(f"{path}:{member.name}", member.size)
                        yield member.name, content.read()


def check_size(name: str, size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"{name} holds {size} bytes; a recording has at most {MAX_BYTES}. Remove it from the source.")


def message(identifier: str, media: str, prompt: str, answer: str) -> dict[str, object]:
    """One line of messages JSONL: a sound, a question about it, and the answer."""
    question = [{"type": "audio", "path": media}, {"type": "text", "text": prompt}]
    return {
        "id": identifier,
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
    }


def write_splits(output: Path, rows: list[tuple[str, dict[str, object]]]) -> str:
    """Write {split}.jsonl for each split with rows, remove one left from an earlier run; returns a list in words."""
    counts = []
    for split in ("train", "validation", "test"):
        lines = [json.dumps(row) for name, row in rows if name == split]
        (output / f"{split}.jsonl").unlink(missing_ok=True)
        if lines:
            (output / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
            counts.append(f"- {split}.jsonl: {len(lines)}")
    return "\n".join(counts)


def numbers(text: str) -> set[int]:
    """ "5-9" -> {5, ..., 9}; "4" -> {4}; "1,3" -> {1, 3}; "none" -> {}."""
    if text == "none":
        return set()
    found: set[int] = set()
    for part in text.split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if bounds is None:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected numbers such as 5-9 or 1,3, or none")
        found |= set(range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))
    return found


def split_of(take: int, validation: set[int]) -> str:
    if take in TEST_TAKES:
        return "test"
    return "validation" if take in validation else "train"


def prepare(source: Path, output: Path, validation: set[int]) -> str:
    """Copy the recordings to output/audio and write the splits; returns the counts in words."""
    (output / "audio").mkdir(parents=True, exist_ok=True)
    rows = {}
    speakers = set()
    for path, content in media_files(source, ".wav"):
        name = PurePosixPath(path).name
        found = NAME.fullmatch(name)
        if found is None:
            continue
        (output / "audio" / name).write_bytes(content)
        speakers.add(found[2])
        answer = DIGITS[int(found[1])]
        split = split_of(int(found[3]), validation)
        rows[name] = (split, message(f"fsdd-{name[:-4]}", f"audio/{name}", PROMPT, answer))
    if not rows:
        raise FileNotFoundError(
            f"no recording called {{digit}}_{{speaker}}_{{take}}.wav in {source}, its folders or its archives; "
            "expected the repository of the Free Spoken Digit Dataset"
        )
    counts = write_splits(output, [rows[name] for name in sorted(rows)])
    readme = README.format(prompt=PROMPT, speakers=", ".join(sorted(speakers)), counts=counts)
    (output / "README.md").write_text(readme)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the recordings or archives of them")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--validation", type=numbers, default="5-9", help="takes for validation, or none (default 5-9)")
    arguments = parser.parse_args()
    print(prepare(arguments.source, arguments.output, arguments.validation))


if __name__ == "__main__":
    main()
