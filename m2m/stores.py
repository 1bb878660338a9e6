"""`python -m m2m store send|fetch`: outputs in an object store, every version in a folder of its own.

`URL/PROFILE/STAGE[/VARIANT]/VERSION/` holds an output as it lies on disk, its manifest sent last; VERSION is the
beginning of the manifest's digest. The manifest beside the versions is that of the last one sent.

Belongs here: any place that fsspec can name (`s3://bucket/path`, a folder). Not here: what is sent by itself after a
run (`orchestration.lineage.store_record`), DVC's remotes.
"""

import argparse
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2m import artifacts
from m2m.arguments import add_profile_argument, open_profile
from m2m.artifacts import MANIFEST, FileRecord, Manifest
from m2m.errors import ArtifactError, M2MError
from m2m.stages import STAGES, Stage, find_stage

_VERSION = 16


class StoreError(M2MError):
    """An object store does not have what was asked for, or can't be reached or written to."""


def send(folder: Path, manifest: Manifest, url: str, profile: str) -> str:
    """Send a whole output; what an earlier, interrupted call has sent is not sent again. Returns its address.

    Raises:
        ArtifactError: not all of its files are here.
        StoreError: the store can't be written to.
    """
    if (elsewhere := artifacts.read_elsewhere(folder)) is not None:
        raise ArtifactError(f"{folder}: its tars lie at {elsewhere.url}, not here: copy them from there")
    if found := artifacts.faults(folder, manifest):
        raise ArtifactError(f"{folder} is not whole: {'; '.join(found[:3])}")
    with _reasons(url, f"sending {manifest.stage}"):
        fs, base = _open(url, STAGES[manifest.stage], profile)
        there = posixpath.join(base, manifest.digest[:_VERSION])
        if not fs.exists(f"{there}/{MANIFEST}"):
            sizes = _sizes(fs, there)
            for record in manifest.files:
                if sizes.get(record.path) != record.size:  # a store has an object whole or not at all
                    fs.put_file(str(folder / record.path), f"{there}/{record.path}")
            now = artifacts.read_manifest(folder)
            if now is None or now.digest != manifest.digest:
                raise StoreError(f"{folder} was made anew while it was sent; send it again")
            fs.pipe_file(f"{there}/{MANIFEST}", manifest.encoded())
        fs.pipe_file(f"{base}/{MANIFEST}", manifest.encoded())
        return str(fs.unstrip_protocol(there))


def sent_to(url: str, manifest: Manifest, profile: str) -> str | None:
    """The address at which a store has this very version, whole; None where it has not.

    Raises:
        StoreError: the store can't be read.
    """
    with _reasons(url, f"looking for {manifest.stage}"):
        fs, base = _open(url, STAGES[manifest.stage], profile)
        there = posixpath.join(base, manifest.digest[:_VERSION])
        return str(fs.unstrip_protocol(there)) if fs.exists(f"{there}/{MANIFEST}") else None


def fetch(url: str, stage: Stage, profile: str, folder: Path, version: str | None = None) -> Manifest:
    """Bring an output; files that are here are kept, also those of an interrupted call. Every byte is checked.

    Args:
        version: beginning of a manifest's digest. By default that of the manifest which is here without its files (DVC
            versions the manifests alone, for example), or else the last one sent.

    Raises:
        StoreError: there is no such version, the store can't be read, or what came is not what the manifest says.
    """
    here = artifacts.read_manifest(folder)
    if version is None and here is not None and artifacts.faults(folder, here):
        version = here.digest
    with _reasons(url, f"fetching {stage.key}"):
        fs, base = _open(url, stage, profile)
        manifest = _manifest(fs, base if version is None else f"{base}/{version[:_VERSION]}")
        there = posixpath.join(base, manifest.digest[:_VERSION])
        same = here is not None and here.digest == manifest.digest
        # the name under which the stage itself would go on with what is there
        target = folder if same else folder.with_name(f"{folder.name}.partial-{manifest.fingerprint[:12]}")
        for record in manifest.files:
            if not _whole(target, manifest, record):
                _bring(fs, f"{there}/{record.path}", target / record.path)
                if not _whole(target, manifest, record):
                    raise StoreError(f"{url}: {there}/{record.path} is not what its manifest says")
    if not same:
        artifacts.write_bytes(target / MANIFEST, manifest.encoded())
        artifacts.promote(target, folder)
    return manifest


def advice(said: str) -> str:
    """What to look at first when a store's client said this; empty where nothing is known of it."""
    if re.search(r"credential|forbidden|denied|\b40[13]\b|signature|access ?key", said, re.IGNORECASE):
        return " (are the keys right, is there such a bucket, and may they write to it?)"
    if re.search(r"no ?such ?bucket|bucket does not exist", said, re.IGNORECASE):
        return " (is there such a bucket?)"
    if re.search(r"could not connect|connection refused|timed? ?out", said, re.IGNORECASE):
        return " (is it up, and the endpoint's URL right?)"
    return ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("send", "fetch"))
    add_profile_argument(parser)
    parser.add_argument("stage", help="for example generate-sets or pretrain@self")
    parser.add_argument("url", help="for example s3://bucket/path; AWS_ENDPOINT_URL says where S3 is")
    parser.add_argument("--version", help="fetch: the beginning of a manifest's digest; the last one sent by default")


def main(args: argparse.Namespace) -> None:
    """Send or fetch one output."""
    profile = open_profile(args.config)
    command, _, variant = args.stage.partition("@")
    stage = find_stage(command, variant or None)
    folder = stage.folder(profile)
    if args.action == "send":
        manifest = artifacts.require_whole(folder, stage.make_command(profile))
        print(send(folder, manifest, args.url, profile.name))
    else:
        manifest = fetch(args.url, stage, profile.name, folder, args.version)
        print(f"{folder}: {len(manifest.files)} files, manifest {manifest.digest[:_VERSION]}")


def _open(url: str, stage: Stage, profile: str) -> tuple[Any, str]:
    """The file system, and the folder of a stage's versions in it."""
    import fsspec
    from fsspec.utils import get_protocol

    options: dict[str, Any] = {"use_listings_cache": False}
    if get_protocol(url) == "file":
        options["auto_mkdir"] = True
    fs, root = fsspec.url_to_fs(url, **options)
    return fs, posixpath.join(root, profile, stage.command, *([stage.variant] if stage.variant else []))


def _manifest(fs: Any, folder: str) -> Manifest:
    try:
        return Manifest.model_validate_json(fs.cat_file(f"{folder}/{MANIFEST}"))
    except FileNotFoundError:
        raise StoreError(f"there is no {fs.unstrip_protocol(f'{folder}/{MANIFEST}')}") from None
    except ValueError:
        raise StoreError(f"{fs.unstrip_protocol(f'{folder}/{MANIFEST}')} is no manifest") from None


def _sizes(fs: Any, folder: str) -> dict[str, int]:
    found = fs.find(folder, detail=True) if fs.exists(folder) else {}
    return {posixpath.relpath(path, folder): of["size"] for path, of in found.items()}


def _whole(folder: Path, manifest: Manifest, record: FileRecord) -> bool:
    return not artifacts.faults(folder, manifest.model_copy(update={"files": [record]}), content=True)


def _bring(fs: Any, remote: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coming = path.with_name(f".{path.name}.coming")
    fs.get_file(remote, str(coming))
    os.replace(coming, path)


@contextmanager
def _reasons(url: str, doing: str) -> Iterator[None]:
    """What file systems and their clients raise, as one line; a full disk stays what it is."""
    try:
        yield
    except M2MError:
        raise
    except ImportError as error:
        raise StoreError(f"{url}: {error}. For S3: pip install 'm2m[s3]'") from error
    except Exception as error:  # every protocol has its own clients, and they their own errors
        if isinstance(error, OSError) and error.filename:
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(f"{url}: {doing}: {said}{advice(said)}") from error
