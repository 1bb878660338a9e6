"""The real definitions over toy stages: what `dagster job execute -m toy_definitions` loads in these tests."""

import sys
from pathlib import Path

from orchestration.definitions import build_defs
from orchestration.launchers.local import LocalLauncher

TOY = [sys.executable, str(Path(__file__).with_name("toy_stages.py"))]

defs = build_defs(resource_overrides={"launcher": LocalLauncher(command=TOY, grace_seconds=2)})
