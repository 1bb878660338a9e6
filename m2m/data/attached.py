"""An output whose tars stay where they lie, for example on S3, while all that is small of it comes here.

Belongs here: taking such an output over, verifying what stays there. Not here: reading its tars (`m2m.data.tars`).
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from m2m import artifacts
from m2m.artifacts import ELSEWHERE, MANIFEST, Elsewhere, FileRecord, Manifest
from m2m.data.block_cache import BlockCache
from m2m.data.tars import RemoteTar, blocks_of, read_remote
from m2m.errors import ArtifactError
from m2m.progress import Progress
from m2m.stages import Stage

_AT_A_TIME = 16  # requests: they wait for the store, not for this machine


def attach(url: str, stage: Stage, out: Path, progress: Progress) -> Manifest:
    """Make `out` the output that lies at `url`: manifest, tables, indices and records here, tars read from there.

    Every file that comes here is held against the manifest, of every tar its size. To every stage it is an output like
    any other.

    Raises:
        ArtifactError: no whole output of this stage lies there, or another one stands here.
    """
    url = url.rstrip("/")
    content = read_remote(f"{url}/{MANIFEST}")
    try:
        manifest = Manifest.model_validate_json(content)
    except ValueError as error:
        raise ArtifactError(f"{url}/{MANIFEST}: no manifest: {' '.join(str(error).split())[:200]}") from None
    if manifest.stage != stage.key:
        raise ArtifactError(f"{url} holds an output of {manifest.stage}, not of {stage.key}")
    standing = artifacts.read_manifest(out)
    if standing is not None and standing.digest != manifest.digest:
        raise ArtifactError(f"{out} is another output than the one at {url}: move it away, or take another profile")
    there = Elsewhere(url=url)
    coming = out.with_name(f"{out.name}.attaching-{os.getpid()}")
    try:
        _fetch(there, manifest.files, coming, progress)
        artifacts.write_bytes(coming / MANIFEST, content)
        artifacts.write_json(coming / ELSEWHERE, there.model_dump())
        artifacts.promote(coming, out)
    finally:
        shutil.rmtree(coming, ignore_errors=True)
    return manifest


def faults_elsewhere(folder: Path, manifest: Manifest) -> list[str]:
    """What of the manifest's files that lie elsewhere is not as it was: every byte is read there, none from a cache."""
    there = artifacts.read_elsewhere(folder)
    if there is None:
        return []
    found = []
    for record in manifest.files:
        if not record.path.endswith(there.ending) or (folder / record.path).exists():
            continue
        tar, digest = RemoteTar(f"{there.url}/{record.path}", BlockCache(Path(os.devnull), 0)), hashlib.sha256()
        try:
            for block in blocks_of(tar):
                digest.update(block)
        except ArtifactError as error:
            found.append(str(error))
            continue
        if digest.hexdigest() != record.sha256:
            found.append(f"{tar.url} has other content than when it was made")
    return found


def _fetch(there: Elsewhere, files: Sequence[FileRecord], folder: Path, progress: Progress) -> None:
    def take(record: FileRecord) -> None:
        url = f"{there.url}/{record.path}"
        if record.path.endswith(there.ending):
            if (size := RemoteTar(url).size) != record.size:
                raise ArtifactError(f"{url} has {size} bytes, not {record.size} as the manifest there says")
            return
        content = read_remote(url)
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise ArtifactError(f"{url} has other content than the manifest there says")
        path = folder / record.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for _ in progress.each(pool.map(take, files), total=len(files), unit="file", label="attach"):
            pass
