"""What the end of a Ray job means: the same as which end of the command, and why.

Belongs here: states of jobs, their logs, Ray's errors in a line. Not here: following (`ray`), telling Dagster
(`outcome`).
"""

from collections.abc import Sequence
from typing import Any

from m2m.arguments import EXIT_CALL_AGAIN
from m2m.stages import Stage
from orchestration.launchers.outcome import LINES_KEPT
from orchestration.launchers.ray_driver import STARTED

_SIGNALLED = (-15, 143)
_WRONG = ("RUNTIME_ENV_SETUP_FAILURE", "JOB_ENTRYPOINT_COMMAND_START_ERROR")


def end_of(stage: Stage, job: str, ended: Any, log: Sequence[str]) -> tuple[int, str | None, list[str]]:
    """The job's end as a command's: an exit code; why, where Ray knows that better; the last lines that were printed.

    Args:
        ended: what Ray has of it; None where it has nothing more.
        log: what the job itself printed.
    """
    kept, goes_on = "what is whole is kept", "it goes on from what is whole"
    started = STARTED in log
    lines = list(log[log.index(STARTED) + 1 :] if started else log)[-LINES_KEPT:]
    if ended is None:
        return EXIT_CALL_AGAIN, f"{stage.key}: the Ray cluster has forgotten job {job}; {goes_on}", lines
    code, message = ended.driver_exit_code, ended.message or ""
    match ended.status.value:
        case "SUCCEEDED":
            return 0, None, lines
        case "STOPPED":
            return 1, f"{stage.key}: job {job} was stopped on the cluster; {kept}", lines
    if ended.error_type in _WRONG:
        return 1, f"{stage.key}: {_last_line(message)}. Set the launcher's runtime_env (M2M_LAUNCHER)", lines
    if code in (EXIT_CALL_AGAIN, *_SIGNALLED):
        return EXIT_CALL_AGAIN, f"{stage.key}: job {job} was stopped; {goes_on}", lines
    if code is None:  # not the command but Ray ended: a lost head node, a driver that was killed
        return EXIT_CALL_AGAIN, f"{stage.key}: job {job} was lost ({_last_line(message)}); {goes_on}", lines
    if lines and not started:
        said = f"{stage.key}: the head node can't start the job: {lines[-1].strip()}"
        more = "Nodes must have the checkout and its environment at Dagster's own paths, or set the launcher's python"
        return code, f"{said}. {more} (M2M_LAUNCHER)", lines
    return (128 - code if code > 128 else code), None, lines


def log_of(ray: Any, job: str) -> list[str]:
    """What the job printed, an error that ended it last; nothing where Ray does not answer."""
    try:
        return [line for line in ray.get_job_logs(job).splitlines() if line.strip()]
    except Exception:
        return []


def said_by(error: Exception) -> str:
    """The last line: before it stands where in the cluster's processes it was raised."""
    return _last_line(str(error)) or type(error).__name__


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    return lines[-1].rstrip(" .")[:300] if lines else ""
