"""The real training with the tiny models on a real Ray, spread over two nodes.

What clusters can do is all in `test_ray_faults`, with toys that keep their work as this stage does.
"""

import shutil

import dagster as dg
import pytest
import torch
import yaml
from ray_ground import needs_ray
from safetensors.torch import load_file
from small_stages import Small, read_log, with_sets
from toy_ray_definitions import ADDRESS

from orchestration.definitions import build_defs
from orchestration.launchers import ray as launching
from orchestration.launchers.ray import RayLauncher

pytestmark = [*needs_ray, pytest.mark.timeout(600)]


def test_two_nodes_train_what_one_process_trains(unbroken: Small, tmp_path, monkeypatch):
    """Gloo on CPUs; sums over processes are taken in another order, hence a tolerance."""
    small = Small(tmp_path / "small.yaml", tmp_path / "outputs")
    shutil.copy(unbroken.path, small.path)
    monkeypatch.setenv("M2M_OUTPUTS", str(small.outputs))
    stage = with_sets(small, unbroken)
    settings = yaml.safe_load(small.path.read_text())
    settings[stage.command]["resources"].update(nodes=2, cpus=1)
    small.path.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(launching, "PROFILE", small.profile)
    defs = build_defs(resource_overrides={"launcher": RayLauncher(address=ADDRESS, poll_seconds=1)})
    result = defs.resolve_job_def("m2m_pipeline").execute_in_process(asset_selection=[dg.AssetKey(stage.asset)])
    assert result.success
    logs = [read_log(where.folder(stage)) for where in (small, unbroken)]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], rel=1e-5)
    together, alone = (load_file(next(w.folder(stage).glob("unet/*.safetensors"))) for w in (small, unbroken))
    assert together.keys() == alone.keys()
    for name, weight in alone.items():
        assert torch.allclose(weight, together[name], atol=1e-4), name
