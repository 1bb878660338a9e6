"""The plan's figures stand beside an asset, of its settings and no others, and cost nobody time who only looks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dagster_pipes import (
    PipesDefaultContextLoader,
    PipesDefaultMessageWriter,
    PipesMappingParamsLoader,
    encode_param,
    open_dagster_pipes,
)

from m2m.artifacts import Manifest
from m2m.asset_metadata import asset_metadata
from m2m.cli import main
from m2m.config import Profile, load_profile
from m2m.costs import Costs
from m2m.planned import EFFICIENCY, recall_plan, remember_plan
from m2m.progress import PipesProgress
from m2m.stages import STAGES

STAGE = STAGES["generate-sets"]


@pytest.fixture
def tiny(tmp_path) -> Profile:
    """The tiny profile with a copy of its text-to-image model, and outputs of this test's own."""
    profile = load_profile("tiny")
    shutil.copytree(profile.root / "m2m/tiny/weights/stable-diffusion", tmp_path / "model")
    section = {**profile.sections["generate-sets"], "text_to_image": str(tmp_path / "model")}
    return Profile(
        profile.path, {**profile.sections, "generate-sets": section}, tmp_path / "outputs", root=profile.root
    )


def test_figures_are_those_of_the_plan_and_kept(tiny):
    assert recall_plan(STAGE, tiny) == {}
    figures, cost = remember_plan(STAGE, tiny), Costs(tiny).of(STAGE)
    assert recall_plan(STAGE, tiny) == figures
    assert figures["planned_flop"] == pytest.approx(cost.flops, rel=1e-3)
    assert figures["planned_a100_hours"] == pytest.approx(cost.gpu_hours("A100", EFFICIENCY), rel=1e-3)
    assert figures["planned_gb_written"] == pytest.approx(cost.bytes / 1e9, rel=1e-3)
    assert figures["planned_peak_gb_per_gpu"] == pytest.approx(cost.peak_bytes / 1e9, rel=1e-3)


def test_figures_of_other_settings_or_models_are_not_taken(tiny, tmp_path):
    plain = remember_plan(STAGE, tiny)
    more = remember_plan(STAGE, tiny, ["steps=30"])
    assert float(more["planned_flop"]) == pytest.approx(2 * float(plain["planned_flop"]), rel=0.03)
    assert recall_plan(STAGE, tiny) == {} and recall_plan(STAGE, tiny, ["steps=30"]) == more
    assert recall_plan(STAGE, tiny, ["steps=31"]) == {}
    remember_plan(STAGE, tiny)
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layers_per_block": 3}))
    assert recall_plan(STAGE, tiny) == {}


def test_overrides_of_one_variant_leave_the_other_alone():
    tiny = load_profile("tiny").overridden("pretrain", "self", ["steps=7", "compute.threads=1"])
    assert tiny.section("pretrain", "self")["steps"] == 7 and tiny.section("pretrain", "self")["init_from"]
    assert tiny.section("pretrain", "dino")["steps"] == 40


def test_definitions_carry_what_the_plan_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("M2M_OUTPUTS", str(tmp_path))
    monkeypatch.setattr("m2m.plan.STAGES", {key: STAGES[key] for key in ("filter-captions", "generate-sets")})
    assert main(["plan", "--config", "tiny"]) == 0
    look = (
        "import sys; from orchestration.definitions import defs; "
        "spec = defs.resolve_asset_graph().get(__import__('dagster').AssetKey('mis_shards')); "
        "assert 'torch' not in sys.modules; print(spec.metadata['planned_flop'])"
    )
    said = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout
    assert float(said.split()[-1]) == recall_plan(STAGE, load_profile("tiny"))["planned_flop"]


def test_a_materialization_carries_them(tiny, tmp_path):
    context = {"asset_keys": ["mis_shards"], "run_id": "r", "retry_number": 0, "extras": {}}
    params = {"DAGSTER_PIPES_CONTEXT": {"data": context}, "DAGSTER_PIPES_MESSAGES": {"path": str(tmp_path / "said")}}
    manifest = Manifest(
        stage=STAGE.key, version=1, fingerprint="f" * 64, config={}, inputs={}, counts={"sets": 3}, files=[]
    )
    with open_dagster_pipes(
        context_loader=PipesDefaultContextLoader(),
        message_writer=PipesDefaultMessageWriter(),
        params_loader=PipesMappingParamsLoader({name: encode_param(value) for name, value in params.items()}),
    ) as pipes:
        told = remember_plan(STAGE, tiny)
        progress = PipesProgress(pipes, lambda *of: asset_metadata(STAGE, tiny, (), *of))
        progress.made(manifest, Path(tmp_path), shards=None, fresh=True)
    messages = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    [made] = [m["params"] for m in messages if m["method"] == "report_asset_materialization"]
    assert made["metadata"]["planned_flop"]["raw_value"] == told["planned_flop"] != 0
    assert made["metadata"]["sets"]["raw_value"] == 3
