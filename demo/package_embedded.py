"""Put a trained embedded assistant into one folder that needs nothing else: small weights, relative references, model card.

python demo/package_embedded.py --work runs/embedded --output mmllm/embedded
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import clip_card
import drawing_card
import evaluate
import sound_card
import torch
from score_card import found_in
from small_weights import rewrite, stored

from mmllm.config.load import dump
from mmllm.config.load import load as load_config
from mmllm.config.run import RunConfig
from mmllm.training.checkpoint import write_manifest

WEIGHTS = {"clip": "open_clip_model.safetensors", "whisper": "model.safetensors", "llm": "model.safetensors"}
GENERATORS = ("draw", "sing", "clips")  # diffusers folders, small already
# Which folder a part of the model comes from.
FOLDERS = {
    "inputs.image.encoder": "clip",
    "inputs.audio.encoder": "whisper",
    "backbone": "llm",
    "outputs.image.generator": "draw",
    "outputs.audio.generator": "sing",
    "outputs.video.generator": "clips",
}
# The end of the vision tower, after the layer that the assistant reads.
UNUSED = ("visual.proj", "visual.ln_post.weight", "visual.ln_post.bias")
CARD = """# The embedded assistant

A very small multimodal assistant: pictures and sounds in; text, pictures, sounds, clips out; {parameters:.1f} million parameters,
{megabytes:.1f} MB. It ships with mmllm so that `mmllm demo` works without a network or a GPU, and it shows what the
library's own recipe gives from nothing: `python demo/build.py` (see `demo/README.md`) trained every part of it.

## Parts

| part | what it is | million parameters |
| --- | --- | --- |
{parts}

Made on {date}, seed {seed}. {training}

## What it can do

Pictures with simple shapes (circles, squares, triangles, stars, crosses, diamonds in eight colours): counting, colours,
sizes, places, comparisons, two pictures, and whether a sentence about three boxes is true. Sounds: beeps, sweeps, sirens,
drums, bells, ten everyday sounds, spoken English digits. Small talk about itself. It draws one to six of these shapes as asked
for, with their colours, places and one of three backgrounds, and changes what it drew. It says digits and plays beeps, sweeps,
noise, sirens, clicks, chirps, drums, bells and buzzes, two seconds long. Asked for a moving shape it answers with a clip; what is
right in it stands below.

## What it cannot do

Anything else. It has never seen a photograph, does not read text, knows no facts about the world, speaks only simple
English, and was made to show a recipe, not to be relied on. The digits it knows come from six male speakers; other
voices do worse. When no picture or sound is given it should say so; it does not always.

## Scores

On data that no part was trained on; greedy answers, exact match. *Blind*: the same questions about the picture or sound
of another sample. NLVR is its development split, digits and ESC-10 are the takes and the fold held out for development
unless their test sets were given to the build.

{scores}
### Drawings

Asked for in words held out from every training and read back by a parser of pixels (`demo/picture_parser.py`).

{drawings}
### Sounds

Asked for in words held out from every training and heard by a classifier that was trained on true sounds alone
(`demo/sound_judge.py`).

{sounds}
### Clips

Asked for in words held out from every training and read back by a parser that follows the shape (`demo/clip_parser.py`).

{clips}
{notes}
## Data and licences

| data | licence | authors |
| --- | --- | --- |
| pictures, sounds and dialogues made by `demo/` | Apache-2.0, as the code | the mmllm authors |
| [NLVR](https://github.com/lil-lab/nlvr) | CC BY 4.0 | Suhr, Lewis, Yeh, Artzi, ACL 2017 |
| [Free Spoken Digits](https://github.com/Jakobovski/free-spoken-digit-dataset) | CC BY-SA 4.0 | Jackson and contributors |
| [ESC-10](https://github.com/karolpiczak/ESC-50) | CC BY 3.0, clips each with their own | Piczak, ACM Multimedia 2015 |

No recording or picture of these sets is in this folder.
"""
DESCRIPTIONS = {
    "inputs.image.encoder": "picture encoder: a CLIP vision tower (open_clip's class)",
    "inputs.audio.encoder": "sound encoder: a Whisper encoder (transformers' class)",
    "inputs.image.projector": "picture projector: MLP",
    "inputs.audio.projector": "sound projector: MLP over ten stacked features",
    "outputs.image.projector": "output projector: a small transformer from 16 signal tokens to 32 text positions",
    "outputs.image.generator": "picture generator: latent diffusion at 64 x 64 pixels (diffusers' Stable Diffusion classes)",
    "outputs.audio.projector": "output projector: a small transformer from 4 signal tokens to one vector",
    "outputs.audio.generator": "sound generator: latent diffusion of two seconds, autoencoder, vocoder (AudioLDM's classes)",
    "outputs.video.projector": "output projector: a small transformer from 8 signal tokens to 20 text positions",
    "outputs.video.generator": "clip generator: latent diffusion of 8 frames of 64 x 64 pixels (ModelScope's classes)",
    "backbone": "language model: Llama, 6 layers of width 256, own tokenizer of 1536 tokens",
    "backbone.new_tokens": "rows of the signal tokens, as they are read and as they are written",
    "backbone.adapter": "LoRA on every linear layer",
}


def copy_parts(work: Path, folder: Path) -> None:
    """The frozen parts, each in its own library's layout; of the CLIP only the vision tower."""
    for name in GENERATORS:
        ignored = shutil.ignore_patterns("training", "training.json")
        shutil.copytree(work / name, folder / "parts" / name, ignore=ignored)
    for name, weights in WEIGHTS.items():
        target = folder / "parts" / name
        target.mkdir(parents=True)
        for path in sorted((work / name).iterdir()):
            if path.suffix in (".json", ".jinja") and path.name not in (
                "training.json",
                "words.json",
                "scores.json",
                "probe.json",
            ):
                shutil.copy2(path, target / path.name)
        rewrite(work / name / weights, target / weights, stored, "visual." if name == "clip" else "", UNUSED)


def relative_config(config: RunConfig) -> RunConfig:
    """The configuration with references inside the folder and without stages (their data is not here)."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    for part, name in FOLDERS.items():
        node = tree["model"]
        for word in part.split("."):
            node = node[word]
        node["pretrained"] = f"./parts/{name}"
    return RunConfig.model_validate(tree | {"stages": [], "output": "runs/embedded/run"})


def card(work: Path, folder: Path, seed: int) -> str:
    """The model card. What is to be said of this one run stands in ``notes.md`` of the work folder, if anything."""
    import mmllm

    assistant = mmllm.load(folder)
    counts = {name: sum(p.numel() for p in part.values()) for name, part in assistant.model.parts().items()}
    rows = "\n".join(f"| `{name}` | {DESCRIPTIONS[name]} | {count / 1e6:.2f} |" for name, count in counts.items())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    scores = answered(work)
    table = evaluate.table(scores) if scores else "Not evaluated.\n"
    return CARD.format(
        parameters=sum(counts.values()) / 1e6,
        megabytes=size / 1e6,
        parts=rows,
        date=datetime.date.today().isoformat(),
        seed=seed,
        training=training_times(work),
        scores=table,
        drawings=drawing_card.section(found_in(work, "drawing.json")),
        sounds=sound_card.section(found_in(work, "sounds.json")),
        clips=clip_card.section(found_in(work, "clips.json")),
        notes=(work / "notes.md").read_text(encoding="utf-8") if (work / "notes.md").exists() else "",
    )


def answered(work: Path) -> dict[str, Any]:
    """The scores of every type of question, with those of `held_out_esc10.py` where there are any."""
    found = [work / "scores" / name for name in ("scores.json", "esc10.json")]
    return {kind: one for file in found if file.exists() for kind, one in json.loads(file.read_text()).items()}


def training_times(work: Path) -> str:
    """How long the steps of `build.py` took, from the markers they leave."""
    found = {path.stem: json.loads(path.read_text())["seconds"] for path in sorted(work.glob("*.done"))}
    times = ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in found.items())
    return f"Minutes of each step: {times}." if times else ""


def package(work: Path, output: Path, seed: int) -> None:
    """Write the folder beside `output`, load it once as a check, and put it in place."""
    source = work / "run" / "final"
    folder = output.with_name(f".{output.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy_parts(work, folder)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in ("config.yaml", "parts.safetensors", "references.json", "manifest.json"):
            shutil.copy2(path, folder / path.name)
    rewrite(source / "parts.safetensors", folder / "parts.safetensors", stored)
    (folder / "adapter").mkdir()
    adapter = json.loads((source / "adapter" / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = "../parts/llm"
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n")
    adapter_file = Path("adapter") / "adapter_model.safetensors"
    rewrite(source / adapter_file, folder / adapter_file, stored)
    (folder / "config.yaml").write_text(dump(relative_config(load_config(source / "config.yaml"))), encoding="utf-8")
    references = json.loads((source / "references.json").read_text())
    relative = {
        part: {**entry, "pretrained": f"./parts/{FOLDERS[part]}", "sha256": None} for part, entry in references.items()
    }
    (folder / "references.json").write_text(json.dumps(relative, indent=2) + "\n")
    write_manifest(folder)
    with torch.no_grad():
        text = card(work, folder, seed)
    (folder / "README.md").write_text(text, encoding="utf-8")
    write_manifest(folder)
    shutil.rmtree(output, ignore_errors=True)
    folder.rename(output)
    print(
        f"packaged {output}: {sum(p.stat().st_size for p in output.rglob('*') if p.is_file()) / 1e6:.1f} MB", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    package(arguments.work.resolve(), arguments.output.resolve(), arguments.seed)


if __name__ == "__main__":
    main()
