"""Runs of the real definitions over toy stages on Slurm, in the test's process or as a user starts them.

Belongs here: starting a run, reading what came of it. Not here: what must come of it (the tests).
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import dagster as dg
import pytest
from beside import beside
from toy_ground import Ground
from toy_slurm_definitions import LAUNCHER

from m2m.config import Profile, load_profile
from orchestration.definitions import build_defs
from orchestration.launchers import slurm as launching
from orchestration.launchers.slurm import SlurmLauncher

SHARDS = ("00000", "00002")


def materialize_on_slurm(
    ground: Ground,
    monkeypatch: pytest.MonkeyPatch,
    asset: str,
    act: str = "work",
    *,
    meanwhile: Callable[[], object] = lambda: None,
    launcher: SlurmLauncher = LAUNCHER,
    resources: str = "{}",
) -> dg.ExecuteInProcessResult:
    """Materialize one asset of toys from this process; `meanwhile` runs beside it."""
    profile = ground.folder / "configs" / "toy.yaml"
    profile.write_text(
        "".join(
            f"{command}: {{{settings} resources: {resources}}}\n"
            for command, settings in {"filter-captions": "", "generate-sets": "shards: 3,", "pretrain": ""}.items()
        )
    )
    return execute_on_slurm(monkeypatch, load_profile(profile), asset, launcher, meanwhile, f"act={act}")


def execute_on_slurm(
    monkeypatch: pytest.MonkeyPatch,
    profile: Profile,
    asset: str,
    launcher: SlurmLauncher,
    meanwhile: Callable[[], object],
    *overrides: str,
) -> dg.ExecuteInProcessResult:
    """Materialize one asset from this process, three shards of it where it has shards."""
    monkeypatch.setattr(launching, "PROFILE", profile)
    defs = build_defs(resource_overrides={"launcher": launcher})
    with beside(meanwhile, lambda: subprocess.run(["scancel", "--me"], check=False)):
        return defs.resolve_job_def("m2m_pipeline").execute_in_process(
            asset_selection=[dg.AssetKey(asset)],
            tags=dict(zip(("dagster/asset_partition_range_start", "dagster/asset_partition_range_end"), SHARDS)),
            run_config={"ops": {asset: {"config": {"overrides": list(overrides)}}}},
            raise_on_error=False,
        )


def why(result: dg.ExecuteInProcessResult) -> str:
    (event,) = (event for event in result.all_events if event.is_step_failure)
    assert event.step_failure_data.error is not None
    return event.step_failure_data.error.message


def retries(result: dg.ExecuteInProcessResult) -> int:
    return [event.event_type_value for event in result.all_events].count("STEP_UP_FOR_RETRY")


def said(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, object]:
    made = result.asset_materializations_for_node(asset)[-1]
    return {name: value.value for name, value in made.metadata.items()}


@contextlib.contextmanager
def started(ground: Ground, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of Dagster's on the toy definitions; ended at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", *argv, "-m", "toy_slurm_definitions"],
        env=ground.environment,
        cwd=ground.folder,
        stdout=subprocess.DEVNULL,
        stderr=(ground.folder / f"{argv[0]}.log").open("ab"),
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def job_of(ground: Ground, how: str, job: str, asset: str, act: str) -> Sequence[str]:
    """Arguments that execute or launch a job, one of its stages doing `act`."""
    config = ground.folder / "launch.json"
    config.write_text(json.dumps({"ops": {asset: {"config": {"overrides": [f"act={act}"]}}}}))
    return "dagster", "job", how, "-j", job, "--config", str(config)


@contextlib.contextmanager
def instance(ground: Ground) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(ground.folder / "dagster")) as found:
        yield found


def toy(ground: Ground, *argv: str) -> None:
    """Run a toy stage here, without Dagster or Slurm."""
    command = [sys.executable, str(LAUNCHER.command[1]), *argv, "--config", ground.environment["M2M_PROFILE"]]
    subprocess.run(command, env=ground.environment, check=True, capture_output=True)
