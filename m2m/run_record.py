"""The record of a run: what varies between equal runs stands beside the outputs, never in them.

Belongs here: times, machine, package versions, code, job. Not here: reading records back (`m2m.provenance`).
"""

import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from m2m import artifacts
from m2m.artifacts import Manifest
from m2m.config import Profile
from m2m.stages import Stage

_PACKAGES = (
    *("torch", "diffusers", "transformers", "tokenizers", "accelerate", "peft", "safetensors", "torchmetrics"),
    *("numpy", "scipy", "pandas", "pyarrow", "pillow", "matplotlib", "webdataset"),
)
"""Those that can change a byte of an output."""


def records(profile: Profile, stage: Stage) -> Path:
    """Where the records of a stage's runs lie."""
    return profile.outputs / "runs" / stage.key


def record_run(
    stage: Stage,
    profile: Profile,
    fingerprint: str,
    started: float,
    manifest: Manifest | None,
    job: Mapping[str, str],
) -> None:
    """Write the record of a run that ends now.

    Args:
        started: seconds since the epoch.
        manifest: of the output that the run finished; None where it only made a part of it.
        job: what the run was a part of, by names for people.
    """
    began = time.gmtime(started)
    artifacts.write_json(
        records(profile, stage) / f"{time.strftime('%Y%m%dT%H%M%S', began)}-{os.getpid()}.json",
        {
            "stage": stage.key,
            "fingerprint": fingerprint,
            "manifest": manifest.digest if manifest else None,
            "seconds": round(time.time() - started, 3),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", began),
            "machine": _machine(),
            "packages": _versions(_PACKAGES),
            "git": _git_state(profile.root),
            "job": {**job, **({"Slurm job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {})},
        },
    )


def _machine() -> dict[str, Any]:
    found = {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count()}
    if model := _cpu_model():
        found["cpu"] = model
    torch = sys.modules.get("torch")  # where a stage did without it, no GPU had a part in it
    if torch is not None and torch.cuda.is_available():
        names = Counter(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        found["gpus"] = ", ".join(f"{count} x {name}" for name, count in names.items())
        found["cuda"] = torch.version.cuda
    return found


def _cpu_model() -> str:
    """Its kernels are chosen by it: the last bits of a result can be its own."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_state(root: Path) -> dict[str, Any]:
    """The revision, and whether anything but DVC's record of earlier stages was changed since."""

    def ask(*argv: str) -> str | None:
        try:
            done = subprocess.run(["git", *argv], cwd=root, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = ask("rev-parse", "HEAD")
    changed = ask("status", "--porcelain", "--", ":(top)", ":(exclude)dvc.lock")
    return {"revision": revision, "dirty": bool(changed) if revision else None}
