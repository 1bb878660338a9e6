"""The real stages at a size for tests of clusters: a profile of their own, and an undisturbed run of it.

Belongs here: the sizes, where the outputs lie, what an undisturbed run made. Not here: clusters.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from toy_ground import ROOT

from m2m.artifacts import MANIFEST
from m2m.config import Profile, load_profile
from m2m.stages import STAGES, Stage
from m2m.training.log import LOG

SMALLER = {
    "generate-sets": {
        "shards": 3,
        "sets_per_shard": 4,
        "per_split": {"train": 8, "validation": 2, "test": 2},
        "images_per_set": 6,
        "steps": 8,
        "compute": {"threads": 1},
    },
    "pretrain": {
        "batch": 4,
        "micro_batch": 2,
        "steps": 8,
        "checkpoint_every": 2,
        "validation_sets": 2,
        "sample_sets": 1,
        "num_inference_steps": 2,
        "validate_every": 4,
        "compute": {"threads": 1},
    },
}


@dataclass(frozen=True)
class Small:
    """A small profile, and where its outputs lie."""

    path: Path
    outputs: Path

    @classmethod
    def made_here(cls, folder: Path) -> "Small":
        """All of it made by commands of this machine, one process each."""
        settings = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
        for section, smaller in SMALLER.items():
            settings[section].update(smaller)
        (folder / "small.yaml").write_text(yaml.safe_dump(settings))
        small = cls(folder / "small.yaml", folder / "outputs")
        for key in ("filter-captions", "generate-sets", "pretrain@self"):
            small.make(STAGES[key])
        return small

    @property
    def profile(self) -> Profile:
        return load_profile(self.path)

    def folder(self, stage: Stage) -> Path:
        return self.outputs / "small" / stage.command / (stage.variant or "")

    def manifest(self, stage: Stage) -> bytes:
        return (self.folder(stage) / MANIFEST).read_bytes()

    def make(self, stage: Stage) -> None:
        command = [sys.executable, "-m", "m2m", *stage.argv, "--config", str(self.path)]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"M2M_OUTPUTS": str(self.outputs)}, check=True)


def with_sets(small: Small, unbroken: Small) -> Stage:
    """The stage that trains on image sets, and the sets."""
    shutil.copytree(unbroken.folder(STAGES["generate-sets"]), small.folder(STAGES["generate-sets"]))
    return STAGES["pretrain@self"]


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
