"""The real definitions over toy stages on Slurm: what `dagster job execute -m toy_slurm_definitions` loads in tests."""

import sys
from pathlib import Path
from typing import Any

from orchestration.definitions import build_defs
from orchestration.launchers.slurm import SlurmLauncher

TOY = [sys.executable, str(Path(__file__).with_name("toy_stages.py"))]


def toy_launcher(**more: Any) -> SlurmLauncher:
    return SlurmLauncher(**{"command": TOY, "grace_seconds": 2, "orphan_seconds": 0, "patience_seconds": 20, **more})


LAUNCHER = toy_launcher()

defs = build_defs(resource_overrides={"launcher": LAUNCHER})
