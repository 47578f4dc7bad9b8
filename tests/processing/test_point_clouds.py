"""Meshes and point clouds: what each format gives, what is drawn of it, colours, and what is refused."""

from __future__ import annotations

import base64
import builtins
import io
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray
from PIL import Image

from mmllm.errors import MediaError
from mmllm.processing.point_clouds import GREY, decode_point_cloud
from mmllm.processing.sources import Limits

LIMITS = Limits()
BOX = trimesh.creation.box()  # 8 vertices, 12 triangles, from -0.5 to 0.5
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
TRIANGLE = b"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
TRIANGLE += b"element face 1\nproperty list uchar int vertex_indices\nend_header\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"


def decode(data: bytes, points: int = 1200, **limits: int) -> NDArray[np.float32]:
    return decode_point_cloud(data, Limits(**limits) if limits else LIMITS, points=points)


def exported(kind: str, mesh: Any = BOX, **options: Any) -> bytes:
    data = mesh.export(file_type=kind, **options)
    return data.encode() if isinstance(data, str) else bytes(data)


def ply(order: str, faces: list[tuple[int, ...]]) -> bytes:
    """The box as binary PLY, with a scalar and faces of any size."""
    name = "little" if order == "<" else "big"
    header = f"ply\nformat binary_{name}_endian 1.0\ncomment made here\nelement vertex 8\n"
    header += "".join(f"property double {axis}\n" for axis in "xyz")
    header += f"element face {len(faces)}\nproperty uchar flags\nproperty list uchar uint vertex_index\nend_header\n"
    rows = b"".join(struct.pack(f"{order}BB{len(face)}I", 7, len(face), *face) for face in faces)
    return header.encode() + BOX.vertices.astype(f"{order}f8").tobytes() + rows


def gltf(glb: bytes) -> bytes:
    """A GLB as one JSON text, its data inside."""
    size = int.from_bytes(glb[12:16], "little")
    tree = json.loads(glb[20 : 20 + size])
    tree["buffers"][0]["uri"] = "data:application/octet-stream;base64," + base64.b64encode(glb[28 + size :]).decode()
    return json.dumps(tree, indent=1).encode()


def glb(tree: dict[str, Any], binary: bytes = b"") -> bytes:
    text = json.dumps({"asset": {"version": "2.0"}, **tree}).encode()
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text
    if binary:
        body += struct.pack("<I4s", len(binary), b"BIN\0") + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


MIXED = [QUADS[0], *[(a, b, c) for q in QUADS[1:] for a, b, c in ((q[0], q[1], q[2]), (q[0], q[2], q[3]))]]
FILES = {
    "ascii PLY": exported("ply", encoding="ascii"),
    "little-endian PLY": exported("ply"),
    "big-endian PLY": ply(">", QUADS),
    "PLY of triangles and quads": ply(">", MIXED),
    "little-endian PLY of triangles and quads": ply("<", MIXED),
    "OBJ": exported("obj"),
    "OBJ of quads": "".join(
        [f"v {x} {y} {z}\n" for x, y, z in BOX.vertices] + [f"f {' '.join(str(i + 1) for i in q)}\n" for q in QUADS]
    ).encode(),
    "OFF": exported("off"),
    "STL": exported("stl"),
    "STL as text": exported("stl_ascii"),
    "GLB": exported("glb"),
    "glTF": gltf(exported("glb")),
}


def test_obj_in_its_dialects() -> None:
    """Indices from the end, with textures and normals, a line that goes on, comments, Latin-1, groups without end."""
    corners = "v 0 0 0\r\nv 1 0 0\r\nv 1 1 0\r\n"
    text = f"# caf\xe9\r\nmtllib x.mtl\r\no part\r\n{corners}vt 0 0\r\nvn 0 0 1\r\nf -3/1/1 -2//1 \\\r\n-1/1 # end\r\n"
    text += "v 0 0 2\r\n" + "".join(f"usemtl m{i}\r\n" for i in range(20_000)) + "f 1 2 4\r\n"
    found = decode(text.encode("latin-1"), 4000)[:, :3]
    flat = found[:, 2] == 0
    assert abs(flat.mean() - 1 / 3) < 4 * 0.0075  # areas 0.5 and 1; standard deviation 0.0075
    assert (found[flat, 1] <= found[flat, 0]).all()
    assert not found[~flat, 1].any()


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_points_evenly_over_the_surface(name: str) -> None:
    found = decode(FILES[name])
    assert found.shape == (1200, 6)
    assert found.dtype == np.float32
    places = found[:, :3]
    np.testing.assert_allclose(np.abs(places).max(axis=1), 0.5, atol=1e-6)  # all on the box
    sides = [(places[:, axis] * sign > 0.4999).sum() for axis in range(3) for sign in (-1, 1)]
    assert min(sides) > 200 - 4 * 13  # a sixth on each side: 200, standard deviation 12.9
    assert max(sides) < 200 + 4 * 13
    assert (np.abs(places.mean(axis=0)) < 0.05).all()  # no corner of a side is preferred
    np.testing.assert_array_equal(found[:, 3:], np.float32(GREY))


def test_what_is_drawn_depends_on_the_bytes_alone() -> None:
    first = decode(FILES["OFF"])
    np.random.seed(1)  # a state that must not matter
    np.testing.assert_array_equal(decode(FILES["OFF"]), first)
    assert (decode(FILES["OFF"] + b"\n") != first).any()
    np.testing.assert_array_equal(decode(FILES["OFF"], max_vertices=5000), first)


def test_triangles_are_drawn_by_area() -> None:
    vertices = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [10, 0, 0], [13, 0, 0], [10, 3, 0]]
    found = decode(exported("off", trimesh.Trimesh(vertices, [[0, 1, 2], [3, 4, 5]], process=False)), 4000)
    small = (found[:, 0] < 5).mean()
    assert abs(small - 0.1) < 4 * 0.0047  # areas 1 : 9; standard deviation 0.0047
    large = found[found[:, 0] > 5, :2]
    assert abs((large[:, 0] - 10).mean() - 1) < 0.06  # a triangle's points lie about its centre


def test_of_points_some_are_drawn_or_all_repeated() -> None:
    file = io.BytesIO()
    array = np.arange(150, dtype=np.float32).reshape(50, 3)
    np.save(file, array)
    data = file.getvalue()
    np.testing.assert_array_equal(decode(data, 50)[:, :3], array)
    some = decode(data, 20)[:, :3]
    assert len(np.unique(some[:, 0])) == 20
    assert (np.diff(some[:, 0]) > 0).all()
    np.testing.assert_array_equal(decode(data, 120)[:, :3], np.concatenate([array, array, array[:20]]))
    cloud = exported("ply", trimesh.PointCloud(array.astype(float)))
    np.testing.assert_array_equal(decode(cloud, 50)[:, :3], array)


def test_a_mesh_without_a_surface_gives_its_vertices() -> None:
    line = b"OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n"
    np.testing.assert_array_equal(decode(line, 3)[:, 0], [0, 1, 2])


def test_parts_of_a_scene_are_in_their_places() -> None:
    scene = trimesh.Scene()
    scene.add_geometry(BOX, transform=trimesh.transformations.translation_matrix([10, 0, 0]))
    turned = trimesh.transformations.rotation_matrix(np.pi / 2, [0, 0, 1])
    scene.add_geometry(trimesh.creation.box((4, 1, 1)), transform=turned)
    places = decode(exported("glb", scene), 3000)[:, :3]
    far = places[:, 0] > 5
    assert abs(far.mean() - 6 / 24) < 0.04
    np.testing.assert_allclose(places[far].max(axis=0), [10.5, 0.5, 0.5], atol=0.02)
    np.testing.assert_allclose(places[~far].max(axis=0), [0.5, 2, 0.5], atol=0.02)


# Colours --------------------------------------------------------------------------------------------------------------
def test_colours_of_vertices_run_into_each_other() -> None:
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    mesh = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], vertex_colors=colours, process=False)
    for kind in ("ply", "glb", "obj"):
        found = decode(exported(kind, mesh))
        expected = np.stack([1 - found[:, 0] - found[:, 1], found[:, 0], found[:, 1]], axis=1)
        np.testing.assert_allclose(found[:, 3:], expected, atol=1e-5)


def test_colours_of_faces() -> None:
    mesh = trimesh.Trimesh(BOX.vertices, BOX.faces, process=False)
    mesh.visual.face_colors = [[255, 0, 51] if normal[2] > 0.9 else [0, 0, 0] for normal in mesh.face_normals]
    found = decode(exported("ply", mesh))
    top = found[:, 2] > 0.4999
    np.testing.assert_allclose(found[top, 3:], np.broadcast_to([1, 0, 0.2], (top.sum(), 3)), atol=1e-6)
    assert not found[~top, 3:].any()


def textured(image: Image.Image | None, factor: list[int] | None = None) -> bytes:
    """A square from 0 to 1 whose texture coordinates are its own; two units along x and one along y repeat the texture."""
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=image, baseColorFactor=factor)
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    visual = trimesh.visual.TextureVisuals(uv=corners[:, :2] * [2, 1], material=material)
    return exported("glb", trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False))


def test_colours_of_a_texture_inside_the_file() -> None:
    picture = Image.new("RGB", (2, 2))
    picture.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)])  # red, green; below blue, white
    found = decode(textured(picture, [255, 255, 51, 255]))
    right, up = (found[:, 0] * 2) % 1 > 0.5, found[:, 1] > 0.5
    for at, colour in (
        (up & ~right, (1, 0, 0)),
        (up & right, (0, 1, 0)),
        (~up & ~right, (0, 0, 0.2)),
        (~up & right, (1, 1, 0.2)),
    ):
        assert at.sum() > 200
        np.testing.assert_allclose(found[at, 3:], np.broadcast_to(colour, (at.sum(), 3)), atol=1e-6)


def test_colour_of_a_material() -> None:
    np.testing.assert_allclose(decode(textured(None, [51, 102, 255, 255]))[0, 3:], [0.2, 0.4, 1], atol=1e-6)


def test_a_texture_is_decoded_within_limits() -> None:
    data = textured(Image.new("RGB", (300, 200)))
    assert decode(data).shape == (1200, 6)
    with pytest.raises(MediaError, match="texture of 300x200 pixels; the limit is 50,000"):
        decode(data, max_pixels=50_000)


@pytest.mark.parametrize(
    ("columns", "dtype", "scale"), [(6, np.float32, 1), (6, np.float64, 255), (6, np.uint8, 255), (3, np.int16, 1)]
)
def test_arrays(columns: int, dtype: type, scale: int) -> None:
    array = np.array([[1, 2, 3, 0, 0.2, 1], [4, 5, 6, 1, 0.6, 0.8]])[:, :columns]
    array[:, 3:] *= scale
    for order in ("C", "F"):
        file = io.BytesIO()
        np.save(file, np.asarray(array, dtype, order=order))
        found = decode(file.getvalue(), 2)
        np.testing.assert_array_equal(found[:, :3], [[1, 2, 3], [4, 5, 6]])
        expected = [[0, 0.2, 1], [1, 0.6, 0.8]] if columns == 6 else np.full((2, 3), GREY)
        np.testing.assert_allclose(found[:, 3:], expected, atol=1e-6)


# Refusals -------------------------------------------------------------------------------------------------------------
def saved(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def huge(shape: str) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(64)


ACCESSOR = {"componentType": 5126, "count": 3, "type": "VEC3"}
MESHES = {"meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}], "scenes": [{"nodes": [0]}]}
VIEW = {"bufferViews": [{"buffer": 0, "byteLength": 36}], "buffers": [{"byteLength": 36}]}
SHARED = {**MESHES, **VIEW, "accessors": [{**ACCESSOR, "bufferView": 0}]}
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "comments": (b"# Blender\n\n# nothing\n", "comments alone, no points"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG picture is not opened as a point cloud; convert it to GLB or PLY"),
    "FBX": (b"Kaydara FBX Binary  \0\x1a\0" + bytes(99), "FBX is not opened"),
    "coordinates without a format": (b"0 0 0\n1 0 0\n", "a file of another kind"),
    "no vertices": (b"OFF\n0 0 0\n", "no points"),
    "NaN": (TRIANGLE.replace(b"1 0 0", b"nan 0 0"), "NaN or infinite"),
    "infinite": (TRIANGLE.replace(b"1 0 0", b"1 inf 0"), "NaN or infinite"),
    "too large": (TRIANGLE.replace(b"1 0 0", b"1e30 0 0"), r"a coordinate of 1e\+30"),
    "a face of no vertex": (TRIANGLE.replace(b"3 0 1 2", b"3 0 1 3"), "damaged|a face of vertex 3"),
    "a negative face": (TRIANGLE.replace(b"3 0 1 2", b"3 0 -1 2"), "a face of vertex"),
    "half": (TRIANGLE[:-14], "promises 4 lines or more, 2 are there"),
    "PLY of a billion vertices": (TRIANGLE.replace(b"vertex 3", b"vertex 1000000000"), "1,000,000,000 vertices; the limit"),
    "PLY of more than there is": (ply("<", QUADS).replace(b"vertex 8", b"vertex 800"), "truncated: its header promises"),
    "PLY without an end": (TRIANGLE.replace(b"end_header", b"comment"), "no end within"),
    "PLY of words": (TRIANGLE.replace(b"float x", b"word x"), "says 'property word x'"),
    "PLY with a negative list": (ply("<", MIXED).replace(b"list uchar", b"list char ").replace(b"\7\4\0", b"\7\xff\0"), "damaged"),
    "OBJ of too many vertices": (b"v 0 0 0\n" * 9, "9 vertices; the limit is 8"),
    "OBJ of a face without end": (b"v 0 0 0\n" + b"f" + b" 1" * 3_000_000, "2,999,998 faces; the limit is 2,000,000"),
    "pickled": (saved(np.array([[{}, 1, 2]]), allow_pickle=True), "holds object; expected numbers"),
    "complex": (saved(np.ones((2, 3), complex)), "holds complex128"),
    "named columns": (saved(np.zeros(3, [("x", "f4")])), "expected numbers"),
    "of four columns": (saved(np.ones((2, 4))), r"\(2, 4\); expected \(points, 3\)"),
    "normals as colours": (saved(-np.ones((2, 6))), "not colours"),
    "an array of no bytes": (huge("(8, 3)"), "32 bytes of its array are missing"),
    "an array of a billion": (huge("(1000000000, 3)"), "1,000,000,000 vertices"),
    "GLB cut off": (FILES["GLB"][:-9], "9 of .* bytes are missing"),
    "GLB 1": (struct.pack("<4sII", b"glTF", 1, 12), "of version 1"),
    "glTF with a file beside it": (
        json.dumps({**MESHES, **VIEW, "accessors": [ACCESSOR], "buffers": [{"uri": "../secret.bin"}]}).encode(),
        r"in another file \('../secret.bin'\), which is not read",
    ),
    "compressed glTF": (glb({"extensionsRequired": ["KHR_draco_mesh_compression"]}), "compressed with KHR_draco"),
    "glTF of nothing but a count": (glb({**MESHES, "accessors": [{**ACCESSOR, "count": 10**9}]}), "36,000,000,000|bytes of data"),
    "glTF whose meshes share their data": (
        glb({**SHARED, "nodes": [{"mesh": i} for i in range(5)], "meshes": SHARED["meshes"] * 5}, bytes(36)),  # type: ignore[operator]
        "15 vertices; the limit is 8",
    ),
    "glTF that places a mesh too often": (glb({**SHARED, "nodes": [{"mesh": 0}] * 4}, bytes(36)), "12 vertices; the limit is 8"),
    "glTF of many nodes": (glb({**SHARED, "nodes": [{}] * 6000}, bytes(36)), "6,000 nodes"),
    "glTF that is no tree": (glb({**SHARED, "nodes": [{"children": [2]}, {"children": [2]}, {}]}, bytes(36)), "no trees"),
    "glTF in a circle": (glb({**SHARED, "nodes": [{"mesh": 0, "children": [1]}, {"children": [0]}]}, bytes(36)), "no trees"),
    "glTF of a long chain": (glb({**SHARED, "nodes": [{"children": [i + 1]} for i in range(60)] + [{}]}, bytes(36)), "50 levels"),
    "glTF of many primitives": (
        glb({**SHARED, "meshes": [{"primitives": SHARED["meshes"][0]["primitives"] * 6000}]}, bytes(36)),  # type: ignore[index]
        "6,000 primitives",
    ),
    "glTF of nonsense": (b'{"meshes": 5}', "damaged"),
    "deep JSON": (b'{"a": ' + b"[" * 100_000, "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    data, message = REFUSED[name]
    with pytest.raises(MediaError, match=message):
        decode(data, 8, max_vertices=800 if name == "PLY of more than there is" else 8)


def test_limits() -> None:
    for limits, message in (
        ({"max_bytes": 100}, "encoded bytes, the limit is 100"),
        ({"max_vertices": 7}, "8 vertices; the limit is 7"),
        ({"max_faces": 11}, "12 faces; the limit is 11"),
    ):
        for name in ("ascii PLY", "little-endian PLY", "OBJ", "OFF", "GLB"):
            with pytest.raises(MediaError, match=message):
                decode(FILES[name], 4, **limits)
    with pytest.raises(MediaError, match="1,003 words of text; possible are 408"):
        decode(b"OFF\n3 1 0" + b" 1" * 1000, 4, max_vertices=8, max_faces=8)
    with pytest.raises(MediaError, match="0 points are asked for"):
        decode(FILES["OFF"], 0)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_or_harmless(name: str) -> None:
    """Nothing but MediaError comes out, and nothing but finite points of the asked number."""
    whole, draw = FILES[name], np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole[: draw.integers(1, len(whole) + 1)] if draw.random() < 0.3 else whole)
        for at in draw.integers(0, len(data), draw.integers(1, 6)):
            data[at] = draw.integers(0, 256)
        try:
            found = decode(bytes(data), 16, max_vertices=1000, max_faces=1000, max_bytes=100_000)
        except MediaError:
            continue
        assert found.shape == (16, 6)
        assert np.isfinite(found).all()


def test_other_files_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Materials, textures and pictures that a file names, by plain and by absolute names."""
    secret = tmp_path / "secret.mtl"
    secret.write_text("newmtl red\nKd 1 0 0\n")
    obj = f"mtllib {secret}\nusemtl red\n".encode() + FILES["OBJ of quads"]
    commented = FILES["ascii PLY"].replace(b"\nelement", f"\ncomment TextureFile {secret}\nelement".encode(), 1)
    pictured = json.loads(gltf(textured(Image.new("RGB", (2, 2), (255, 0, 0)), [0, 255, 0, 255])))
    pictured["images"] = [{"uri": str(secret)}]
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"opened {arguments}")

    for module in (builtins, io, os):
        monkeypatch.setattr(module, "open", refuse)
    found = [decode(data)[:, 3:] for data in (obj, commented, json.dumps(pictured).encode())]
    monkeypatch.undo()
    for colours, expected in zip(found, (GREY, GREY, (0, 1, 0)), strict=True):
        np.testing.assert_allclose(colours, np.broadcast_to(expected, (1200, 3)), atol=1e-6)


def test_without_trimesh_arrays_are_read_and_meshes_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trimesh", None)
    assert decode(saved(np.ones((4, 3))), 4).shape == (4, 6)
    with pytest.raises(MediaError, match=r"needs trimesh, which is not installed: pip install 'mmllm\[3d\]'"):
        decode(FILES["OFF"])
