"""Checkpoints of a training: written whole or not at all, checked when read, the last few and the best kept.

Belongs here: folders `step-NNNNNN` and `best-NNNNNN`, their files, choosing the newest good one. Not here: when to
write one, which one is the best.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from m2m.artifacts import sync_folder, write_json

FORMAT = 1
_STATE = "state.json"
_LOG = "training_log.jsonl"
_STEP, _BEST = "step", "best"


@dataclass(frozen=True)
class Checkpoint:
    """All that a training needs to go on as if it had never stopped."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]  # file name without suffix -> tensor name -> tensor
    log: str = ""
    belongs_to: str = ""  # a checkpoint of other settings is never picked up
    numbers: Mapping[str, int] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step-NNNNNN` and remove all but the newest `keep`.

    The files are written in a folder beside it, flushed, and renamed into place: after a crash there is a whole
    checkpoint or none of that name.
    """
    return _save(folder, _STEP, checkpoint, keep)


def save_best(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/best-NNNNNN` as `save` does; the best one before it goes when it stands."""
    return _save(folder, _BEST, checkpoint, 1)


def load_newest(folder: Path, belongs_to: str | None, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole and belongs to these settings (None: to any); bad ones are named and passed
    over.
    """
    return _load_newest(folder, _STEP, belongs_to, say)


def load_best(folder: Path, belongs_to: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The best checkpoint, if it is whole and belongs to these settings."""
    return _load_newest(folder, _BEST, belongs_to, say)


def _save(folder: Path, kind: str, checkpoint: Checkpoint, keep: int) -> Path:
    final = folder / f"{kind}-{checkpoint.step:06d}"
    temporary = folder / f".{final.name}.tmp"
    for stale in folder.glob(f".{kind}-*.tmp"):
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)
    for name, tensors in checkpoint.tensors.items():
        whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        save_file(whole, temporary / f"{name}.safetensors")
    (temporary / _LOG).write_text(checkpoint.log, encoding="utf-8")
    files = sorted(temporary.iterdir())
    for path in files:
        _flush(path)
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "belongs_to": checkpoint.belongs_to,
        "numbers": dict(checkpoint.numbers),
        "files": {path.name: _sha256(path) for path in files},
    }
    write_json(temporary / _STATE, state)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    sync_folder(folder)
    # what was just written stays, also where a damaged one that was passed over has a higher number
    for old in [path for path in _newest_first(folder, kind) if path != final][keep - 1 :]:
        shutil.rmtree(old)
    return final


def _load_newest(folder: Path, kind: str, belongs_to: str | None, say: Callable[[str], None]) -> Checkpoint | None:
    for path in _newest_first(folder, kind):
        try:
            return _load(path, belongs_to)
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"{path} is not used: {error}")
    return None


def _load(path: Path, belongs_to: str | None) -> Checkpoint:
    state = json.loads((path / _STATE).read_bytes())
    if state["format"] != FORMAT:
        raise ValueError(f"it has format {state['format']}, not {FORMAT}")
    if belongs_to not in (None, state["belongs_to"]):
        raise ValueError("it was made with other settings")
    for name, digest in state["files"].items():
        if _sha256(path / name) != digest:
            raise ValueError(f"{name} is damaged")
    tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in state["files"] if name != _LOG}
    return Checkpoint(state["step"], tensors, (path / _LOG).read_text("utf-8"), state["belongs_to"], state["numbers"])


def _newest_first(folder: Path, kind: str) -> list[Path]:
    numbers = {path: path.name.removeprefix(f"{kind}-") for path in folder.glob(f"{kind}-*")}
    numbered = [path for path, number in numbers.items() if number.isdecimal()]
    return sorted(numbered, key=lambda path: int(numbers[path]), reverse=True)


def _flush(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
