"""Sets of photographs that share a category, as folders: `<category>/<subject>/NN.jpg`.

Belongs here: this layout, and reading one photograph as a square. Not here: MSCOCO's layout (`m2m.data.coco`).
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from m2m.data.set_aside import SetAside, load_picture, picture_fault, require_some
from m2m.errors import InputError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class PhotoSet:
    """Photographs of one category (the paper groups MSCOCO's images so; section 8.3)."""

    category: str
    paths: list[Path]


@dataclass
class PhotoSets:
    """One set for each category of a folder, in the order of names.

    Raises:
        InputError: no such folder, or no photograph in it.
    """

    root: Path
    set_aside: list[SetAside] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = Path(self.root)
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder; expected <category>/<subject>/NN.jpg")
        self._sets = []
        for category in sorted(path for path in self.root.iterdir() if path.is_dir()):
            paths = [path for path in sorted(category.glob("*/*")) if path.suffix.lower() in ENDINGS]
            faults = {path: picture_fault(path) for path in paths}
            self.set_aside += [SetAside(p.relative_to(self.root).as_posix(), f) for p, f in faults.items() if f]
            if kept := [path for path in paths if not faults[path]]:
                self._sets.append(PhotoSet(category.name, kept))
        require_some(self._sets, self.set_aside, self.root, "photograph (<category>/<subject>/NN.jpg)")

    def __len__(self) -> int:
        return len(self._sets)

    def __getitem__(self, i: int) -> PhotoSet:
        return self._sets[i]


def load_image(path: Path, size: int) -> torch.Tensor:
    """A photograph upright, cut to its central square and resized: uint8 (3, size, size). Transparent is white.

    Raises:
        InputError: it can't be read.
    """
    picture = ImageOps.exif_transpose(load_picture(path))
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    # cut, then resize: a resize of a box looks beyond its edges
    square = picture.convert("RGB").crop((left, top, left + side, top + side))
    square = square.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
