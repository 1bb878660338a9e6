"""Outputs written by hand, for the page that is made of nothing but outputs."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2m import artifacts
from m2m.artifacts import Manifest, Summary
from m2m.config import Profile, load_profile
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


def write_output(profile: Profile, key: str, summary: Summary, counts: dict[str, int], config: dict) -> Path:
    """A whole output of a stage with these contents."""
    stage = STAGES[key]
    folder = stage.folder(profile)
    folder.mkdir(parents=True, exist_ok=True)
    for path in summary.pictures.values():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_bytes(folder / path, png(seed=len(key)))
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


@pytest.fixture(scope="session")
def whole_outputs(tmp_path_factory) -> Profile:
    """A profile with an output of every stage that the report shows."""
    root = tmp_path_factory.mktemp("report")
    (root / "configs").mkdir()
    (root / "configs" / "tiny.yaml").write_text("label: made with <tiny> models\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("M2M_OUTPUTS", raising=False)
        profile = load_profile(root / "configs" / "tiny.yaml")
    for key in STAGES["report"].inputs.values():
        summary = Summary(
            figures={**FIGURES.get(key, {}), "a_figure": 0.1234567, "nothing": None},
            tables={"Table 1": ROWS},
            curves={"loss by step": {"step": [1.0, 2.0, 3.0], "M2M-Self": [3.0, 1.0, 0.5]}},
            pictures={f"pictures of {key}": "grids/some.png"},
            checks={"fine": ""},
        )
        write_output(profile, key, summary, {"things": 1234, "sets": 77}, {"seed": 7})
    return profile
