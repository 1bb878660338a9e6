"""Which recorders are on.

Belongs here: reading that from the surroundings. Not here: recorders.
"""

import os

from assets_defs.launching import Launcher
from assets_defs.profile import PROFILE
from m2m.errors import ConfigError
from orchestration.lineage.dvc_record import DvcRecorder
from orchestration.lineage.lakefs import LakeFS
from orchestration.lineage.recording import Recorder, RecordingLauncher

HOW = ("off", "record", "commit", "push")


def with_recorders(launcher: Launcher) -> Launcher:
    """The launcher, with the recorders that are on behind it; itself where none is.

    Raises:
        ConfigError: `M2M_DVC` is none of `HOW`, or lakeFS has an address and no keys.
    """
    recorders: list[Recorder] = []
    how = os.environ.get("M2M_DVC", "off")
    if how not in HOW:
        raise ConfigError(f"M2M_DVC is {how!r}; it must be one of {', '.join(HOW)}")
    if how != "off":
        recorders.append(DvcRecorder.of(how, PROFILE.root, os.environ.get("M2M_DVC_REMOTE")))
    if lake := _lakefs():
        recorders.append(lake)
    return RecordingLauncher(launcher, recorders, PROFILE) if recorders else launcher


def _lakefs() -> LakeFS | None:
    endpoint = os.environ.get("M2M_LAKEFS")
    if not endpoint:
        return None
    names = ("M2M_LAKEFS_REPOSITORY", "M2M_LAKEFS_KEY_ID", "M2M_LAKEFS_SECRET")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ConfigError(f"M2M_LAKEFS is {endpoint}, but {', '.join(missing)} is not set")
    return LakeFS(endpoint, *(os.environ[name] for name in names))
