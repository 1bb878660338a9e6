"""Objects seen from several cameras, in the layout of zero123's Objaverse renders (the paper's section 7.1).

Belongs here: `<uid>/NNN.png` with `NNN.npy`, `valid_paths.json`, splits, relative poses. Not here: what a model makes
of poses (`m2m.models.conditions`).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from m2m.data.set_aside import VERIFY_UP_TO, SetAside, load_picture, picture_fault, require_some
from m2m.errors import ConfigError, InputError

LISTING = "valid_paths.json"
_EXPECTED = "object with views (<uid>/000.png with 000.npy)"


@dataclass(frozen=True)
class PosedViews:
    """One object's views.

    `images` is uint8 (V, 3, H, W) on white; `poses` float64 (V, 3, 4), world to camera `[R, T]` in OpenGL's axes (the
    camera looks along -z, so T_z < 0 for what it sees).
    """

    uid: str
    images: torch.Tensor
    poses: torch.Tensor


@dataclass
class ObjaverseViews:
    """The objects of a folder that have at least one readable view.

    Args:
        root: holds `valid_paths.json` and a folder for each object; without the list, all sub-folders in order.
        split: "train", "validation" (also "val"), or None for all. The last 1 % of the list is validation.
        min_validation: at least so many objects are held out (a small folder has less than 1 %).
        size: images are resized to so many pixels along each side; as they are by default.
        set_aside: what was left out so far, and why. Bad files are found at once in folders of up to 2,000 objects, and
            when they are read in larger ones.

    Raises:
        InputError: no such folder, a list that is none, or nothing left in it.
    """

    root: Path
    split: str | None = None
    min_validation: int = 1
    size: int | None = None
    set_aside: list[SetAside] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = Path(self.root)
        names = _listed(self.root)
        held_out = min(len(names), max(self.min_validation, len(names) - len(names) * 99 // 100))
        match self.split:
            case None:
                chosen = names
            case "train":
                chosen = names[: len(names) - held_out]
            case "validation" | "val":
                chosen = names[len(names) - held_out :]
            case _:
                raise ConfigError(f"objaverse has the splits train and validation; {self.split!r} was asked for")
        if not chosen:
            raise InputError(
                f"{self.root}: {len(names)} objects, {held_out} of them held out: none left to {self.split}"
            )
        self._bad: set[Path] = set()
        if len(chosen) <= VERIFY_UP_TO:
            chosen = [name for name in chosen if self._pairs(name)]
        self._names = chosen
        require_some(chosen, self.set_aside, self.root, _EXPECTED)

    def __len__(self) -> int:
        return len(self._names)

    def uid(self, i: int) -> str:
        return self._names[i]

    def __getitem__(self, i: int) -> PosedViews:
        """The object's readable views.

        Raises:
            InputError: it has none.
        """
        uid, images, poses = self._names[i], [], []
        for picture, pose in self._pairs(uid):
            try:
                image = _on_white(load_picture(picture), self.size)
            except InputError as error:
                self._leave_out(picture, str(error).removeprefix(f"{picture}: "))
                continue
            if images and image.shape != images[0].shape:
                self._leave_out(picture, f"{tuple(image.shape[1:])} pixels, not {tuple(images[0].shape[1:])}")
                continue
            images.append(image)
            poses.append(pose)
        require_some(images, self.set_aside, self.root / uid, "view")
        return PosedViews(uid, torch.stack(images), torch.from_numpy(np.stack(poses)))

    def _pairs(self, uid: str) -> list[tuple[Path, np.ndarray]]:
        """Pictures that can be opened, with their poses."""
        folder, found = self.root / uid, []
        if not folder.is_dir():
            self._leave_out(folder, "no such folder")
            return []
        for picture in sorted(folder.glob("[0-9]*.png")):
            if picture in self._bad:
                continue
            pose, fault = _read_pose(picture.with_suffix(".npy"))
            fault = fault or picture_fault(picture)
            if fault:
                self._leave_out(picture, fault)
            else:
                found.append((picture, pose))
        if not found:
            self._leave_out(folder, "no readable view")
        return found

    def _leave_out(self, path: Path, reason: str) -> None:
        if path not in self._bad:
            self._bad.add(path)
            self.set_aside.append(SetAside(path.relative_to(self.root).as_posix(), reason))


def relative_poses(poses: torch.Tensor, reference: int = 0) -> torch.Tensor:
    """Camera poses seen from one of them: the condition of novel view synthesis (section 8.5.1).

    Args:
        poses: (V, 3, 4) world to camera `[R, T]`.
        reference: the view whose camera becomes the origin; its own row is `[I, 0]`.

    Returns:
        (V, 12), the rows of reference-camera-to-camera `[R R0^T, T - R R0^T T0]`; the world's frame drops out.
    """
    poses = torch.as_tensor(poses)
    rotations, shifts = poses[..., :3], poses[..., 3]
    turned = rotations @ rotations[reference].T
    moved = shifts - turned @ shifts[reference]
    return torch.cat([turned, moved[..., None]], dim=-1).flatten(1)


def _listed(root: Path) -> list[str]:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected {LISTING} beside <uid>/000.png with 000.npy")
    listing = root / LISTING
    if not listing.is_file():
        return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    try:
        names = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{listing}: not JSON: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{listing}: expected a list of folder names")
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise InputError(f"{listing}: {outside[0]!r} lies outside of {root}")
    return names


def _read_pose(path: Path) -> tuple[np.ndarray, str]:
    nothing = np.zeros((3, 4))
    try:
        pose = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return nothing, f"no pose {path.name} beside it"
    except (OSError, ValueError, EOFError) as error:
        return nothing, f"{path.name} can't be read: {' '.join(str(error).split())[:100]}"
    if not isinstance(pose, np.ndarray) or pose.shape != (3, 4) or not np.issubdtype(pose.dtype, np.floating):
        return nothing, f"{path.name} holds {getattr(pose, 'shape', 'no array')}, not a 3 x 4 pose"
    if not np.isfinite(pose).all():
        return nothing, f"{path.name} holds NaN or infinity"
    return pose.astype(np.float64), ""


def _on_white(picture: Image.Image, size: int | None) -> torch.Tensor:
    rgba = picture.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    if size is not None and flat.size != (size, size):
        flat = flat.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(flat)).permute(2, 0, 1).contiguous()
