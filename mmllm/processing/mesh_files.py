"""Files of meshes and points before a library reads them: what kind they are, and whether their sizes are what they claim.

trimesh reads whole files at once and trusts their counts. What is checked here bounds the memory that it takes: by the
limits, and by the bytes that are really there.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from mmllm.errors import MediaError
from mmllm.processing.ply import as_triangles, check_length, read_header
from mmllm.processing.sources import Limits

FORMATS = "PLY, OBJ, OFF, STL, glTF, GLB and NumPy's .npy"
MAX_NODES, MAX_DEPTH = 5_000, 50
"""Nodes and primitives of a glTF scene, and nodes below each other. A file of few bytes can have many, each costs time, and
placing a node costs its depth.
"""
SHARED = 4
"""Accessors and buffer views of a glTF file may overlap, but read at most this many times its bytes."""

_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"Kaydara FBX", "FBX"),
    (b"BLENDER", "a Blender file"),
    (b"PK\3\4", "a ZIP archive (USDZ, 3MF and the like)"),
    (b"PXR-USDC", "USD"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"<", "an HTML or XML text (COLLADA, X3D)"),
)
_OFF = re.compile(rb"(ST)?C?N?OFF", re.IGNORECASE)
_OBJ = re.compile(rb"(v|vn|vt|f|l|p|o|g|s|mtllib|usemtl)[ \t]")


def sniff(data: bytes) -> str:
    """``ply``, ``obj``, ``off``, ``stl``, ``gltf``, ``glb`` or ``npy``, told by the first bytes, never by a name.

    Raises ``MediaError`` naming what was found instead.
    """
    if not data:
        raise MediaError("the point cloud is empty (0 bytes)")
    for magic, name in ((b"glTF", "glb"), (b"\x93NUMPY", "npy"), (b"ply", "ply")):
        if data.startswith(magic):
            return name
    if len(data) == _binary_stl(data):
        return "stl"
    line = _first_line(data)
    if line.startswith(b"{"):
        return "gltf"
    if _OFF.match(line):
        return "off"
    if line.startswith(b"solid") and b"\0" not in data[:1024]:
        return "stl"
    if _OBJ.match(line):
        return "obj"
    if not line:
        raise MediaError("the file has comments alone, no points; export it again")
    found = next((name for magic, name in _REFUSED if data.startswith(magic)), "a file of another kind")
    raise MediaError(f"{found} is not opened as a point cloud; convert it to GLB or PLY (opened are {FORMATS})")


def _first_line(data: bytes) -> bytes:
    """The first line that is neither empty nor a comment."""
    for line in io.BytesIO(data.removeprefix(b"\xef\xbb\xbf")):
        if (words := line.strip()) and not words.startswith(b"#"):
            return words
    return b""


def checked(kind: str, data: bytes, limits: Limits) -> bytes:
    """The file as the library is to read it. Raises ``MediaError`` when it has more than ``limits`` allow, by its own
    counts or by its lines, or refers to other files that it needs.
    """
    if kind in ("gltf", "glb"):
        return _self_contained(kind, data, limits)
    if kind == "ply":
        return _ply(data, limits)
    if kind == "stl" and len(data) == _binary_stl(data):
        check_counts(0, (len(data) - 84) // 50, limits)
        return data
    if kind == "obj":
        return _plain_obj(data, limits)
    _check_text(data, limits)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:  # names and comments of older programs; numbers are ASCII in any case
        return data.decode("latin-1").encode()
    return data


def _binary_stl(data: bytes) -> int:
    """How many bytes a binary STL file has that begins as ``data`` does."""
    return 84 + 50 * int.from_bytes(data[80:84], "little")


def check_counts(vertices: int, faces: int, limits: Limits) -> None:
    """Raises ``MediaError`` for more than ``limits`` allow."""
    for count, limit, name in ((vertices, limits.max_vertices, "vertices"), (faces, limits.max_faces, "faces")):
        if count > limit:
            raise MediaError(
                f"the point cloud has {count:,} {name}; the limit is {limit:,} (max_{name}); make it simpler"
            )


def _check_text(data: bytes, limits: Limits) -> None:
    # STL writes seven lines of up to five words for a face, PLY a dozen words for a vertex.
    allowed = 16 * limits.max_vertices + 35 * limits.max_faces
    words = sum(data.count(space) for space in (b" ", b"\t", b"\n", b"\r"))
    if words > allowed:
        raise MediaError(
            f"the point cloud has {words:,} words of text; possible are {allowed:,} (max_vertices, max_faces)"
        )


def _plain_obj(data: bytes, limits: Limits) -> bytes:
    """The vertices and the faces' indices of vertices, which is all that can be used: materials are other files.

    Indices that count back from a face, as -1, become those from the beginning.
    """
    vertices = faces = 0
    lines = []
    for line in io.BytesIO(data.replace(b"\r\n", b"\n").replace(b"\\\n", b" ")):
        words = line.split(maxsplit=1)
        if len(words) < 2:
            continue
        if words[0] == b"v":
            vertices += 1
            lines.append(line)
        elif words[0] == b"f":
            corners = [word.partition(b"/")[0] for word in words[1].partition(b"#")[0].split()]
            faces += max(len(corners) - 2, 0)
            counted = (b"%d" % (vertices + 1 + int(at)) if at.startswith(b"-") else at for at in corners)
            lines.append(b"f " + b" ".join(counted) + b"\n")
        else:
            continue
        check_counts(vertices, faces, limits)
    return b"".join(lines)


def _ply(data: bytes, limits: Limits) -> bytes:
    header = read_header(data)
    check_counts(header.count("vertex"), header.count("face"), limits)
    check_length(data, header)
    if not header.order:
        _check_text(data, limits)
    return as_triangles(data, header, limits.max_faces)


def _self_contained(kind: str, data: bytes, limits: Limits) -> bytes:
    """A GLB of what is needed: scene, meshes, colours. Everything else, and what could be read from elsewhere, is left out."""
    tree, binary = _glb(data) if kind == "glb" else (json.loads(data.decode("utf-8-sig")), b"")
    names = ("accessors", "bufferViews", "buffers", "images", "materials", "meshes", "nodes", "scenes", "textures")
    parts: dict[str, list[Any]] = {name: tree.get(name, []) for name in names}
    for buffer in parts["buffers"]:
        if not buffer.get("uri", "data:").startswith("data:"):
            raise MediaError(
                f"the glTF file keeps its data in another file ({buffer['uri']!r:.80}), which is not read; export it as GLB"
            )
    compressed = [name for name in tree.get("extensionsRequired", []) if "compression" in name]
    if compressed:
        raise MediaError(f"the glTF file is compressed with {compressed[0]}; export it without compression")
    _check_gltf(parts, len(data), limits)
    parts["images"] = [image if image.get("uri", "data:").startswith("data:") else {} for image in parts["images"]]
    primitives = [p for mesh in parts["meshes"] for p in mesh["primitives"]]
    for thing in (*parts["materials"], *primitives, *parts["nodes"]):
        for name in ("extensions", "extras", "camera"):
            thing.pop(name, None)
    kept = {name: part for name, part in parts.items() if part} | {"asset": {"version": "2.0"}}
    text = json.dumps(kept | {name: tree[name] for name in ("scene",) if name in tree}).encode()
    text += b" " * (-len(text) % 4)
    binary += bytes(-len(binary) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    if binary:
        chunks += struct.pack("<I4s", len(binary), b"BIN\0") + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def _glb(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON and the binary chunk of a GLB file (glTF 2.0, 4.4)."""
    _, version, length = struct.unpack_from("<4sII", data)
    if version != 2:
        raise MediaError(f"the GLB file is of version {version}; opened is version 2; export it again")
    if length > len(data):
        raise MediaError(f"the GLB file is truncated: {length - len(data):,} of {length:,} bytes are missing")
    chunks: dict[bytes, bytes] = {}
    position = 12
    while position + 8 <= length:
        size, name = struct.unpack_from("<I4s", data, position)
        if position + 8 + size > length:
            raise MediaError("the GLB file is damaged: a chunk ends behind the file; export it again")
        chunks.setdefault(name, data[position + 8 : position + 8 + size])
        position += 8 + size
    return json.loads(chunks[b"JSON"].decode("utf-8")), chunks.get(b"BIN\0", b"")


_COMPONENTS = {5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4}
_NUMBERS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}


def _check_gltf(parts: Mapping[str, Sequence[Any]], size: int, limits: Limits) -> None:
    accessors = parts["accessors"]
    read = sum(view["byteLength"] for view in parts["bufferViews"])
    taken = sum(a["count"] * _COMPONENTS[a["componentType"]] * _NUMBERS[a["type"]] for a in accessors)
    if max(read, taken) > SHARED * size:
        raise MediaError(
            f"the glTF file says it has {max(read, taken):,} bytes of data, in a file of {size:,}: it is damaged; export it again"
        )
    for what, count in (
        ("nodes", len(parts["nodes"])),
        ("primitives", sum(len(mesh["primitives"]) for mesh in parts["meshes"])),
    ):
        if count > MAX_NODES:
            raise MediaError(f"the glTF scene has {count:,} {what}; possible are {MAX_NODES:,}; join its parts")
    _check_tree([node.get("children", []) for node in parts["nodes"]])
    meshes = [_mesh_size(mesh["primitives"], accessors) for mesh in parts["meshes"]]
    placed = [meshes[node["mesh"]] for node in parts["nodes"] if "mesh" in node]
    for counted in (meshes, placed):
        check_counts(sum(vertices for vertices, _ in counted), sum(faces for _, faces in counted), limits)


def _check_tree(children: Sequence[Sequence[int]]) -> None:
    """Raises ``MediaError`` unless every node has one parent or none, with no circle, at most ``MAX_DEPTH`` deep."""
    below = [child for each in children for child in each]
    level = sorted(set(range(len(children))) - set(below))
    seen = depth = 0
    while level and depth < MAX_DEPTH:
        seen, depth = seen + len(level), depth + 1
        level = [child for node in level for child in children[node]]
    if len(set(below)) < len(below) or seen < len(children):
        raise MediaError(f"the glTF scene's nodes are no trees of at most {MAX_DEPTH} levels; export it again")


def _mesh_size(primitives: Sequence[Any], accessors: Sequence[Any]) -> tuple[int, int]:
    """Vertices and faces of a mesh; of strips a third of the faces."""
    vertices = [accessors[p["attributes"]["POSITION"]]["count"] for p in primitives]
    corners = [accessors[p["indices"]]["count"] for p in primitives if "indices" in p]
    return sum(vertices), sum(corners or vertices) // 3
