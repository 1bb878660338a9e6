"""The real definitions over toy stages on Ray: what `-m toy_ray_definitions` loads in tests."""

import sys
from pathlib import Path
from typing import Any

from own_services import where

from orchestration.definitions import build_defs
from orchestration.launchers.ray import RayLauncher

ADDRESS = where("ray")
TOY = [sys.executable, str(Path(__file__).with_name("toy_stages.py"))]


def toy_launcher(**more: Any) -> RayLauncher:
    return RayLauncher(**{"address": ADDRESS, "command": TOY, "poll_seconds": 0.5, "grace_seconds": 5, **more})


defs = build_defs(resource_overrides={"launcher": toy_launcher()})
