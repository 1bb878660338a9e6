"""What was made, kept in lakeFS: a branch a run, a commit an output, merged to main when its checks hold.

Belongs here: all that knows lakeFS or its client, which is deprecated upstream. Not here: when something is recorded
(`recording`). No real lakeFS server has been tried: the tests speak to one written from its published API.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2m import artifacts
from m2m.artifacts import MANIFEST, FileRecord, Manifest
from m2m.errors import ArtifactError
from m2m.stages import Stage
from m2m.stores import StoreError, sent_to
from orchestration.lineage.recording import Recording, RecordingError

_PAGE = 1000


class LakeFS:
    """One repository of a lakeFS server.

    Args:
        endpoint: for example http://127.0.0.1:8000.
        main: the branch that holds what is good.
        linked: URL of a store (`m2m.stores`) that the server reads too: what lies there is linked, not sent again.
    """

    name = "lakeFS"

    def __init__(
        self,
        endpoint: str,
        repository: str,
        key_id: str,
        secret: str,
        main: str = "main",
        linked: str | None = None,
    ) -> None:
        self.endpoint, self.repository, self.main, self.linked = endpoint, repository, main, linked
        self._keys = (key_id, secret)
        self._made: Any = None

    def record(self, made: Recording) -> str:
        """Bring what changed to the run's branch, commit it with where it came from, merge it; see `Recorder`.

        A stage puts its output in place only when its checks hold: what stands there may be merged. After a failure the
        branch stays, and recording again goes on from it.
        """
        branch = f"run-{made.run_id}"
        with self._reasons(f"recording {made.stage.key} on branch {branch}"):
            self._ensure_branch(branch)
            if self._send(made, branch):
                self._commit(made, branch)
        return self._merge(made, branch)

    def tag(self, name: str, ref: str | None = None) -> None:
        """Name a commit, for example a release; main's head where `ref` is None.

        Raises:
            RecordingError: there is such a tag already, or no such ref.
        """
        from lakefs_client.models import TagCreation

        with self._reasons(f"tag {name}"):
            self._client.tags_api.create_tag(self.repository, TagCreation(id=name, ref=ref or self.main))

    def fetch(self, stage: Stage, profile: str, ref: str, folder: Path) -> Manifest:
        """Bring an output as it was at a branch, tag or commit; the folder is whole or, after a failure, no output.

        Raises:
            RecordingError: there is no such output at that ref, or the server can't be reached.
            ArtifactError: what came is not what the manifest says.
        """
        prefix = _prefix(stage, profile)
        with self._reasons(f"{prefix} at {ref}"):
            manifest = self._manifest(ref, prefix)
            if manifest is None:
                raise RecordingError(f"{self._where}: there is no {prefix} at {ref}")
            partial = folder.with_name(f"{folder.name}.partial-{ref}")
            shutil.rmtree(partial, ignore_errors=True)
            for record in manifest.files:
                self._download(ref, prefix + record.path, partial / record.path)
        if found := artifacts.faults(partial, manifest, content=True):
            raise ArtifactError(f"{self._where}: {prefix} at {ref} is damaged: {'; '.join(found[:3])}")
        artifacts.write_bytes(partial / MANIFEST, manifest.encoded())
        artifacts.promote(partial, folder)
        return manifest

    @property
    def _client(self) -> Any:
        if self._made is None:
            from lakefs_client import Configuration
            from lakefs_client.client import LakeFSClient

            settings: Any = Configuration(host=self.endpoint, username=self._keys[0], password=self._keys[1])
            settings.retries = 2
            self._made = LakeFSClient(settings)
        return self._made

    @property
    def _where(self) -> str:
        return f"{self.endpoint}/repositories/{self.repository}"

    def _ensure_branch(self, branch: str) -> None:
        from lakefs_client.exceptions import ApiException
        from lakefs_client.models import BranchCreation

        try:
            self._client.branches_api.create_branch(self.repository, BranchCreation(name=branch, source=self.main))
        except ApiException as error:
            if error.status != 409:  # it is there: an earlier stage of this run made it
                raise

    def _send(self, made: Recording, branch: str) -> bool:
        """Bring the branch's copy up to date; the manifest goes first and comes back last, as on disk."""
        prefix, folder = _prefix(made.stage, made.profile.name), made.stage.folder(made.profile)
        there = self._manifest(branch, prefix)
        if there is not None and there.digest == made.manifest.digest:
            return False
        known = {record.path: record.sha256 for record in there.files} if there else {}
        if there is not None:
            self._client.objects_api.delete_object(self.repository, branch, prefix + MANIFEST)
        lies_at = self._lies_at(made, folder)
        for record in made.manifest.files:
            if known.get(record.path) != record.sha256:
                if (address := lies_at(record)) is not None:
                    self._link(branch, prefix + record.path, address, record)
                else:
                    self._upload(branch, prefix + record.path, folder / record.path)
        wanted = {prefix + record.path for record in made.manifest.files}
        for path in [path for path in self._paths(branch, prefix) if path not in wanted]:
            self._client.objects_api.delete_object(self.repository, branch, path)
        self._upload(branch, prefix + MANIFEST, folder / MANIFEST)
        return True

    def _commit(self, made: Recording, branch: str) -> None:
        from lakefs_client.models import CommitCreation

        facts = {
            "stage": made.stage.key,
            "fingerprint": made.manifest.fingerprint,
            "manifest": made.manifest.digest,
            "run": made.run_id,
            **{f"input {name}": digest for name, digest in made.manifest.inputs.items()},
            **({"link": made.link} if made.link else {}),
        }
        creation = CommitCreation(message=f"Record {made.stage.key}", metadata=facts)
        self._client.commits_api.commit(self.repository, branch, creation)

    def _merge(self, made: Recording, branch: str) -> str:
        from lakefs_client.exceptions import ApiException
        from lakefs_client.models import Merge

        merge = Merge(message=f"Merge {made.stage.key} of run {made.run_id}")
        with self._reasons(f"merging {branch} into {self.main}"):
            try:
                done = self._client.refs_api.merge_into_branch(self.repository, branch, self.main, merge=merge)
            except ApiException as error:
                if error.status == 409:
                    raise RecordingError(
                        f"{self._where}: {self.main} has another {made.stage.key} since branch {branch} began; the "
                        f"branch stays. A new run begins at the new {self.main}, or merge it by hand with a strategy"
                    ) from None
                if error.status == 400 and "no changes" in _message(error):
                    return f"{self.main} has it"
                raise
        return done.reference

    def _manifest(self, ref: str, prefix: str) -> Manifest | None:
        from lakefs_client.exceptions import NotFoundException

        try:
            answer = self._client.objects_api.get_object(
                self.repository, ref, prefix + MANIFEST, _preload_content=False
            )
        except NotFoundException:
            return None
        try:
            return Manifest.model_validate_json(answer.read())
        except ValueError:
            return None

    def _upload(self, branch: str, path: str, file: Path) -> None:
        with file.open("rb") as content:  # the client reads it into memory: a shard at a time
            self._client.objects_api.upload_object(self.repository, branch, path, content=content)

    def _link(self, branch: str, path: str, address: str, record: FileRecord) -> None:
        """An object whose bytes stay where they lie."""
        from lakefs_client.models import ObjectStageCreation

        object_ = ObjectStageCreation(physical_address=address, checksum=record.sha256, size_bytes=record.size)
        self._client.internal_api.stage_object(self.repository, branch, path, object_)

    def _lies_at(self, made: Recording, folder: Path) -> Callable[[FileRecord], str | None]:
        """Where a file lies that need not be sent: in the store, or elsewhere than beside its manifest."""
        store = None if self.linked is None else sent_to(self.linked, made.manifest, made.profile.name)
        if store is not None:
            return lambda record: f"{store}/{record.path}"
        there = artifacts.read_elsewhere(folder)
        return lambda record: (
            f"{there.url}/{record.path}"
            if there is not None and record.path.endswith(there.ending) and not (folder / record.path).exists()
            else None
        )

    def _download(self, ref: str, path: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        answer = self._client.objects_api.get_object(self.repository, ref, path, _preload_content=False)
        with file.open("wb") as out:
            shutil.copyfileobj(answer, out)

    def _paths(self, ref: str, prefix: str) -> Iterator[str]:
        after = ""
        while True:
            page = self._client.objects_api.list_objects(
                self.repository, ref, prefix=prefix, after=after, amount=_PAGE, user_metadata=False
            )
            yield from (found.path for found in page.results)
            if not page.pagination.has_more:
                return
            after = page.pagination.next_offset

    @contextmanager
    def _reasons(self, doing: str) -> Iterator[None]:
        """What the client and its HTTP library raise, as one line."""
        from lakefs_client.exceptions import OpenApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except OpenApiException as error:
            status = getattr(error, "status", None)
            hints = {401: " (are the access key and its secret right?)", 404: f" (is there a {self._where}?)"}
            raise RecordingError(f"{self._where}: {doing}: {_message(error)}{hints.get(status or 0, '')}") from error
        except (HTTPError, OSError, StoreError) as error:
            said = " ".join(str(error).split())
            raise RecordingError(f"{self._where}: {doing}: {said}") from error


def _prefix(stage: Stage, profile: str) -> str:
    return "/".join(filter(None, [profile, stage.command, stage.variant])) + "/"


def _message(error: Any) -> str:
    """lakeFS' own words where it said some."""
    try:
        return str(json.loads(error.body)["message"])
    except (AttributeError, TypeError, ValueError, KeyError):
        return " ".join(str(error).split())
