"""An evaluation made by several processes: what one alone makes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from m2m.evaluation.per_set import PER_SET, read_per_set

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"preceding": 2, "num_images": 2, "backbone": "classifier", "inception": "classifier", "batch": 1}
SETTINGS |= {"noise_seeds": 2}
SCRIPT = """
import json, sys
from pathlib import Path
from m2m import processes
from m2m.evaluation.sampler import Sampler
from tests.evaluation.conftest import SmallWorld

root, settings, given, out = sys.argv[1:]
sampled, sample = [], Sampler.continue_sets
def counted(self, *args, **kwargs):
    sampled.append(len(args[1]))
    return sample(self, *args, **kwargs)
Sampler.continue_sets = counted
with processes.team():
    run = SmallWorld(Path(root), json.loads(settings)).run("evaluate@table_1", Path(out), json.loads(given))
assert run.summary["checks"] == {"metrics_finite": ""}
print(len(sampled))
"""


@pytest.mark.timeout(600)  # imports of torch and diffusers by each: a busy machine takes minutes
def test_any_number_of_processes_finds_the_same(small_world, evaluate, tmp_path):
    alone, together = evaluate("table_1", "alone", **SETTINGS).out, tmp_path / "together"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    given = [str(small_world.root), json.dumps(small_world.settings), json.dumps(SETTINGS), str(together)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *given],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": rank, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "012"
    ]
    said = [process.communicate(timeout=560) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], [errors for _, errors in said]
    assert [out.split() for out, _ in said] == [["8"]] * 3  # two noises, two models, six batches each, shared evenly
    assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in alone.iterdir())
    for name in ("M2M-Self.png", "M2M-DINO.png"):
        assert (alone / name).read_bytes() == (together / name).read_bytes()
    ours, theirs = (read_per_set(folder / PER_SET) for folder in (alone, together))
    assert list(ours) == list(theirs)
    for name, metric in ours.items():
        assert metric.units.tolist() == theirs[name].units.tolist()
        np.testing.assert_allclose(theirs[name].values, metric.values, rtol=1e-9, atol=1e-12)
