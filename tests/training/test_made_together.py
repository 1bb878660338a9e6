"""A training stage made by several processes, stopped and called again, against the same made by one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from m2m.arguments import EXIT_CALL_AGAIN
from m2m.artifacts import MANIFEST, Manifest, read_manifest, record_files, write_bytes
from m2m.config import load_profile
from m2m.progress import Progress
from m2m.stage_run import run_stage
from m2m.stages import STAGES
from m2m.training.log import LOG

ROOT = Path(__file__).resolve().parents[2]
STAGE = STAGES["pretrain@self"]


@pytest.fixture
def profile(tmp_path, image_sets, models, quick, monkeypatch):
    """`profile("name")`: one that pretrains on a whole generate-sets output below `tmp_path/outputs`."""
    monkeypatch.setenv("M2M_OUTPUTS", str(tmp_path / "outputs"))

    def make(name: str, **changes):
        settings = {**quick, "text_to_image": str(models / "text-to-image"), "validate_every": 2, **changes}
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({"pretrain": settings}))
        sets = shutil.copytree(image_sets, tmp_path / "outputs" / name / "generate-sets")
        made = Manifest(
            stage="generate-sets", version=1, fingerprint="", config={}, inputs={}, counts={}, files=record_files(sets)
        )
        write_bytes(sets / MANIFEST, made.encoded())
        return load_profile(path)

    return make


def started(*argv: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "m2m", *argv, "--processes", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def ask_to_stop_at_a_checkpoint(process: subprocess.Popen, outputs: Path) -> None:
    while not list(outputs.glob("pretrain/*/checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)


@pytest.mark.timeout(900)  # five imports of torch and diffusers: a busy machine takes minutes
@pytest.mark.slow
def test_two_processes_make_the_output_of_one_also_where_they_were_asked_to_stop(profile):
    one, two = (profile(name, epochs=12, validate_every=8) for name in ("one", "two"))
    alone = run_stage(STAGE, one, progress=Progress(quiet=True)).folder
    argv = ("pretrain", "--variant", "self", "--config", str(two.path))
    stopped = started(*argv)
    ask_to_stop_at_a_checkpoint(stopped, two.outputs)
    _, said = stopped.communicate(timeout=800)
    assert stopped.returncode == EXIT_CALL_AGAIN, said
    assert not STAGE.folder(two).exists()
    done = started(*argv)
    _, said = done.communicate(timeout=800)
    assert done.returncode == 0, said
    together = STAGE.folder(two)
    first, second = (read_manifest(folder) for folder in (alone, together))
    assert first is not None and second is not None
    assert first.fingerprint == second.fingerprint and first.counts == second.counts
    assert [file.path for file in first.files] == [file.path for file in second.files]
    logs = [[json.loads(line) for line in (folder / LOG).read_text().splitlines()] for folder in (alone, together)]
    for line, other in zip(*logs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line.get("validation_loss", 0.0) == pytest.approx(other.get("validation_loss", 0.0), rel=1e-5)
    weights = [load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (alone, together)]
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-4), name
    records = two.outputs / "runs" / STAGE.key
    assert len(list(records.glob("*.json"))) == 1, "one process records the run"
    assert said.count(str(together)) == 1, "one process speaks"
