"""What a reader of users' files leaves out, and why: one bad file costs itself, not the run.

Belongs here: the record of it, finding bad pictures. Not here: layouts (each has its own module).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from m2m.errors import InputError

VERIFY_UP_TO = 2000
"""Readers open every file at once up to so many items; beyond, what is bad is found when it is read."""


@dataclass(frozen=True)
class SetAside:
    """A file, or a line of one, that is left out."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def picture_fault(path: Path) -> str:
    """Why a picture can't be used, from its header alone; empty where it can."""
    try:
        with Image.open(path):
            return ""
    except FileNotFoundError:
        return "no such file"
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        return _short(error)


def load_picture(path: Path) -> Image.Image:
    """The decoded picture.

    Raises:
        InputError: it can't be read, or is cut short.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: {_short(error)}") from None


def require_some(found: Sequence[object], aside: Sequence[SetAside], root: Path, expected: str) -> None:
    """Refuse a source in which nothing is left.

    Raises:
        InputError: names what was expected, and the first three things that were set aside.
    """
    if not found:
        why = "; ".join(str(one) for one in aside[:3]) or "nothing of the kind is there"
        raise InputError(f"{root}: no {expected} could be read: {why} ({len(aside)} set aside)")


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "not a picture" if isinstance(error, UnidentifiedImageError) else f"can't be read: {text[:150]}"
