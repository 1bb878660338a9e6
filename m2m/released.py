"""A released model's folder read back: what it was made from, whether its bytes are those that were released.

Belongs here: `provenance.json` and `SHA256SUMS`. Not here: making the folder (`m2m.export`), outputs that lie where
they were made (`m2m.provenance`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2m import artifacts
from m2m.artifacts import Manifest
from m2m.errors import InputError
from m2m.provenance import Made, SourceRecord

PROVENANCE = "provenance.json"
SUMS = "SHA256SUMS"
_ELSEWHERE = Path("elsewhere")  # a release holds the model, and of what is behind it only what is known


def as_json(made: Made) -> dict[str, Any]:
    """Everything that is known, for programs: outputs by their stage's key."""
    return {
        node.key: {
            "manifest": node.manifest.model_dump() if node.manifest else None,
            "digest": node.manifest.digest if node.manifest else None,
            "runs": node.runs,
            "sources": [{"setting": of.setting, "digest": of.digest, "path": of.path} for of in node.sources],
            "inputs": {name: of.key for name, of in node.inputs.items()},
            "gaps": node.gaps,
        }
        for node in made.each()
    }


def find_release(path: Path) -> Path | None:
    """The released folder that a path is or lies in."""
    there = path.resolve()
    return next((folder for folder in (there, *there.parents) if (folder / PROVENANCE).is_file()), None)


def read_release(folder: Path) -> Made:
    """What a released model was made from, back to the sources.

    Raises:
        InputError: its `provenance.json` can't be read.
    """
    try:
        said: Mapping[str, Any] = json.loads((folder / PROVENANCE).read_bytes())
        found = {key: _node(key, of) for key, of in said.items()}
        for key, of in said.items():
            found[key].inputs.update({name: found[other] for name, other in of["inputs"].items()})
        made = next(iter(found[key] for key in said if not any(key in of["inputs"].values() for of in said.values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(f"{folder / PROVENANCE}: can't be read: {' '.join(str(error).split())[:200]}") from None
    made.folder = folder
    return made


def changed(folder: Path) -> tuple[int, list[str]]:
    """How many files a released folder has, and what of them is not as `SHA256SUMS` says.

    Raises:
        InputError: there is none.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        raise InputError(f"{folder / SUMS} is not there: nothing says what the files were") from None
    here = {record.path: record.sha256 for record in artifacts.record_files(folder)}
    found = []
    for line in lines:
        digest, _, path = line.partition("  ")
        if path not in here:
            found.append(f"{path} is missing")
        elif here[path] != digest:
            found.append(f"{path} has other content than when it was released")
    return len(lines), found


def _node(key: str, of: Mapping[str, Any]) -> Made:
    manifest = Manifest.model_validate(of["manifest"]) if of["manifest"] else None
    sources = [SourceRecord(**source) for source in of["sources"]]
    return Made(key, _ELSEWHERE, manifest, of["runs"], sources, gaps=of["gaps"])
