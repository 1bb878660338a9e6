"""A stage is one thing seen three ways: the registry, Dagster's graph and DVC's graph say the same."""

from pathlib import Path

import dagster as dg
import pytest
from dvc.repo import Repo

from assets_defs.captions import caption_file
from assets_defs.launching import code_version
from m2m.config import load_profile
from m2m.run_record import records
from m2m.stages import STAGES, commands
from orchestration.definitions import defs

ROOT = Path(__file__).parents[2]
BY_ASSET = {stage.asset: stage for stage in STAGES.values()}


@pytest.fixture(scope="module")
def profile():
    return load_profile("tiny", known=commands())


@pytest.fixture(scope="module")
def dvc_stages():
    with Repo(str(ROOT)) as repo:
        return {stage.addressing: stage for stage in repo.index.stages}


def dvc_name(key: str) -> str:
    command, at, _ = key.partition("@")
    return key if at else command.replace("-", "_")


def test_dagster_has_the_registrys_stages_inputs_and_checks(profile):
    graph = defs.resolve_asset_graph()
    assert {key.to_user_string() for key in graph.materializable_asset_keys} == set(BY_ASSET)
    for name, stage in BY_ASSET.items():
        node = graph.get(dg.AssetKey(name))
        made = node.parent_keys & graph.materializable_asset_keys
        upstream = {BY_ASSET[key.to_user_string()].key for key in made}
        assert upstream == set(stage.inputs.values())
        assert {key.name for key in node.check_keys} == set(stage.checks)
        assert (node.group_name, node.kinds) == (stage.group, set(stage.kinds))
        assert node.code_version == code_version(stage, profile)
        assert (node.partitions_def is not None) == stage.partitioned
        assert node.description == stage.description and node.owners
        assert all(graph.get(key).blocking for key in node.check_keys)


def test_dvc_has_the_registrys_stages_commands_and_paths(dvc_stages, profile):
    assert set(dvc_stages) == {dvc_name(key) for key in STAGES}
    for key, stage in STAGES.items():
        seen = dvc_stages[dvc_name(key)]
        assert seen.cmd == f"python -m m2m {' '.join(stage.argv)} --config configs/tiny.yaml"
        made, runs = seen.outs
        (version,) = [dep for dep in seen.deps if dep.def_path == "m2m/stages.py"]
        assert version.params == [f"VERSIONS.{stage.command}"]
        assert version.read_params() == {f"VERSIONS.{stage.command}": stage.version}
        assert Path(made.fs_path) == stage.folder(profile)
        assert Path(runs.fs_path) == records(profile, stage)
        assert made.persist and runs.persist, "DVC would delete what a stopped run goes on from"
        (settings,) = [dep for dep in seen.deps if dep.def_path == "configs/tiny.yaml"]
        assert settings.params == [stage.command]


def test_dvc_and_the_registry_have_the_same_edges(dvc_stages):
    made_by = {out.fs_path: name for name, stage in dvc_stages.items() for out in stage.outs}
    for key, stage in STAGES.items():
        read = {made_by[dep.fs_path] for dep in dvc_stages[dvc_name(key)].deps if dep.fs_path in made_by}
        assert read == {dvc_name(input_key) for input_key in stage.inputs.values()}


def test_what_else_dvc_depends_on_is_the_caption_file_as_in_dagster_and_what_does_not_change(dvc_stages, profile):
    made = {out.fs_path for stage in dvc_stages.values() for out in stage.outs}
    for name, stage in dvc_stages.items():
        others = {str(Path(dep.fs_path).relative_to(ROOT)) for dep in stage.deps if dep.fs_path not in made}
        constant = {"LICENSE", "workspace.yaml"}
        known = {"configs/tiny.yaml", "m2m/stages.py"}
        source = {profile.section("filter-captions")["source"]} if name == "filter_captions" else set()
        assert others - constant == known | source
        assert all((ROOT / path).is_file() for path in others)
    graph = defs.resolve_asset_graph()
    read = graph.get(dg.AssetKey("filtered_captions")).parent_keys - graph.materializable_asset_keys
    assert read == {caption_file.key}
