"""Read the exact contents of an NLVR picture back from its pixels.

The pictures are drawn: three colours on grey, shapes at least a pixel apart, sizes of 10, 20 or 30 pixels. Connected
regions of one colour are therefore the shapes, and their filled share of the surrounding square tells circle (0.79),
square (1.0) and triangle (0.5) apart.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scene_model import BOX_COLORS, BOX_GREY, BOXES, GAP_GREY, Item, Scene


def read_picture(image: Image.Image) -> Scene:
    """The scene shown by a 400x100 NLVR picture. Raises ``ValueError`` when a region is no shape of the corpus."""
    from scipy.ndimage import find_objects, label

    pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    if pixels.shape != (100, 400, 3):
        raise ValueError(f"found a picture of {image.width}x{image.height} pixels, expected 400x100")
    items: list[Item] = []
    for x0, _, side, _ in BOXES:
        box = pixels[:, x0 : x0 + side]
        found = []
        for color, rgb in BOX_COLORS.items():
            span = np.array(rgb) - np.array(BOX_GREY)
            share = (box - np.array(BOX_GREY)) @ span / (span @ span)  # 0 on grey, 1 on the colour, linear on edges
            off = np.abs(box - np.array(BOX_GREY) - share[..., None] * span).max(-1)
            covered = np.where(off < 24, share.clip(0, 1), 0)
            regions, _ = label(covered > 0.4)
            for area in find_objects(regions):
                rows, cols = area
                size = 10 * round(max(rows.stop - rows.start, cols.stop - cols.start) / 10)
                if size not in (10, 20, 30):
                    raise ValueError(f"found a region of {size} pixels in box at x={x0}, expected 10, 20 or 30")
                x, y = round((cols.start + cols.stop - size) / 2), rows.stop - size
                filled = covered[max(0, y) : y + size, max(0, x) : x + size].sum() / size**2
                shape = "square" if filled > 0.9 else "circle" if filled > 0.64 else "triangle"
                found.append(Item(shape, color, size, x0 + x, y, rgb))
        items += sorted(found, key=lambda i: -i.y)  # a tower is listed from its base
    stacked = all(i.shape == "square" and i.size == 20 and i.x % 150 == 40 for i in items)
    return Scene("tower" if stacked else "scatter", 400, 100, GAP_GREY, BOXES, tuple(items))
