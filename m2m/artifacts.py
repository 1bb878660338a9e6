"""Output folders that are whole or are not outputs: manifests, the swap into place, locks.

Belongs here: `manifest.json`, `summary.json`, verifying, promoting, locking. Not here: what a stage writes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from m2m.config import Settings
from m2m.errors import ArtifactError

MANIFEST = "manifest.json"
SUMMARY = "summary.json"
ELSEWHERE = "elsewhere.json"


class FileRecord(Settings):
    """One file of an output."""

    path: str = Field(description="relative to the output folder, with forward slashes")
    size: int
    sha256: str


class Manifest(Settings):
    """What an output is and what it was made from; equal work gives equal bytes (no times, hosts, absolute paths)."""

    format_version: int = 1
    stage: str
    version: int
    fingerprint: str
    deterministic: bool = True
    config: dict[str, Any]
    inputs: dict[str, str] = Field(description="digest of each input's manifest, by the input's name")
    counts: dict[str, int]
    files: list[FileRecord]

    def encoded(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @property
    def digest(self) -> str:
        """sha256 of the manifest's bytes: the identity of the whole output."""
        return hashlib.sha256(self.encoded()).hexdigest()


class Summary(Settings):
    """What people want to see of an output: shown as Dagster metadata and in the report. Deterministic."""

    figures: dict[str, float | int | str | None] = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    curves: dict[str, dict[str, list[float]]] = Field(
        default={}, description="name -> column name -> values; first is x"
    )
    pictures: dict[str, str] = Field(default={}, description="caption -> path relative to the output folder")
    checks: dict[str, str] = Field(default={}, description="name -> empty when it holds, or why not")


class Elsewhere(Settings):
    """Where the large files of a folder lie that are not in it; stands beside the manifest, and is no part of it."""

    url: str = Field(description="of the whole folder, for example s3://bucket/outputs/gpu/generate-sets")
    ending: str = Field(default=".tar", description="of the files that lie there")


def read_elsewhere(folder: Path) -> Elsewhere | None:
    """Where the folder's large files lie; None where they lie in it.

    Raises:
        ArtifactError: the note is malformed.
    """
    try:
        return Elsewhere.model_validate_json((folder / ELSEWHERE).read_bytes())
    except OSError:
        return None
    except ValueError as error:
        raise ArtifactError(f"{folder / ELSEWHERE}: can't be read: {' '.join(str(error).split())[:200]}") from None


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None where there is none or it can't be read as one."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None


def read_summary(folder: Path) -> Summary:
    """The folder's summary.

    Raises:
        ArtifactError: missing or malformed.
    """
    try:
        return Summary.model_validate_json((folder / SUMMARY).read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / SUMMARY}: can't be read: {error}") from None


def faults(folder: Path, manifest: Manifest, *, content: bool = False) -> list[str]:
    """What of the manifest does not hold: missing files, other sizes and, with `content`, other bytes.

    Files that lie elsewhere are not asked for there: their readers find what is wrong with them.
    """
    found = []
    there = read_elsewhere(folder)
    for record in manifest.files:
        path = folder / record.path
        if there is not None and record.path.endswith(there.ending) and not path.exists():
            continue
        if not path.is_file():
            found.append(f"{record.path} is missing")
        elif path.stat().st_size != record.size:
            found.append(f"{record.path} has {path.stat().st_size} bytes, not {record.size}")
        elif content and _sha256(path) != record.sha256:
            found.append(f"{record.path} has other content than when it was made")
    return found


def require_whole(folder: Path, made_by: str) -> Manifest:
    """The manifest of a whole output.

    Raises:
        ArtifactError: it is missing or damaged; names the command that makes it.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError(f"{folder} is not there or not whole. Make it with: {made_by}")
    if found := faults(folder, manifest):
        raise ArtifactError(f"{folder} is damaged ({'; '.join(found[:3])}). Make it again with: {made_by}")
    return manifest


def record_files(folder: Path) -> list[FileRecord]:
    """Size and sha256 of every file below the folder but the manifest itself, in the order of names."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return [FileRecord(path=p.relative_to(folder).as_posix(), size=p.stat().st_size, sha256=_sha256(p)) for p in paths]


def write_json(path: Path, content: Mapping[str, Any] | list[Any], *, sort_keys: bool = True) -> None:
    """Write deterministic JSON, atomically. `sort_keys` False keeps an order that means something."""
    write_bytes(path, (json.dumps(content, indent=1, sort_keys=sort_keys, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never a part; flushed to disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def promote(partial: Path, final: Path) -> None:
    """Put a finished folder in the place of the old one."""
    sync_folder(partial)
    final.parent.mkdir(parents=True, exist_ok=True)
    old = final.with_name(f"{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(partial, final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(final: Path) -> None:
    """Undo a swap that a crash cut in two: the old output comes back if the new one did not arrive."""
    old = final.with_name(f"{final.name}.old")
    if old.exists() and not final.exists():
        os.rename(old, final)


@contextlib.contextmanager
def locked(path: Path, say: Any = print) -> Iterator[None]:
    """Hold an exclusive lock file; waits, and says so, while another process holds it. Freed by the OS on a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            say(f"{path.stem} is being made by process {f.read().strip() or '?'}; waiting for it to end")
            fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        f.truncate()
        f.write(f"{os.getpid()}\n")
        f.flush()
        yield


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
