"""A machine without Slurm, whose launcher is slurm all the same."""

import dagster as dg
from slurm_runs import materialize_on_slurm, retries, why
from toy_slurm_definitions import LAUNCHER


def test_without_slurm_the_launcher_says_so(ground, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    failed = materialize_on_slurm(ground, monkeypatch, "filtered_captions")
    assert "this machine has no sbatch" in why(failed) and "set M2M_LAUNCHER=local" in why(failed)
    assert retries(failed) == 0


def test_without_slurm_there_are_no_orphans(monkeypatch):
    """The sensor goes on looking after runs."""
    monkeypatch.setenv("PATH", "/nowhere")
    with dg.DagsterInstance.ephemeral() as instance:
        assert LAUNCHER.end_orphans(instance) == []
