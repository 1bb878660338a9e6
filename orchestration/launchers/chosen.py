"""Which launcher the stages run on, chosen by `M2M_LAUNCHER`.

Belongs here: reading the choice. Not here: launchers.
"""

import difflib
import os
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import ValidationError

from m2m.errors import ConfigError
from orchestration.launchers.kubernetes import KubernetesLauncher
from orchestration.launchers.local import LocalLauncher
from orchestration.launchers.ray import RayLauncher
from orchestration.launchers.slurm import SlurmLauncher

AnyLauncher: TypeAlias = LocalLauncher | SlurmLauncher | KubernetesLauncher | RayLauncher
LAUNCHERS: dict[str, type[AnyLauncher]] = {
    "local": LocalLauncher,
    "slurm": SlurmLauncher,
    "kubernetes": KubernetesLauncher,
    "ray": RayLauncher,
}


def chosen_launcher(given: str | None = None) -> AnyLauncher:
    """The launcher of `M2M_LAUNCHER`: a name, or a YAML file with `launcher: NAME` and its settings; local by default.

    Raises:
        ConfigError: no such launcher, file or setting.
    """
    given = given or os.environ.get("M2M_LAUNCHER") or "local"
    if not given.endswith((".yaml", ".yml")):
        return _made(given, {}, "M2M_LAUNCHER")
    try:
        settings = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"M2M_LAUNCHER: {given} can't be read: {error}") from None
    if not isinstance(settings, dict) or "launcher" not in settings:
        raise ConfigError(f"{given}: must say `launcher: NAME`, one of {', '.join(LAUNCHERS)}")
    return _made(settings.pop("launcher"), settings, given)


def _made(name: str, settings: dict[str, Any], where: str) -> AnyLauncher:
    if name not in LAUNCHERS:
        raise ConfigError(f"{where}: {name} is not a launcher. There are: {', '.join(LAUNCHERS)}")
    known = LAUNCHERS[name].model_fields
    for setting in settings:
        if setting not in known:
            near = difflib.get_close_matches(setting, known, 1)
            meant = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(known)}"
            raise ConfigError(f"{where}: {setting} is not a setting of {name}.{meant}")
    for setting, field in known.items():
        if field.is_required() and setting not in settings:
            said = f"{name} needs {setting} ({field.description})"
            raise ConfigError(f"{where}: {said}, in a YAML file that M2M_LAUNCHER names")
    try:
        return LAUNCHERS[name](**settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
