"""Pictures of many pictures, for people to look at.

Belongs here: laying images out. Not here: making them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_GAP = 2
_BACKGROUND = (255, 255, 255)
_INK = (60, 60, 60)

Row = torch.Tensor | np.ndarray | Sequence[torch.Tensor | np.ndarray | Image.Image]


def contact_sheet(
    rows: Sequence[Row], captions: Sequence[str] | None = None, *, cell: int | None = None, text_size: int = 12
) -> Image.Image:
    """One picture: a row of images for each of `rows`, with its caption above it.

    Args:
        rows: each a uint8 tensor (n, 3, H, W) or a sequence of images: uint8 (3, H, W) or (H, W, 3), or PIL. Rows may
            differ in length and images in size.
        captions: one for each row; cut where they are wider than the sheet.
        cell: side of an image on the sheet in pixels; by default the largest image's, at least 64 and at most 192.
        text_size: height of the captions in pixels.

    Raises:
        ValueError: no images, or not as many captions as rows.
    """
    if captions is not None and len(captions) != len(rows):
        raise ValueError(f"{len(captions)} captions for {len(rows)} rows")
    grid = [[_as_picture(image) for image in row] for row in rows]
    if not any(grid):
        raise ValueError("no images to show")
    if cell is None:
        cell = min(192, max(64, *(side for row in grid for image in row for side in image.size)))
    header = 0 if captions is None else text_size + 6
    width = max(len(row) for row in grid) * (cell + _GAP) + _GAP
    height = len(grid) * (header + cell + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(text_size)
    for r, row in enumerate(grid):
        top = _GAP + r * (header + cell + _GAP)
        if captions is not None:
            draw.text((_GAP + 1, top + 2), _fitting(captions[r], draw, font, width - 2 * _GAP), _INK, font)
        for c, image in enumerate(row):
            sheet.paste(_fitted(image, cell), (_GAP + c * (cell + _GAP), top + header))
    return sheet


def _as_picture(image: torch.Tensor | np.ndarray | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3:
        raise ValueError(f"expected uint8 images of three axes, got {array.dtype} of shape {array.shape}")
    if array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(array))


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(image.size)
    if scale == 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # enlarged pixels stay pixels: a 64-pixel image is not smoothed into something it is not
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _fitting(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> str:
    text = " ".join(text.split())
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f"{text}…", font) > width:
        text = text[:-1]
    return f"{text}…"
