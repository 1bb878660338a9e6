"""Which recorders are on.

Belongs here: reading that from the surroundings. Not here: recorders and followers.
"""

import os

from assets_defs.launching import Launcher
from assets_defs.profile import PROFILE
from m2m.errors import ConfigError
from m2m.stages import commands
from orchestration.lineage.dvc_record import DvcRecorder
from orchestration.lineage.lakefs import LakeFS
from orchestration.lineage.openlineage import OpenLineage
from orchestration.lineage.recording import Recorder, RecordingLauncher
from orchestration.lineage.store_record import StoreRecorder

HOW = ("off", "record", "commit", "push")


def with_recorders(launcher: Launcher) -> Launcher:
    """The launcher, with the recorders that are on behind it; itself where none is.

    Raises:
        ConfigError: `M2M_DVC` is none of `HOW`, lakeFS has an address and no keys, `M2M_STORE_STAGES` names what is no
            stage, or OpenLineage's client is not there.
    """
    recorders: list[Recorder] = []
    how = os.environ.get("M2M_DVC", "off")
    if how not in HOW:
        raise ConfigError(f"M2M_DVC is {how!r}; it must be one of {', '.join(HOW)}")
    if how != "off":
        recorders.append(DvcRecorder.of(how, PROFILE.root, os.environ.get("M2M_DVC_REMOTE")))
    if store := _store():
        recorders.append(store)
    if lake := lakefs_of_surroundings():  # after the store, what lies there can be linked
        recorders.append(lake)
    followers = [OpenLineage(os.environ.get("OPENLINEAGE_NAMESPACE", "m2m"))] if _asked("M2M_OPENLINEAGE") else []
    return RecordingLauncher(launcher, recorders, PROFILE, followers) if recorders or followers else launcher


def _store() -> StoreRecorder | None:
    url = os.environ.get("M2M_STORE")
    if not url:
        return None
    asked = os.environ.get("M2M_STORE_STAGES", "report").split(",")
    for command in asked:
        if command not in commands():
            raise ConfigError(f"M2M_STORE_STAGES: {command!r} is not a stage. There are: {', '.join(commands())}")
    return StoreRecorder(url, asked)


def _asked(name: str) -> bool:
    value = os.environ.get(name, "off")
    if value not in ("on", "off"):
        raise ConfigError(f"{name} is {value!r}; it must be on or off")
    return value == "on"


def lakefs_of_surroundings() -> LakeFS | None:
    """lakeFS as the surroundings name it; None where they name none.

    Raises:
        ConfigError: something of it is missing.
    """
    endpoint = os.environ.get("M2M_LAKEFS")
    if not endpoint:
        return None
    names = ("M2M_LAKEFS_REPOSITORY", "M2M_LAKEFS_KEY_ID", "M2M_LAKEFS_SECRET")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ConfigError(f"M2M_LAKEFS is {endpoint}, but {', '.join(missing)} is not set")
    linked = os.environ.get("M2M_STORE") if _asked("M2M_LAKEFS_LINK") else None
    if linked is None and _asked("M2M_LAKEFS_LINK"):
        raise ConfigError("M2M_LAKEFS_LINK is on, but M2M_STORE, whose objects are to be linked, is not set")
    return LakeFS(endpoint, *(os.environ[name] for name in names), linked=linked)
