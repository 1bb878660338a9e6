"""DVC's record of what was made: `dvc commit` of one stage after another, `dvc.lock` in git, bytes at the remote.

Belongs here: recording outputs that are there. Not here: running stages (`dvc repro` does, without Dagster).
"""

import logging
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2m import artifacts
from m2m.run_record import records
from m2m.stages import Stage
from m2m.stores import advice
from orchestration.lineage.recording import Recording, RecordingError

_LOCK = Path(".dvc") / "tmp" / "m2m-record.lock"


@dataclass(frozen=True)
class DvcRecorder:
    """Records with the DVC repository of the project, one output at a time, whoever else records or runs DVC.

    Attributes:
        git: also commit `dvc.lock`, and nothing else, to git.
        push: also send the output's bytes to the remote; what a failed push left behind is sent by the next one.
        remote: DVC's default remote where None.
        wait_seconds: for how long another DVC command may hold DVC's lock.
    """

    root: Path
    git: bool = False
    push: bool = False
    remote: str | None = None
    wait_seconds: float = 60.0
    name: str = "DVC"

    @classmethod
    def of(cls, how: str, root: Path, remote: str | None = None) -> "DvcRecorder":
        """A project's recorder: `record` only, also `commit` to git, or also `push`."""
        return cls(root, git=how in ("commit", "push"), push=how == "push", remote=remote)

    def record(self, made: Recording) -> str:
        """Bring `dvc.lock` up to date with one output; see `Recorder`."""
        target = dvc_name(made.stage)
        if not (self.root / ".dvc").is_dir():
            raise RecordingError(f"{self.root} is no DVC repository. Make it one with: dvc init")
        with artifacts.locked(self.root / _LOCK, lambda _: None):
            with _reasons() as reasons:
                try:
                    named = self._commit(target, made, reasons)
                except RecordingError:
                    raise
                except Exception as error:  # whatever it is: what was made must not be lost to its record
                    raise RecordingError(_said(f"dvc commit {target}", error, reasons)) from error
            if self.git:
                self._commit_to_git(made)
            if self.push:
                self._push(target)
        return named

    def _commit(self, target: str, made: Recording, reasons: list[str]) -> str:
        from dvc.lock import LockError

        deadline = time.monotonic() + self.wait_seconds
        while True:
            try:
                with self._repo() as repo:
                    return self._commit_stage(repo, target, made, reasons)
            except LockError:
                if time.monotonic() > deadline:
                    raise RecordingError(
                        f"another dvc command has held {self.root / '.dvc' / 'tmp' / 'lock'} for {self.wait_seconds:g}"
                        " s; let it end, then run the stage again: it is current and will only be recorded"
                    ) from None

    def _commit_stage(self, repo: Any, target: str, made: Recording, reasons: list[str]) -> str:
        """What `dvc commit --force` does to one stage, its files of YAML read once: they are most of the time."""
        from dvc.repo import lock_repo

        folder = made.stage.folder(made.profile)
        with lock_repo(repo):
            (stage,) = repo.stage.collect(self._address(target))
            out, *_ = stage.outs
            if folder.resolve() not in (path := Path(out.fs_path).resolve(), path.parent):
                raise RecordingError(f"dvc.yaml has {out.fs_path} for {target}, not {folder}; see its `vars`")
            records(made.profile, made.stage).mkdir(parents=True, exist_ok=True)  # an out, too
            stage.save()
            stage.commit()
            if reasons:  # files that did not get into the cache: DVC only logs them
                raise RecordingError(f"dvc commit {target}: {reasons[0]}")
            now = artifacts.read_manifest(folder)
            if now is None or now.digest != made.manifest.digest:
                raise RecordingError(f"{folder} was made anew while it was recorded; that run records it")
            stage.dump(update_pipeline=False)
        return f"{target} {out.hash_info.value}"

    def _push(self, target: str) -> None:
        with _reasons() as reasons:
            try:
                with self._repo() as repo:
                    repo.push(targets=[self._address(target)], remote=self.remote)
            except Exception as error:  # as above
                said = _said(f"dvc push {target}", error, reasons)
                raise RecordingError(f"{said}{advice(said)}; in dvc.lock, but not at the remote") from error

    def _address(self, target: str) -> str:
        return f"{self.root / 'dvc.yaml'}:{target}"  # a bare name is looked for in the working directory's dvc.yaml

    def _repo(self) -> Any:
        from dvc.repo import Repo  # a second of imports that loading the definitions need not wait for

        return Repo(str(self.root))

    def _commit_to_git(self, made: Recording) -> None:
        if not self._git("status", "--porcelain", "--", "dvc.lock").strip():
            return
        facts = {"Fingerprint": made.manifest.fingerprint, "Manifest": made.manifest.digest, "Run": made.run_id}
        if made.link:
            facts["Link"] = made.link
        message = f"Record {made.stage.key}\n\n" + "".join(f"{name}: {value}\n" for name, value in facts.items())
        self._git("add", "--", "dvc.lock")
        self._git("commit", "--quiet", "--message", message, "--only", "--", "dvc.lock")

    def _git(self, *argv: str) -> str:
        try:
            done = subprocess.run(["git", *argv], cwd=self.root, capture_output=True, text=True, timeout=60, check=True)
        except subprocess.CalledProcessError as error:
            said = " ".join((error.stderr or error.stdout).split())
            raise RecordingError(f"git {argv[0]}: {said} (dvc.lock is written, but not committed)") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RecordingError(f"git {argv[0]}: {error} (dvc.lock is written, but not committed)") from None
        return done.stdout


def dvc_name(stage: Stage) -> str:
    """A stage's name in `dvc.yaml`, which allows no hyphens: `filter_captions`, `pretrain@self`."""
    return stage.key if stage.variant else stage.command.replace("-", "_")


@contextmanager
def _reasons() -> Iterator[list[str]]:
    """What DVC logs while it works: its exceptions only count the files that failed, the reasons go to its log."""
    found: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            cause = record.exc_info[1] if record.exc_info else None
            found.append(f"{record.getMessage()}: {cause}" if cause else record.getMessage())

    handler = Keeping(logging.ERROR)
    loggers = [logging.getLogger(name) for name in ("dvc", "dvc_data", "dvc_objects")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield found
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _said(what: str, error: Exception, reasons: list[str]) -> str:
    """One line: the error, its causes, the first thing that was logged."""
    parts = [str(error) or type(error).__name__]
    cause = error.__cause__ or error.__context__
    while cause is not None:
        parts.append(str(cause) or type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return f"{what}: " + ": ".join(dict.fromkeys(" ".join(part.split()) for part in [*parts, *reasons[:1]]))
