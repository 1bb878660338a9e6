"""Illustrated procedures: wikiHow articles in the layout of the VGSI release (the paper's section 7.1).

Belongs here: `WikihowText_data.json` with `wiki_images/{train,test}/<step_id>.png`. Not here: step positions as a
condition (`m2m.models.conditions`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from m2m.data.photo_sets import load_image
from m2m.data.set_aside import VERIFY_UP_TO, SetAside, picture_fault, require_some
from m2m.errors import ConfigError, InputError

ARTICLES, IMAGES = "WikihowText_data.json", "wiki_images"
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Procedure:
    """One method of an article: its illustrated steps, in order."""

    goal: str
    method: str
    step_ids: list[str]
    headlines: list[str]
    image_paths: list[Path]


@dataclass
class Procedures:
    """The procedures of a split: those whose pictures lie in its folder.

    A step without a picture there is no step of the procedure; a malformed line costs one article, a bad picture one
    step (found at once in folders of up to 2,000 procedures, else when it is read).

    Raises:
        InputError: the articles or the pictures are missing, or nothing is left.
    """

    root: Path
    split: str = "train"
    set_aside: list[SetAside] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = Path(self.root)
        if self.split not in SPLITS:
            raise ConfigError(f"VGSI has the splits {' and '.join(SPLITS)}; {self.split!r} was asked for")
        folder = self.root / IMAGES / self.split
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; expected pictures of steps, <step_id>.png")
        pictures = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in (".png", ".jpg")}
        found = [p for article in self._articles() for p in _procedures(article, pictures)]
        if len(found) <= VERIFY_UP_TO:
            found = [p for p in (self._without(p, self._faults(p)) for p in found) if p.step_ids]
        self._found = found
        require_some(found, self.set_aside, self.root, f"illustrated procedure of the {self.split} split")

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, i: int) -> Procedure:
        return self._found[i]

    def images(self, i: int, size: int) -> torch.Tensor:
        """The steps' pictures, uint8 (steps, 3, size, size); a step whose picture can't be read is dropped for good.

        Raises:
            InputError: none is left.
        """
        procedure, images, faults = self._found[i], [], {}
        for path in procedure.image_paths:
            try:
                images.append(load_image(path, size))
            except InputError as error:
                faults[path] = str(error).removeprefix(f"{path}: ")
        self._found[i] = self._without(procedure, faults)
        require_some(images, self.set_aside, self.root, f"picture of the procedure {procedure.goal!r}")
        return torch.stack(images)

    def _articles(self) -> Iterator[dict[str, Any]]:
        path = self.root / ARTICLES
        try:
            with path.open(encoding="utf-8", newline="\n") as f:
                for number, line in enumerate(f, 1):
                    if not line.strip():
                        continue
                    try:
                        article = json.loads(line)
                        _require_article(article)
                    except (ValueError, KeyError, TypeError) as error:
                        reason = f"not an article: {type(error).__name__}: {error}"
                        self.set_aside.append(SetAside(f"{ARTICLES}:{number}", reason[:200]))
                        continue
                    yield article
        except OSError as error:
            raise InputError(
                f"{path}: can't be read ({error.strerror}); expected VGSI's articles, one a line"
            ) from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8: {error}") from None

    def _faults(self, procedure: Procedure) -> dict[Path, str]:
        faults = {path: picture_fault(path) for path in procedure.image_paths}
        return {path: fault for path, fault in faults.items() if fault}

    def _without(self, procedure: Procedure, faults: dict[Path, str]) -> Procedure:
        if not faults:
            return procedure
        self.set_aside += [SetAside(p.relative_to(self.root).as_posix(), fault) for p, fault in faults.items()]
        kept = [i for i, path in enumerate(procedure.image_paths) if path not in faults]
        return replace(
            procedure,
            step_ids=[procedure.step_ids[i] for i in kept],
            headlines=[procedure.headlines[i] for i in kept],
            image_paths=[procedure.image_paths[i] for i in kept],
        )


def _require_article(article: Any) -> None:
    str(article["goal"])
    for method in article["methods"]:
        for step in method["steps"]:
            if not isinstance(step["step_id"], str):
                raise TypeError(f"step_id {step['step_id']!r} is no text")


def _procedures(article: dict[str, Any], pictures: dict[str, Path]) -> Iterator[Procedure]:
    for method in article["methods"]:
        steps = [step for step in method["steps"] if step["step_id"] in pictures]
        if steps:
            yield Procedure(
                goal=str(article["goal"]),
                method=str(method.get("name") or ""),
                step_ids=[step["step_id"] for step in steps],
                headlines=[str(step.get("headline") or "") for step in steps],
                image_paths=[pictures[step["step_id"]] for step in steps],
            )
