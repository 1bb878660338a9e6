"""The real definitions over toy stages on Ray: what `-m toy_ray_definitions` loads in tests."""

import os
import sys
from pathlib import Path
from typing import Any

from orchestration.definitions import build_defs
from orchestration.launchers.ray import RayLauncher

ADDRESS = os.environ.get("M2M_RAY") or "http://127.0.0.1:8266"  # of the project's own, never RAY_ADDRESS: a user's
TOY = [sys.executable, str(Path(__file__).with_name("toy_stages.py"))]


def toy_launcher(**more: Any) -> RayLauncher:
    return RayLauncher(**{"address": ADDRESS, "command": TOY, "poll_seconds": 0.5, "grace_seconds": 5, **more})


defs = build_defs(resource_overrides={"launcher": toy_launcher()})
