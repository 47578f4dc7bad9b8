"""Encoded meshes and point clouds to points with colours: trimesh reads, surfaces are sampled, memory is bounded."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mmllm.errors import MediaError
from mmllm.processing.mesh_files import check_counts, checked, sniff
from mmllm.processing.sources import Limits

if TYPE_CHECKING:
    import trimesh

Array = NDArray[Any]

GREY = 0.4
"""The colour of what has none, as in ULIP-2 (data/dataset_3d.py of salesforce/ULIP)."""
LARGEST = 1e18
"""Largest coordinate that is read; squares of larger ones leave float32."""
_PICTURES = ("PNG", "JPEG", "WEBP")

logging.getLogger("trimesh").addHandler(logging.NullHandler())  # or what it says of odd files would go to stderr


def decode_point_cloud(data: bytes, limits: Limits, *, points: int) -> NDArray[np.float32]:
    """``points`` points of one mesh or point cloud: ``(points, 6)``, x, y, z as in the file, then red, green, blue, 0 to 1.

    A mesh is sampled on its surface, evenly by area; all parts of a scene are put in their places first. What has points
    alone gives some of them, drawn without repetition and in their order, or all of them, repeated in turn where they are too
    few. What is drawn depends on the bytes alone. Colours are those of vertices, faces or, in glTF, materials and textures
    inside the file; ``GREY`` where there are none. An ``.npy`` file holds ``(P, 3)`` or ``(P, 6)``.

    The format is told by the first bytes, never by a name; see ``mesh_files.FORMATS``. All but ``.npy`` need trimesh, the
    extra ``3d``. Other files that a file names (materials, textures, buffers) are never opened.

    Raises ``MediaError``, and nothing else, for other formats, files without points, coordinates that are NaN, infinite or
    beyond ``LARGEST``, more than ``limits.max_bytes``, ``max_vertices`` or ``max_faces``, and for truncated or damaged files.
    """
    if not 1 <= points <= limits.max_vertices:
        raise MediaError(f"{points:,} points are asked for; possible are 1 to {limits.max_vertices:,} (max_vertices)")
    if len(data) > limits.max_bytes:
        raise MediaError(
            f"the point cloud has {len(data):,} encoded bytes, the limit is {limits.max_bytes:,} (max_bytes)"
        )
    kind = sniff(data)
    draw = np.random.default_rng(int.from_bytes(hashlib.sha256(data).digest()[:8]))
    try:
        pieces = [_array(data, limits)] if kind == "npy" else _pieces(kind, checked(kind, data, limits), limits)
        return _sample(pieces, points, draw)
    except MediaError:
        raise
    except ModuleNotFoundError as error:
        raise MediaError(
            f"reading {kind} files needs trimesh, which is not installed: pip install 'mmllm[3d]'"
        ) from error
    except Exception as error:  # trimesh raises anything on hostile bytes
        detail = " ".join(str(error).split())[:200]
        raise MediaError(f"the {kind} file is truncated or damaged ({detail}); export or download it again") from error


@dataclass(frozen=True)
class _Piece:
    """``vertices (V, 3)`` float64, triangles ``faces (F, 3)`` of them (none: a cloud), and the colours of points.

    ``colours(faces, weights)`` are those, ``(n, 3)``, of n points that lie in triangles ``faces (n,)`` with barycentric
    ``weights (n, 3)``; of a cloud, of the vertices ``faces``.
    """

    vertices: Array
    faces: Array
    colours: Callable[[Array, Array], Array]


def _sample(pieces: list[_Piece], points: int, draw: np.random.Generator) -> NDArray[np.float32]:
    pieces = [piece for piece in pieces if len(piece.vertices)]
    if not pieces:
        raise MediaError("the file has no points; export it again with its geometry")
    scale = 0.0
    for piece in pieces:
        if not np.isfinite(piece.vertices).all():
            raise MediaError("the point cloud has NaN or infinite coordinates; export it again")
        scale = max(scale, float(np.abs(piece.vertices).max()))
    if scale > LARGEST:
        raise MediaError(
            f"the point cloud has a coordinate of {scale:.3g}; possible are up to {LARGEST:g}; scale it down"
        )
    areas = [_areas(piece, scale or 1.0) for piece in pieces]
    ends = np.cumsum(np.concatenate(areas))
    if len(ends) and ends[-1] > 0:
        firsts = np.cumsum([0, *(len(area) for area in areas)])
        chosen = np.searchsorted(ends, draw.random(points) * ends[-1], side="right").clip(max=len(ends) - 1)
        u, v = np.sqrt(draw.random(points)), draw.random(points)  # even over a triangle: Osada et al. 2002, equation 1
        weights = np.stack([1 - u, u * (1 - v), u * v], axis=1)
    else:  # no surface: the vertices themselves
        firsts = np.cumsum([0, *(len(piece.vertices) for piece in pieces)])
        chosen, weights = _some(int(firsts[-1]), points, draw), np.ones((points, 1))
        pieces = [_Piece(piece.vertices, np.arange(len(piece.vertices))[:, None], piece.colours) for piece in pieces]
    found = np.empty((points, 6), np.float32)
    for piece, first, stop in zip(pieces, firsts, firsts[1:], strict=False):
        at = np.flatnonzero((chosen >= first) & (chosen < stop))
        inside = chosen[at] - first
        corners = piece.vertices[piece.faces[inside]]  # (n, corners, 3)
        found[at, :3] = (corners * weights[at, :, None]).sum(axis=1)
        found[at, 3:] = piece.colours(inside, weights[at])
    return found


def _areas(piece: _Piece, scale: float) -> Array:
    """Twice the area of each triangle, in units of ``scale`` so that no square overflows."""
    corners = piece.vertices[piece.faces.reshape(-1, 3)] / scale
    areas: Array = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    return areas


def _some(there: int, wanted: int, draw: np.random.Generator) -> Array:
    if there <= wanted:
        return np.resize(np.arange(there), wanted)
    return np.sort(draw.choice(there, wanted, replace=False))


def _array(data: bytes, limits: Limits) -> _Piece:
    """NumPy's format, without its pickles. The header is compared with the bytes before anything is allocated."""
    file = io.BytesIO(data)
    version = npy.read_magic(file)
    headers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in headers:
        raise MediaError(
            f"the .npy file is of version {version[0]}.{version[1]}; opened are 1.0 and 2.0; save numbers alone"
        )
    shape, by_columns, dtype = headers[version](file)
    if dtype.kind not in "fiu":
        raise MediaError(
            f"the .npy file holds {dtype}; expected numbers (float or integer): x, y, z, or x, y, z, r, g, b"
        )
    if len(shape) != 2 or shape[1] not in (3, 6):
        raise MediaError(
            f"the .npy file's array is {shape}; expected (points, 3), or (points, 6) with red, green, blue"
        )
    check_counts(shape[0], 0, limits)
    missing = shape[0] * shape[1] * dtype.itemsize - (len(data) - file.tell())
    if missing > 0:
        raise MediaError(f"the .npy file is truncated: {missing:,} bytes of its array are missing")
    flat = np.frombuffer(data, dtype, shape[0] * shape[1], offset=file.tell())
    array = flat.reshape(shape, order="F" if by_columns else "C").astype(np.float64)
    return _Piece(array[:, :3], _NO_FACES, _of_vertices(_unit(array[:, 3:], dtype) if shape[1] == 6 else None))


def _unit(colours: Array, dtype: np.dtype[Any]) -> Array:
    """Colours from 0 to 1, or, in whole numbers or beyond 1, to 255."""
    largest = colours.max(initial=0.0)
    if not 0 <= colours.min(initial=0.0) <= largest <= 255:  # NaN is not either
        raise MediaError(
            "the .npy file's last three columns are not colours of 0 to 1, or 0 to 255; give x, y, z alone"
        )
    return colours / 255 if dtype.kind in "iu" or largest > 1 else colours


_NO_FACES: Array = np.zeros((0, 3), np.int64)


def _pieces(kind: str, data: bytes, limits: Limits) -> list[_Piece]:
    """All parts of a file that trimesh reads, in their places."""
    import trimesh

    # Materials of these formats are files of their own. There is no resolver: nothing else can be opened.
    plain: dict[str, Any] = {"skip_materials": True} if kind in ("obj", "ply") else {}
    file_type = "glb" if kind == "gltf" else kind
    scene = trimesh.load_scene(io.BytesIO(data), file_type=file_type, process=False, **plain)
    pieces, vertices, faces = [], 0, 0
    for node in scene.graph.nodes_geometry:
        place, name = scene.graph[node]
        geometry = scene.geometry[name]
        if not isinstance(geometry, (trimesh.Trimesh, trimesh.PointCloud)):
            continue  # curves
        at = np.asarray(geometry.vertices, np.float64)
        of_mesh = isinstance(geometry, trimesh.Trimesh)
        corners = np.asarray(geometry.faces, np.int64) if of_mesh else _NO_FACES
        vertices, faces = vertices + len(at), faces + len(corners)
        check_counts(vertices, faces, limits)
        if len(corners) and not 0 <= corners.min() <= corners.max() < len(at):
            raise MediaError(
                f"the {kind} file has a face of vertex {corners.max()}, but {len(at)} vertices; export it again"
            )
        with np.errstate(all="ignore"):  # what is not finite is refused later
            moved = at @ place[:3, :3].T + place[:3, 3]
        colours = _of_mesh(geometry, corners, limits) if len(corners) else _of_cloud(geometry)
        pieces.append(_Piece(moved, corners, colours))
    return pieces


# Colours --------------------------------------------------------------------------------------------------------------
def _of_vertices(colours: Array | None, faces: Array | None = None) -> Callable[[Array, Array], Array]:
    """Colours ``(V, 3)`` of vertices, between those of a triangle's corners; ``GREY`` without any."""
    if colours is None:
        return lambda inside, weights: np.full((len(inside), 3), GREY)
    if faces is None or not len(faces):
        return lambda inside, weights: colours[inside]
    return lambda inside, weights: (colours[faces[inside]] * weights[..., None]).sum(axis=1)


def _of_cloud(geometry: Any) -> Callable[[Array, Array], Array]:
    import trimesh

    if isinstance(geometry, trimesh.PointCloud):
        colours = np.asarray(geometry.colors)
        return _of_vertices(colours[:, :3] / 255 if len(colours) == len(geometry.vertices) else None)
    return _of_vertices(None)


def _of_mesh(mesh: trimesh.Trimesh, faces: Array, limits: Limits) -> Callable[[Array, Array], Array]:
    visual = mesh.visual
    match visual.kind:
        case "vertex":
            return _of_vertices(np.asarray(visual.vertex_colors)[:, :3] / 255, faces)
        case "face":
            colours = np.asarray(visual.face_colors)[:, :3] / 255
            return lambda inside, weights: colours[inside]
        case "texture":
            return _of_material(visual, faces, limits)
    return _of_vertices(None)


def _of_material(visual: Any, faces: Array, limits: Limits) -> Callable[[Array, Array], Array]:
    """glTF's base colour: factor times texture times colours of the vertices (glTF 2.0, 3.9.2)."""
    from trimesh.visual.color import to_rgba
    from trimesh.visual.material import PBRMaterial

    material = visual.material
    if not isinstance(material, PBRMaterial):
        return _of_vertices(None)
    factor = np.ones(3) if material.baseColorFactor is None else to_rgba(material.baseColorFactor)[:3] / 255
    tint = visual.vertex_attributes.get("color")
    tints = _of_vertices(
        np.ones((1, 3)) if tint is None else to_rgba(tint)[:, :3] / 255, None if tint is None else faces
    )
    if material.baseColorTexture is None or visual.uv is None:
        return lambda inside, weights: factor * (1.0 if tint is None else tints(inside, weights))
    picture = _picture(material.baseColorTexture, limits)
    uv = np.asarray(visual.uv, np.float64)

    def colours(inside: Array, weights: Array) -> Array:
        at = (uv[faces[inside]] * weights[..., None]).sum(axis=1) % 1.0  # textures repeat
        height, width = picture.shape[:2]
        rows = ((1 - at[:, 1]) * height).astype(np.int64).clip(0, height - 1)
        columns = (at[:, 0] * width).astype(np.int64).clip(0, width - 1)
        found: Array = factor * picture[rows, columns] / 255 * (1.0 if tint is None else tints(inside, weights))
        return found

    return colours


def _picture(image: Any, limits: Limits) -> NDArray[np.uint8]:
    """A texture's pixels. trimesh has read its header only, so the limits are checked before it is decoded."""
    if image.format not in _PICTURES:
        raise MediaError(
            f"the glTF file has a texture in {image.format}; opened are PNG, JPEG and WebP; export it again"
        )
    if image.width * image.height > limits.max_pixels:
        raise MediaError(
            f"the glTF file has a texture of {image.width}x{image.height} pixels; the limit is {limits.max_pixels:,} (max_pixels)"
        )
    return np.asarray(image.convert("RGB"))
