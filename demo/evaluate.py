"""Score a model on held-out data per question type, with real and with foreign media (*blind*).

    python demo/evaluate.py --model runs/embedded/run --output runs/embedded/scores \\
        data/embedded/test.jsonl NLVR=data/nlvr/validation.jsonl digits=data/fsdd/validation.jsonl

A file named `NAME=FILE` counts as one type; the rows of other files carry their `type`. A blind score asks every question
about the picture or sound of another sample of the same kind: an assistant that looks and listens falls to chance, one
that guesses from the words does not. Answers are greedy; a hit is an exact match (case and surrounding punctuation
ignored); intervals are Wilson's, 95 %. Writes `scores.json` and `scores.md` into the output folder.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.evaluation import exact_match, wilson

if TYPE_CHECKING:
    from mmllm import Assistant

Row = dict[str, Any]
SEED = 0


def read(source: str, limit: int) -> tuple[Path, list[Row]]:
    """The folder and the rows of `FILE` or `NAME=FILE`, each row with a `type`; at most `limit`, evenly spread (0: all)."""
    name, _, file = source.rpartition("=")
    path = Path(file)
    rows: list[Row] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if limit and len(rows) > limit:
        rows = [rows[index * len(rows) // limit] for index in range(limit)]
    return path.parent, [{**row, "type": name} for row in rows] if name else rows


def media_of(row: Row) -> list[dict[str, str]]:
    """The media parts of a row, in order."""
    contents = [message["content"] for message in row["messages"]]
    return [part for content in contents if isinstance(content, list) for part in content if part["type"] != "text"]


def blinded(rows: list[Row]) -> list[Row]:
    """Every row with the media of another row of its type that has the same kinds of media but other files.

    Rows without media are left out, as are rows for which no other media exist.
    """
    rng = random.Random(SEED)
    groups: dict[tuple[str, ...], list[list[dict[str, str]]]] = defaultdict(list)
    for row in rows:
        groups[(row["type"], *(part["type"] for part in media_of(row)))].append(media_of(row))
    result = []
    for row in rows:
        own = media_of(row)
        others = groups[(row["type"], *(part["type"] for part in own))]
        if not any(other != own for other in others):
            continue
        chosen = rng.choice(others)
        while chosen == own:
            chosen = rng.choice(others)
        foreign = iter(chosen)
        messages = [
            {
                "role": message["role"],
                "content": message["content"]
                if isinstance(message["content"], str)
                else [part if part["type"] == "text" else next(foreign) for part in message["content"]],
            }
            for message in row["messages"]
        ]
        result.append({**row, "messages": messages})
    return result


def answers(assistant: Assistant, folder: Path, rows: list[Row], batch_size: int) -> list[str]:
    """The greedy answers to the last question of every row, in the order of `rows`."""
    # Questions of like length and media share a batch, so little is padded.
    order = sorted(range(len(rows)), key=lambda i: (len(media_of(rows[i])), rows[i]["type"]))
    replies = [""] * len(rows)
    begin = time.monotonic()
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        prompts = [rows[index]["messages"][:-1] for index in chosen]
        for index, reply in zip(chosen, assistant.generate(prompts, root=folder, max_new_tokens=64), strict=True):
            replies[index] = reply
        done, seconds = start + len(chosen), time.monotonic() - begin
        if start // batch_size % 10 == 0 or done == len(rows):
            print(f"{done}/{len(rows)} answers, {done / seconds:.1f} a second", flush=True)
    return replies


def reference(row: Row) -> str:
    content = row["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def score(rows: list[Row], replies: list[str]) -> dict[str, dict[str, Any]]:
    """{type: {"n", "accuracy", "interval"}}."""
    hits: dict[str, list[float]] = defaultdict(list)
    for row, reply in zip(rows, replies, strict=True):
        hits[row["type"]].append(exact_match(reply, reference(row)))
    return {
        kind: {
            "n": len(found),
            "accuracy": sum(found) / len(found),
            "interval": wilson(sum(found) / len(found), len(found)),
        }
        for kind, found in hits.items()
    }


def majority(rows: list[Row]) -> dict[str, float]:
    """{type: share of the most frequent answer}: what blind guessing can reach."""
    wanted: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        wanted[row["type"]].append(reference(row))
    return {kind: max(map(found.count, set(found))) / len(found) for kind, found in wanted.items()}


def table(scores: dict[str, dict[str, Any]]) -> str:
    """The scores as a Markdown table."""
    lines = [
        "| questions | n | accuracy | 95 % interval | blind | most frequent answer |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, found in sorted(scores.items()):
        low, high = found["interval"]
        blind = f"{found['blind']:.1%}" if "blind" in found else "–"
        lines.append(
            f"| {kind} | {found['n']} | {found['accuracy']:.1%} | {low:.1%} – {high:.1%} | {blind} | {found['majority']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def evaluate(
    assistant: Assistant, sources: list[str], *, limit: int = 0, batch_size: int = 32, blind: bool = True
) -> dict[str, Any]:
    """Scores of every type in `sources`; see the module's text."""
    scores: dict[str, dict[str, Any]] = {}
    for source in sources:
        folder, rows = read(source, limit)
        print(f"{source}: {len(rows)} questions", flush=True)
        found = score(rows, answers(assistant, folder, rows, batch_size))
        for kind, share in majority(rows).items():
            found[kind]["majority"] = share
        foreign = blinded(rows) if blind else []
        for kind, result in score(foreign, answers(assistant, folder, foreign, batch_size)).items():
            found[kind]["blind"] = result["accuracy"]
        scores |= found
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="FILE or NAME=FILE")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--output", default="", help="folder for scores.json and scores.md")
    parser.add_argument("--limit", type=int, default=0, help="at most so many rows of each file")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--no-blind", action="store_true", help="skip the questions about foreign media")
    arguments = parser.parse_args()
    import mmllm

    assistant = mmllm.load(arguments.model)
    scores = evaluate(
        assistant, arguments.data, limit=arguments.limit, batch_size=arguments.batch_size, blind=not arguments.no_blind
    )
    print(table(scores))
    if arguments.output:
        output = Path(arguments.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        (output / "scores.md").write_text(table(scores), encoding="utf-8")


if __name__ == "__main__":
    main()
