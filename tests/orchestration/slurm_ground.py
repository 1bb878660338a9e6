"""A toy pipeline on the project's own Slurm (`services/slurm/up.sh`), for the tests marked `services`."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONF = Path(os.environ.get("SLURM_CONF") or ROOT / ".services" / "slurm" / "slurm.conf")


def _answers() -> bool:
    if not CONF.is_file() or not shutil.which("scontrol"):
        return False
    done = subprocess.run(["scontrol", "ping"], env=os.environ | {"SLURM_CONF": str(CONF)}, capture_output=True)
    return done.returncode == 0


needs_slurm = pytest.mark.skipif(
    not _answers(), reason="no Slurm answers here: services/slurm/up.sh starts one (make test-services does it all)"
)


def slurm(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def jobs() -> list[str]:
    """States of the jobs that have not ended."""
    return slurm("squeue", "-h", "--me", "-o", "%T").split()
