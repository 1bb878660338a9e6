"""What a stage's settings came to last time, so that seeing that there is nothing to do takes no torch and no time.

Belongs here: remembering `config.identity` beside the outputs, and knowing when the memory no longer holds.
Not here: judging what is stale (`stage_run.fingerprint`).
"""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pydantic

from m2m import artifacts
from m2m.config import Profile, Settings, identity, source_digest, sources
from m2m.errors import M2MError


def recall_identity(
    stage_key: str, function: str, profile: Profile, settings: dict[str, Any], overrides: Sequence[str]
) -> dict[str, Any] | None:
    """The identity of a stage's config if everything that it depends on is as it was; None if that has to be found out.

    Everything is: the raw settings, the code (a default may have changed), and the content of the sources.
    """
    try:
        kept = json.loads(_path(profile, stage_key).read_bytes())
        if kept["asked"] != _asked(function, settings, overrides):
            return None
        holds = all(source_digest(source, profile.root) == digest for source, digest in kept["sources"].items())
        return kept["identity"] if holds else None
    except (OSError, ValueError, KeyError, M2MError):
        return None


def remember_identity(
    stage_key: str,
    function: str,
    profile: Profile,
    settings: dict[str, Any],
    overrides: Sequence[str],
    config: Settings,
) -> dict[str, Any]:
    """Find out what a config's identity is, and keep it for the next time."""
    found = identity(config, profile.root)
    path = _path(profile, stage_key)
    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(
        path,
        {
            "asked": _asked(function, settings, overrides),
            "sources": {str(source): source_digest(source, profile.root) for source in sources(config)},
            "identity": found,
        },
    )
    return found


def _path(profile: Profile, stage_key: str) -> Path:
    return profile.outputs / ".identities" / f"{stage_key}.json"


def _asked(function: str, settings: dict[str, Any], overrides: Sequence[str]) -> str:
    said = json.dumps([function, settings, list(overrides), code_digest(function)], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()


@cache
def code_digest(function: str) -> str:
    """Digest of the package's sources and of the stage's own module, wherever that lies."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    spec = importlib.util.find_spec(function.partition(":")[0])  # finds the file without running it
    if spec is not None and spec.origin:
        files.append(Path(spec.origin))
    digest = hashlib.sha256(pydantic.VERSION.encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
