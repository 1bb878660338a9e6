"""Pictures side by side: one row a set, preceding images and what was made of them kept apart.

Belongs here: layout and deterministic bytes. Not here: which pictures are shown.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from m2m import artifacts

_SMALLEST, _LARGEST, _LARGEST_PNG = 64, 256, 128  # pixels of one picture
_INK, _PAPER = (120, 120, 128), (255, 255, 255)


def write_grid(path: Path, rows: Sequence[Sequence[Tensor]]) -> Path:
    """Write rows of groups of pictures as one, with a line between groups.

    Args:
        path: without its ending.
        rows: for each row its groups, each uint8 (n, 3, H, W), all of one size; rows may differ in length. Small
            pictures are enlarged by a whole factor, large ones made smaller: a grid is to be looked at as a whole.

    Returns:
        The file that was written: PNG of small pictures, JPEG of photograph-sized ones.
    """
    height, width = rows[0][0].shape[-2:]
    factor = max(1, -(-_SMALLEST // width))
    scale = min(1.0, _LARGEST / max(height, width))
    height, width = round(height * factor * scale), round(width * factor * scale)
    gap = max(2, width // 24)
    between = gap * 5
    length = max(sum(len(group) for group in row) * (width + gap) + (len(row) - 1) * between for row in rows)
    sheet = np.full((len(rows) * (height + gap) + gap, length + gap, 3), _PAPER, np.uint8)
    for line, row in enumerate(rows):
        top, left = gap + line * (height + gap), gap
        for place, group in enumerate(row):
            if place:
                middle = left + between // 2 - gap // 2
                sheet[top - gap : top + height + gap, middle : middle + max(1, gap // 3)] = _INK
                left += between
            for picture in group:
                pixels = picture.permute(1, 2, 0).cpu().numpy().repeat(factor, 0).repeat(factor, 1)
                if scale < 1:
                    pixels = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
                sheet[top : top + height, left : left + width] = pixels
                left += width + gap
    buffer = io.BytesIO()
    if max(height, width) > _LARGEST_PNG:
        path = path.with_name(f"{path.name}.jpg")
        Image.fromarray(sheet).save(buffer, "JPEG", quality=90)
    else:
        path = path.with_name(f"{path.name}.png")
        Image.fromarray(sheet).save(buffer, "PNG", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_bytes(path, buffer.getvalue())
    return path
