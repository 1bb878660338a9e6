"""The real job with the real stages and the tiny models, through `dagster job execute` as a user types it.

Everything is made much smaller than in `configs/`, and nothing is left out. Minutes even so: the tests are marked slow,
but for the real inputs, which are run wherever their folder is.
"""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from m2m.artifacts import Manifest, read_manifest, read_summary
from m2m.stages import STAGES

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data"
SMALLER = {
    "generate-sets": {
        "shards": 2,
        "sets_per_shard": 19,
        "per_split": {"train": 4, "validation": 1, "test": 33},  # FID of 32 features needs as many sets
        "images_per_set": 8,
        "steps": 2,
    },
    "pretrain": {"batch": 2, "micro_batch": 2, "steps": 2, "sample_sets": 1, "num_inference_steps": 2},
    "finetune": {"batch": 2, "micro_batch": 2, "steps": 2, "sample_sets": 1, "num_inference_steps": 2},
    "evaluate": {"sampling": {"num_inference_steps": 2, "guidance_scale": 7.5}},
}
SMALLER_VARIANTS = {
    "table_1": {"sets": 33, "num_images": 2},
    "preceding_images": {"trials": 2},
    "consistency": {"sets": 2},
    "novel_views": {"objects": 1, "preceding": [1, 2]},
    "procedures": {"procedures": 2},
    "sampling_speed": {"preceding": [1], "num_images": [1], "repeats": 1},
    "rollouts": {"sets": 1, "num_images": 6},
}


@dataclass(frozen=True)
class Job:
    """`m2m_pipeline` of a shrunken profile in a folder of its own."""

    folder: Path
    profile: Path

    @classmethod
    def of(cls, name: str, folder: Path) -> "Job":
        settings = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        for section, smaller in SMALLER.items():
            settings[section].update(smaller)
        for variant, smaller in SMALLER_VARIANTS.items():
            settings["evaluate"]["variants"][variant].update(smaller)
        (folder / "home").mkdir(parents=True)
        (folder / "home" / "dagster.yaml").write_text((ROOT / "orchestration" / "dagster.yaml").read_text())
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        return cls(folder, folder / f"{name}.yaml")

    def start(self) -> subprocess.Popen[bytes]:
        given = {
            "M2M_PROFILE": self.profile,
            "M2M_OUTPUTS": self.folder / "outputs",
            "DAGSTER_HOME": self.folder / "home",
        }
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "dagster",
                "job",
                "execute",
                "-m",
                "orchestration.definitions",
                "-j",
                "m2m_pipeline",
            ],
            cwd=ROOT,
            env={**os.environ, **{key: str(value) for key, value in given.items()}},
            stdout=(self.folder / "log.txt").open("ab"),
            stderr=subprocess.STDOUT,
        )

    def run(self) -> None:
        code = self.start().wait()
        assert code == 0, (self.folder / "log.txt").read_text()[-5000:]

    def output(self, key: str) -> Path:
        stage = STAGES[key]
        return self.folder / "outputs" / self.profile.stem / stage.command / (stage.variant or "")

    def manifests(self) -> dict[str, Manifest]:
        found = {key: read_manifest(self.output(key)) for key in STAGES}
        return {key: manifest for key, manifest in found.items() if manifest is not None}


@pytest.mark.timeout(900)
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
def test_real_inputs_go_the_whole_way(tmp_path):
    job = Job.of("real", tmp_path)
    job.run()
    made = job.manifests()
    assert list(made) == list(STAGES)
    counts = made["filter-captions"].counts
    assert counts["rows"] == len((REAL / "captions" / "alt_texts_10k.tsv").read_bytes().splitlines())
    assert 0 < counts["rejected"] < 200
    report = (job.output("report") / "report.html").read_text()
    assert "tiny models on real inputs" in report
    photographed = read_summary(job.output("evaluate@real_images"))
    assert photographed.pictures


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_moments_the_job_ends_with_the_same_manifests(tmp_path):
    unbroken, broken = Job.of("tiny", tmp_path / "unbroken"), Job.of("tiny", tmp_path / "broken")
    started = time.monotonic()
    unbroken.run()
    whole = time.monotonic() - started
    moments = random.Random(os.environ.get("M2M_KILL_SEED", "0"))
    for _ in range(3):
        dagster = broken.start()
        time.sleep(moments.uniform(0.15, 0.5) * whole)
        assert dagster.poll() is None, "it ended before it was killed"
        dagster.send_signal(signal.SIGKILL)
        dagster.wait()
        print(f"killed with {len(broken.manifests())} of {len(STAGES)} outputs whole")
    broken.run()
    assert_equal(unbroken, broken)


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(3600)
def test_on_slurm_the_job_makes_the_same_manifests(tmp_path, own_slurm, monkeypatch):
    here, there = Job.of("tiny", tmp_path / "here"), Job.of("tiny", tmp_path / "slurm")
    here.run()
    monkeypatch.setenv("M2M_LAUNCHER", "slurm")
    there.run()
    assert len(list((there.folder / "outputs" / "tiny" / "jobs").iterdir())) == len(STAGES)  # each was a job
    assert_equal(here, there)


def assert_equal(one: Job, other: Job) -> None:
    """All outputs are there and, but for those that hold timings, the same to the byte."""
    expected, found = one.manifests(), other.manifests()
    assert list(found) == list(expected) == list(STAGES)
    for key, manifest in expected.items():
        if manifest.deterministic:
            assert found[key] == manifest, key
