"""What Dagster loads: quickly, for any profile, and with the jobs that the README names."""

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.freshness import TimeWindowFreshnessPolicy

from assets_defs.partitions import shards
from assets_defs.upkeep import report_freshness
from m2m.errors import ConfigError
from m2m.stages import STAGES
from orchestration.definitions import build_defs, defs

ROOT = Path(__file__).parents[2]
ASK = """
import sys
from orchestration.definitions import defs
print(len(defs.resolve_asset_graph().get(__import__('dagster').AssetKey('mis_shards')).partitions_def.get_partition_keys()))
print([name for name in ('torch', 'diffusers', 'transformers', 'numpy', 'pandas') if name in sys.modules])
"""


def ask(**environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("M2M_")} | environment
    return subprocess.run([sys.executable, "-c", ASK], env=env, cwd=ROOT, capture_output=True, text=True, check=False)


def test_loading_takes_neither_torch_nor_the_working_directory(tmp_path):
    profile = tmp_path / "configs" / "many.yaml"
    profile.parent.mkdir()
    profile.write_text("generate-sets: {shards: 12238}\n")
    shards, heavy = ask(M2M_PROFILE=str(profile)).stdout.splitlines()
    assert (int(shards), heavy) == (12238, "[]")


def test_a_profile_that_can_not_be_loaded_is_named(tmp_path):
    (tmp_path / "p.yaml").write_text("generate_sets: {shards: 2}")
    done = ask(M2M_PROFILE=str(tmp_path / "p.yaml"))
    said = "generate_sets is not a stage. Did you mean generate-sets?"
    assert done.returncode != 0 and f"{tmp_path / 'p.yaml'}: {said}" in done.stderr


def test_jobs_select_what_they_say():
    def keys(job: str) -> set[str]:
        return {key.to_user_string() for key in defs.resolve_job_def(job).asset_layer.executable_asset_keys}

    assert keys("m2m_pipeline") == {"caption_file", *(stage.asset for stage in STAGES.values())}
    assert keys("data_job") == {"caption_file", "filtered_captions", "mis_shards", "dino_features"}
    assert keys("pretraining_job") == {"m2m_self", "m2m_dino"}
    assert keys("finetuning_job") == {"m2m_nvs", "m2m_vgsi"}
    assert keys("evaluation_job") == {stage.asset for stage in STAGES.values() if stage.group == "evaluation"}


@pytest.mark.parametrize("job", ["m2m_pipeline", "data_job"])
def test_jobs_with_partitions_run_over_all_of_them(job):
    keys = shards.get_partition_keys()
    tags = defs.resolve_job_def(job).tags
    assert tags["dagster/asset_partition_range_start"] == keys[0]
    assert tags["dagster/asset_partition_range_end"] == keys[-1]


def test_reevaluation_waits_to_be_switched_on():
    schedule = defs.resolve_schedule_def("reevaluation")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED and schedule.job_name == "evaluation_job"


def test_an_asset_leads_to_its_code():
    graph = defs.resolve_asset_graph()
    for stage in STAGES.values():
        references = graph.get(dg.AssetKey(stage.asset)).metadata["dagster/code_references"].code_references
        work, asset = (
            Path(reference.file_path).read_text().splitlines()[reference.line_number - 1 :] for reference in references
        )
        assert work[0].startswith(f"def {stage.function.rpartition(':')[2]}(")
        assert any(f"def {stage.asset}(" in line for line in asset[:10])


def test_code_can_be_linked_to_its_repository(monkeypatch):
    monkeypatch.setenv("M2M_GIT_URL", "https://github.com/owner/m2m")
    node = build_defs().resolve_asset_graph().get(dg.AssetKey("table_1"))
    work, asset = (reference.url for reference in node.metadata["dagster/code_references"].code_references)
    assert work.startswith("https://github.com/owner/m2m/tree/main/m2m/evaluation/table.py#L")
    assert asset.startswith("https://github.com/owner/m2m/tree/main/assets_defs/evaluation.py#L")
    monkeypatch.setenv("M2M_GIT_URL", "https://example.org/m2m")
    with pytest.raises(ConfigError, match=r"M2M_GIT_URL is https://example\.org/m2m"):
        build_defs()


def test_the_report_grows_old():
    policy = defs.resolve_asset_graph().get(dg.AssetKey("evaluation_report")).freshness_policy
    assert isinstance(policy, TimeWindowFreshnessPolicy) and policy.warn_window
    assert (policy.warn_window.to_timedelta().days, policy.fail_window.to_timedelta().days) == (7, 14)


@pytest.mark.parametrize("days", ["soon", "0", "-1"])
def test_an_age_that_is_none_is_refused(monkeypatch, days):
    monkeypatch.setenv("M2M_REPORT_DAYS", days)
    with pytest.raises(ConfigError, match="must be a number of days"):
        report_freshness()


def test_dagsters_selection_language_works():
    """It does not where hydra-core 1.3 has brought its old antlr4."""
    graph = defs.resolve_asset_graph()
    chosen = dg.AssetSelection.from_string('1+key:"m2m_dino" and not group:"models"').resolve(graph)
    assert {key.to_user_string() for key in chosen} == {"mis_shards", "dino_features"}
