"""KayKit's meshes -> messages JSONL: "What object is this?" -> "table".

    git clone https://github.com/KayKit-Game-Assets/KayKit-Dungeon-Remastered-1.0 kaykit/dungeon
    git clone https://github.com/KayKit-Game-Assets/KayKit-Furniture-Bits-1.0 kaykit/furniture
    python training/prepare_kaykit.py --source kaykit --output data/kaykit

`--source` is a folder with .obj files and the packs' atlases (*_texture.png), as files or in .zip archives; the answer is
the first word of a mesh's file name, and only words with `--least` meshes or more are kept. Media are single files, so each
mesh becomes a PLY file with the atlas's colours at its vertices. Colour variants of a mesh have one geometry: geometries,
not files, are divided into training, validation and test, by a hash of the centred vertices, so that no shape is in two.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import trimesh
from PIL import Image
from prepare_fsdd import media_files, write_splits

PROMPT = "What object is this?"
SHARES = (("test", 0.25), ("validation", 0.1))  # of the geometries; the rest is training
README = """# KayKit's meshes in mmllm's messages format

Written by `training/prepare_kaykit.py`. One question per mesh: "{prompt}" -> one of {categories}.

Source: Kay Lousberg, KayKit Dungeon Remastered and Furniture Bits, https://kaylousberg.itch.io, by way of
https://github.com/KayKit-Game-Assets. Licence: CC0 1.0. Each mesh is a PLY file with the atlas's colours at its vertices.
A geometry (colour variants have the same) is in one split only; meshes, and in brackets geometries:

{counts}
"""


def geometry_id(mesh: trimesh.Trimesh) -> str:
    """A hash of the set of vertices around their middle, to 0.1 mm: the same for colour variants of one shape."""
    places = np.asarray(mesh.vertices) - np.mean(mesh.bounds, axis=0)
    return hashlib.sha1(np.unique(np.round(places, 4) + 0.0, axis=0).tobytes()).hexdigest()


def split_of(geometry: str) -> str:
    place = int(geometry[:8], 16) / 16**8
    for name, share in SHARES:
        if place < share:
            return name
        place -= share
    return "train"


def nearest(atlases: dict[PurePosixPath, Image.Image], mesh: PurePosixPath) -> Image.Image | None:
    """The atlas with the most folders in common with the mesh."""

    def common(atlas: PurePosixPath) -> int:
        return len(set(atlas.parents) & set(mesh.parents))

    return atlases[max(sorted(atlases), key=common)] if atlases else None


def coloured(content: bytes, atlas: Image.Image | None) -> trimesh.Trimesh:
    """The mesh of an OBJ file with the atlas's colour at each vertex."""
    scene = trimesh.load_scene(io.BytesIO(content), file_type="obj", process=False, skip_materials=True)
    mesh = scene.to_mesh()
    colours = np.full((len(mesh.vertices), 3), 102, np.uint8)
    if atlas is not None and mesh.visual.kind == "texture" and mesh.visual.uv is not None:
        uv, pixels = np.asarray(mesh.visual.uv) % 1.0, np.asarray(atlas)
        rows = ((1 - uv[:, 1]) * atlas.height).astype(int).clip(0, atlas.height - 1)
        colours = pixels[rows, (uv[:, 0] * atlas.width).astype(int).clip(0, atlas.width - 1)]
    return trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=colours, process=False)


def message(identifier: str, media: str, answer: str) -> dict[str, Any]:
    """One line of messages JSONL: a mesh, the question, and the answer."""
    question = [{"type": "point_cloud", "path": media}, {"type": "text", "text": PROMPT}]
    reply = [{"type": "text", "text": answer}]
    return {
        "id": identifier,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}],
        "category": answer,
    }


def prepare(source: Path, output: Path, least: int) -> str:
    """Write output/meshes and the splits; returns the counts in words."""
    atlases = {
        PurePosixPath(name): Image.open(io.BytesIO(content)).convert("RGB")
        for name, content in media_files(source, "_texture.png")
    }
    files = {PurePosixPath(name): content for name, content in media_files(source, ".obj")}
    if not files:
        raise FileNotFoundError(
            f"no .obj file in {source}, its folders or its archives; expected KayKit's repositories"
        )
    words = Counter(path.stem.split("_")[0].lower() for path in files)
    kept = {word for word, count in words.items() if count >= least}
    if not kept:
        raise ValueError(f"no kind of object has {least} meshes in {source}; give a smaller --least")
    (output / "meshes").mkdir(parents=True, exist_ok=True)
    rows, geometries = [], {}
    for path in sorted(files):
        word = path.stem.split("_")[0].lower()
        if word not in kept:
            continue
        mesh = coloured(files[path], nearest(atlases, path))
        pack = f"{path.parts[0]}-" if len(path.parts) > 1 else ""
        name = f"{pack}{path.stem}"
        (output / "meshes" / f"{name}.ply").write_bytes(mesh.export(file_type="ply"))
        geometry = geometry_id(mesh)
        geometries[geometry] = split_of(geometry)
        rows.append((geometries[geometry], message(f"kaykit-{name}", f"meshes/{name}.ply", word)))
    counts = write_splits(output, rows)
    shapes = Counter(geometries.values())
    lines = [f"{line} ({shapes[line[2:].split('.')[0]]})" for line in counts.splitlines()]
    readme = README.format(prompt=PROMPT, categories=", ".join(sorted(kept)), counts="\n".join(lines))
    (output / "README.md").write_text(readme)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the meshes or archives of them")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--least", type=int, default=5, help="meshes that a kind of object must have (default 5)")
    arguments = parser.parse_args()
    print(prepare(arguments.source, arguments.output, arguments.least))


if __name__ == "__main__":
    main()
