"""What the end of a Slurm job means, without a Slurm; how real ones end is in `test_slurm_faults`."""

from pathlib import Path

import pytest

from m2m.config import load_profile
from m2m.stages import STAGES, resources
from orchestration.launchers import slurm_jobs
from orchestration.launchers.slurm_jobs import Task
from orchestration.launchers.slurm_outcome import end_of

SAID = [["ZeroDivisionError: a bug"], ["slurmstepd: error: Job 57 exceeded memory limit"], ["some warning"]]


def ended(*ends: Task) -> tuple[int, str | None, list[str]]:
    stage = STAGES["generate-sets"]
    return end_of(stage, resources(stage, load_profile("tiny")), "57", ends, SAID, Path("folder"))


def test_of_an_array_the_task_that_failed_says_why():
    others = Task("COMPLETED", number=1), Task("COMPLETED", number=2)
    assert ended(*others, Task("FAILED", "NonZeroExitCode", 1, number=0)) == (1, None, SAID[0])


@pytest.mark.parametrize("number, what", [(1, "ran out of memory"), (2, None)])
def test_a_task_was_too_large_if_it_was_told_so_itself(number, what):
    code, why, _ = ended(Task("FAILED", exit_code=-9, number=number), Task("COMPLETED"))
    assert code == -9 and (what in why if what else why is None)


def test_tasks_are_known_by_their_place_in_the_array(monkeypatch):
    shown = "\n".join(
        f"JobId=5{n} ArrayJobId=57 ArrayTaskId={place} JobState={state} Reason=None ExitCode=0:0 Comment=ours"
        for n, (place, state) in enumerate([("2-9%4", "PENDING"), ("1", "RUNNING"), ("0", "FAILED")])
    )
    monkeypatch.setattr(slurm_jobs, "_call", lambda *argv: shown)
    assert [(task.number, task.state) for task in slurm_jobs.tasks("57", "ours")] == [
        (0, "PENDING"),
        (1, "RUNNING"),
        (0, "FAILED"),
    ]
