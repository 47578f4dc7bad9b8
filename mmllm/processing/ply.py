"""PLY before a library reads it: the header's counts against the bytes behind it, and faces of several sizes as triangles."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

from mmllm.errors import MediaError

HEADER = 65_536
"""Bytes of the longest header that is read."""
_CODES = {"char": "b", "uchar": "B", "short": "h", "ushort": "H", "int": "i", "uint": "I", "float": "f", "double": "d"}
_CODES |= {
    "int8": "b",
    "uint8": "B",
    "int16": "h",
    "uint16": "H",
    "int32": "i",
    "uint32": "I",
    "float32": "f",
    "float64": "d",
}
_INDICES = ("vertex_indices", "vertex_index")


@dataclass
class Element:
    """``count`` rows of ``properties``: (name, code of ``struct``, code of a list's length; "" where it is no list)."""

    name: str
    count: int
    properties: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def least(self) -> int:
        """Bytes of a row in a binary file, lists being empty."""
        return sum(struct.calcsize(length or code) for _, code, length in self.properties)

    @property
    def lists(self) -> bool:
        return any(length for _, _, length in self.properties)


@dataclass
class Header:
    """``order`` is that of the bytes for ``struct``, "" in a text; the elements' rows begin at byte ``end``."""

    order: str
    elements: list[Element]
    end: int

    def count(self, name: str) -> int:
        """Rows of the element ``name``."""
        return sum(element.count for element in self.elements if element.name == name)


def read_header(data: bytes) -> Header:
    """Raises ``MediaError`` when it has no end, or says what PLY has no meaning for."""
    stop = data.find(b"end_header", 0, HEADER)
    end = data.find(b"\n", stop) + 1
    if stop < 0 or not end:
        raise MediaError(f"the PLY file's header has no end within {HEADER:,} bytes: it is damaged; export it again")
    orders = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
    order, elements = None, []
    for line in data[:stop].decode("latin-1").splitlines()[1:]:
        match line.split():
            case ["format", name, _] if name in orders:
                order = orders[name]
            case ["element", name, count] if count.isdecimal():
                elements.append(Element(name, int(count)))
            case ["property", "list", length, kind, name] if elements and length in _CODES and kind in _CODES:
                elements[-1].properties.append((name, _CODES[kind], _CODES[length]))
            case ["property", kind, name] if elements and kind in _CODES:
                elements[-1].properties.append((name, _CODES[kind], ""))
            case [] | ["comment" | "obj_info", *_]:
                pass
            case _:
                raise MediaError(
                    f"the PLY file's header says {line!r:.80}, which PLY 1.0 does not know; export it again"
                )
    if order is None:
        raise MediaError("the PLY file's header names no format; export it again")
    return Header(order, elements, end)


def check_length(data: bytes, header: Header) -> None:
    """Raises ``MediaError`` when the bytes behind the header, or the lines of a text, cannot hold what it promises."""
    if header.order:
        least, there, what = sum(e.count * e.least for e in header.elements), len(data) - header.end, "bytes"
    else:
        least = sum(element.count for element in header.elements)
        there, what = data.count(b"\n", header.end) + (not data.endswith(b"\n")), "lines"
    if least > there:
        raise MediaError(
            f"the PLY file is truncated: its header promises {least:,} {what} or more, {there:,} are there; save or "
            "download it again"
        )


def as_triangles(data: bytes, header: Header, limit: int) -> bytes:
    """A binary file whose faces all have one size, as it is; else with its faces as triangles, without their other
    properties: trimesh reads rows of one length only. Raises ``MediaError`` for more than ``limit`` triangles.
    """
    names = [element.name for element in header.elements]
    if not header.order or names[:2] != ["vertex", "face"] or header.elements[0].lists:
        return data
    vertex, face = header.elements[:2]
    start = header.end + vertex.count * vertex.least
    corners: list[int] = []
    triangles: list[tuple[int, int, int]] = []
    position = start
    for _ in range(face.count):
        for name, code, length in face.properties:
            count = 1
            if length:
                (count,) = struct.unpack_from(f"{header.order}{length}", data, position)
                position += struct.calcsize(length)
            if count < 0:
                raise MediaError(f"the PLY file has a list of {count} values: it is damaged; export it again")
            if length and name in _INDICES:
                polygon = struct.unpack_from(f"{header.order}{count}{code}", data, position)
                if len(triangles) + count - 2 > limit:
                    raise MediaError(f"the PLY file has more than {limit:,} triangles (max_faces); make it simpler")
                corners.append(count)
                triangles += [(polygon[0], polygon[i], polygon[i + 1]) for i in range(1, count - 1)]
            position += count * struct.calcsize(code)
    if len(set(corners)) < 2:
        return data
    lines = [
        "ply",
        f"format binary_{'little' if header.order == '<' else 'big'}_endian 1.0",
        f"element vertex {vertex.count}",
    ]
    kinds = {code: kind for kind, code in reversed(_CODES.items())}
    lines += [f"property {kinds[code]} {name}" for name, code, _ in vertex.properties]
    lines += [f"element face {len(triangles)}", "property list uchar int vertex_indices", "end_header", ""]
    rows = np.empty(len(triangles), [("count", "u1"), ("corners", f"{header.order}i4", 3)])
    rows["count"], rows["corners"] = 3, triangles
    return "\n".join(lines).encode("latin-1") + data[header.end : start] + rows.tobytes()
