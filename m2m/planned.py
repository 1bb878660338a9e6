"""What the plan says of a stage, as figures beside its asset: counted once for a profile, then only read.

Belongs here: which figures, keeping them beside the outputs. Not here: counting (`m2m.costs`), the plan for people
(`m2m.plan`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2m import artifacts
from m2m.config import Profile, resolve
from m2m.recall import code_digest
from m2m.stages import Stage

EFFICIENCY = 0.4
"""Share of a GPU's peak that the figures assume."""

Figures = Mapping[str, float | str]


def recall_plan(stage: Stage, profile: Profile, overrides: Sequence[str] = ()) -> Figures:
    """The figures of a stage if they were counted for these settings, models and code; empty where they were not."""
    try:
        kept = json.loads(_path(stage, profile).read_bytes())
        return kept["figures"] if kept["asked"] == _asked(stage, profile, overrides) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def remember_plan(stage: Stage, profile: Profile, overrides: Sequence[str] = (), costs: Any = None) -> Figures:
    """Count the figures of a stage, and keep them for the next time.

    Args:
        costs: the profile's `m2m.costs.Costs`, where some of its passes are counted already.

    Raises:
        ConfigError, InputError: settings that are wrong, or models that are not known here.
    """
    from m2m.costs import DENSE_TFLOPS, Costs

    cost = (costs or Costs(profile.overridden(stage.command, stage.variant, overrides))).of(stage)
    figures: dict[str, float | str] = {
        "planned_flop": _short(cost.flops),
        **{f"planned_{kind.lower()}_hours": _short(cost.gpu_hours(kind, EFFICIENCY)) for kind in DENSE_TFLOPS},
        "planned_gb_written": _short(cost.bytes / 1e9),
        "planned_peak_gb_per_gpu": _short(cost.peak_bytes / 1e9),
        "planned_for": f"{cost.note}; hours at {EFFICIENCY:.0%} of the peak",
    }
    path = _path(stage, profile)
    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(path, {"asked": _asked(stage, profile, overrides), "figures": figures})
    return figures


def _path(stage: Stage, profile: Profile) -> Path:
    return profile.outputs / ".identities" / f"{stage.key}.plan.json"


def _asked(stage: Stage, profile: Profile, overrides: Sequence[str]) -> str:
    """Digest of all that the figures come from: every stage's settings, the sizes of the models, the code."""
    sections = json.dumps([profile.sections, list(overrides)], sort_keys=True, default=str)
    digest = hashlib.sha256(f"{sections}\0{code_digest(stage.function)}".encode())
    for source in sorted(set(_texts(profile.sections)) | {override.partition("=")[2] for override in overrides}):
        folder = resolve(source, profile.root)
        if source and folder.is_dir():
            for path in (folder / "config.json", *sorted(folder.glob("*/config.json"))):
                digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
