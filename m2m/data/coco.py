"""MSCOCO's images grouped by the category of the objects in them (the paper's section 8.3).

Belongs here: `instances_*.json` with its folder of images. Not here: other photographs (`m2m.data.photo_sets`).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2m.data.photo_sets import PhotoSet
from m2m.data.set_aside import VERIFY_UP_TO, SetAside, picture_fault, require_some
from m2m.errors import InputError

_LAYOUT = "expected images, annotations and categories, as in instances_val2017.json"


@dataclass
class CocoSets:
    """One set for each category that has an image, in the order of category ids; images in the order of ids.

    An image belongs to every category that it shows. Images that are missing or no pictures are set aside.

    Raises:
        InputError: the JSON or the folder is missing or of another kind, or no image is left.
    """

    instances: Path
    images: Path
    set_aside: list[SetAside] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.instances, self.images = Path(self.instances), Path(self.images)
        if not self.images.is_dir():
            raise InputError(f"{self.images}: no such folder; expected MSCOCO's images, such as val2017/")
        content = _read(self.instances)
        try:
            names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
            categories = {int(category["id"]): str(category["name"]) for category in content["categories"]}
            shown = {(int(a["category_id"]), int(a["image_id"])) for a in content["annotations"]}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.instances}: {error!r} is missing or wrong; {_LAYOUT}") from None
        wanted = sorted({image for _, image in shown})
        fault = picture_fault if len(wanted) <= VERIFY_UP_TO else _missing
        paths: dict[int, Path] = {}
        for image in wanted:
            name = Path(names.get(image, "")).name
            why = fault(self.images / name) if name else "annotated, but not listed under images"
            if why:
                self.set_aside.append(SetAside(name or f"image {image}", why))
            else:
                paths[image] = self.images / name
        members: dict[int, list[Path]] = {}
        for category, image in sorted(shown):
            if image in paths:
                members.setdefault(category, []).append(paths[image])
        self._sets = [PhotoSet(categories.get(c, f"category {c}"), found) for c, found in members.items()]
        require_some(self._sets, self.set_aside, self.images, "image of MSCOCO")

    def __len__(self) -> int:
        return len(self._sets)

    def __getitem__(self, i: int) -> PhotoSet:
        return self._sets[i]


def _missing(path: Path) -> str:
    return "" if path.is_file() else "no such file"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); {_LAYOUT}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: {_LAYOUT}")
    return content
