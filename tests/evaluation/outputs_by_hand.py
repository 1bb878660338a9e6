"""Outputs written by hand, for the page that is made of nothing but outputs."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from m2m import artifacts
from m2m.artifacts import Manifest, Summary
from m2m.config import Profile
from m2m.evaluation.per_set import PerSet
from m2m.stages import STAGES

FIGURES = {"pretrain@self": {"started_from": "a shipped checkpoint, made by: python -m m2m.tiny m2m"}}
ROWS = [
    {"method": "M2M-Self", "FID ↓": "9.00 ± 1.00", "sets": 12},
    {"method": "paper: M2M-Self (9M)", "FID ↓": "9.56 ± 1.21", "sets": None},
]


def png(width: int = 120, height: int = 40, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_output(
    profile: Profile, key: str, summary: Summary, counts: dict[str, int], config: dict, per_set: PerSet | None = None
) -> Path:
    """A whole output of a stage with these contents."""
    stage = STAGES[key]
    folder = stage.folder(profile)
    folder.mkdir(parents=True, exist_ok=True)
    for path in summary.pictures.values():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_bytes(folder / path, png(seed=len(key)))
    if per_set is not None:
        per_set.write(folder)
    artifacts.write_json(folder / artifacts.SUMMARY, summary.model_dump(), sort_keys=False)
    manifest = Manifest(
        stage=key,
        version=1,
        fingerprint=f"{abs(hash(key)) % 10**12:064d}",
        config=config,
        inputs=dict.fromkeys(stage.inputs, "0" * 64),
        counts=counts,
        files=artifacts.record_files(folder),
    )
    artifacts.write_bytes(folder / artifacts.MANIFEST, manifest.encoded())
    artifacts_of_run = {"manifest": manifest.digest, "seconds": 12.5, "started": "2026-01-01T00:00:00Z"}
    runs = profile.outputs / "runs" / key
    runs.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(runs / "20260101T000000-1.json", {**artifacts_of_run, "machine": {"cpus": 2}, "git": {}})
    return folder
