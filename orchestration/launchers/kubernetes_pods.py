"""What Kubernetes says of a Job's pods, read: why they do not start, what became of them, how the Job ended.

Belongs here: states, conditions and events, in words of people and exit codes of commands. Not here: asking the cluster
for them (`kubernetes`), telling Dagster (`outcome`).
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from m2m.arguments import EXIT_CALL_AGAIN
from m2m.config import Resources
from m2m.stages import Stage
from orchestration.launchers.kubernetes_manifests import CONTAINER, SIGTERM_CODE

_PULLING = {"ErrImagePull", "ImagePullBackOff"}
_HOPELESS = {
    "InvalidImageName": "image",
    "ErrImageNeverPull": "image",
    "CreateContainerConfigError": "secrets",
    "CreateContainerError": "image, command or volume_mounts",
}
_NO_START = {"StartError", "ContainerCannotRun", "RunContainerError"}  # containerd, docker, a kubelet
_MOUNTS = {"FailedMount", "FailedAttachVolume"}


@dataclass(frozen=True)
class Trouble:
    """Why pods do not start.

    Attributes:
        why: as the cluster says it.
        way_out: what to set.
        hope: `none`; `some`, for what may come right by itself within minutes; `queue`, for what comes when others are
            done, or a larger cluster.
    """

    why: str
    way_out: str
    hope: Literal["none", "some", "queue"]


def trouble(stage: Stage, pods: Sequence[Any], events: Sequence[Any]) -> Trouble | None:
    """Why pods do not start, the worst first.

    Args:
        events: warnings about the Job and about pods of it that have not started.
    """
    found = [_of_pod(stage, pod) for pod in pods if pod.status.phase == "Pending"]
    found += [_of_event(stage, event) for event in events]
    rank = ("none", "some", "queue").index
    return min((one for one in found if one), key=lambda one: rank(one.hope), default=None)


def counted(pods: Sequence[Any]) -> str:
    """Pods by phase, and those whose node is silent, for people."""
    phases = sorted(pod.status.phase or "Pending" for pod in pods)
    said = ", ".join(f"{phases.count(phase)} {phase}" for phase in dict.fromkeys(phases)) or "no pods yet"
    now = datetime.datetime.now(datetime.UTC)
    for pod in pods:
        gone_by = pod.metadata.deletion_timestamp
        if gone_by and gone_by < now and pod.status.phase == "Running":
            node = f"node {pod.spec.node_name}" if pod.spec.node_name else "its node"
            then = f"once {node} is back, deleted, or tainted node.kubernetes.io/out-of-service"
            return f"{said}; {node} does not end {pod.metadata.name}: the cluster starts another pod {then}"
    return said


def taken_away(pod: Any) -> str | None:
    """Why the cluster ended a pod that had not failed by itself."""
    for condition in pod.status.conditions or []:
        if condition.type == "DisruptionTarget" and condition.status == "True":
            return ": ".join(word for word in (condition.reason, condition.message) if word)
    return pod.status.reason if pod.status.reason in ("DeadlineExceeded", "Evicted") else None


def has_started(pod: Any) -> bool:
    state = _state(pod)
    return bool(state and (state.running or state.terminated))


def culprit(pods: Sequence[Any]) -> Any:
    """Of a failed Job's pods the one that failed by itself, and first; none where all were taken away or stopped."""
    failed = [pod for pod in pods if pod.status.phase == "Failed" and not _goes_on(pod)]
    ended = [(state.finished_at, pod) for pod in failed if (state := _terminated(pod)) and state.finished_at]
    return min(ended, key=lambda end: end[0])[1] if ended else next(iter(failed), None)


def end_of(
    stage: Stage, name: str, asked: Resources, failed: Any, pod: Any, last_lines: Sequence[str]
) -> tuple[int, str | None]:
    """A Job's end as a command's: an exit code, and why where the cluster knows that better.

    Args:
        failed: the Job's condition of that type; None of one that is complete.
        pod: its `culprit`.
        last_lines: what that printed.
    """
    if failed is None:
        return 0, None
    if pod is None:
        said = f" ({failed.message})" if failed.message and failed.reason != "PodFailurePolicy" else ""
        return EXIT_CALL_AGAIN, f"{stage.key}: job {name} was stopped{said}; it goes on from what is whole"
    where, state = f"pod {pod.metadata.name}", _terminated(pod)
    if state is None:
        return 1, f"{stage.key}: {where}: {pod.status.reason}: {pod.status.message}"
    code = state.exit_code or 1
    if state.reason == "OOMKilled":
        more = f"it asked for {asked.memory_gb:g} GB a node: raise {stage.command}.resources.memory_gb"
        return -9, f"{stage.key} ran out of memory ({where}); {more}"
    if state.reason in _NO_START or (not last_lines and state.message):
        what = f"{where} can't start its command: {state.reason}: {state.message}"
        return code, f"{stage.key}: {what}. Set the launcher's image, command or working_dir (M2M_LAUNCHER)"
    return (128 - code if code > 128 else code), None


def _of_pod(stage: Stage, pod: Any) -> Trouble | None:
    state = _state(pod)
    waiting = state.waiting if state else None
    if waiting and waiting.reason in (_PULLING | _HOPELESS.keys()):
        why = (
            f"pod {pod.metadata.name} can't start: {waiting.reason}: {waiting.message or pod.spec.containers[0].image}"
        )
        if waiting.reason in _PULLING:
            return Trouble(why, "Set the launcher's image or image_pull_secrets", "some")
        return Trouble(why, f"Set the launcher's {_HOPELESS[waiting.reason]}", "none")
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.reason == "Unschedulable":
            why = f"pod {pod.metadata.name} waits for a node: {condition.message}"
            if "not found" in (condition.message or ""):  # a claim of a volume
                return Trouble(why, "Set the launcher's volumes", "some")
            nodes = "the launcher's gpu_types, gpu_resource, node_selector or tolerations"
            return Trouble(why, f"Where no such node will come, set {stage.command}.resources or {nodes}", "queue")
    return None


def _of_event(stage: Stage, event: Any) -> Trouble | None:
    said = event.message or ""
    if event.reason == "FailedCreate":
        why = f"the cluster makes no pod: {said}"
        if "exceeded quota" in said:
            hope = "none" if _asks_for_more_than_the_quota(said) else "queue"
            return Trouble(why, f"Set {stage.command}.resources, or have the namespace's quota raised", hope)
        settings = "service_account, priority_class or pod (securityContext)"
        return Trouble(why, f"Set {stage.command}.resources, or the launcher's {settings}", "some")
    if event.reason in _MOUNTS:
        why = f"pod {event.involved_object.name} can't start: {event.reason}: {said}"
        return Trouble(why, "Set the launcher's volumes", "some" if "not found" in said else "queue")
    return None


def _asks_for_more_than_the_quota(said: str) -> bool:
    """Of `exceeded quota: NAME, requested: cpu=8,..., used: cpu=2,..., limited: cpu=4,...`."""
    from kubernetes.utils import parse_quantity

    found = re.search(r"requested: (\S+), used: \S+, limited: (\S+)", said)
    if not found:
        return False
    requested, limited = (dict(pair.split("=", 1) for pair in part.strip(",").split(",")) for part in found.groups())
    return any(parse_quantity(requested[what]) > parse_quantity(limited[what]) for what in requested if what in limited)


def _goes_on(pod: Any) -> bool:
    """Whether the same command, called again, takes up the work: it was ended from outside, or stopped to go on."""
    state = _terminated(pod)
    return bool(taken_away(pod) or (state and state.exit_code in (EXIT_CALL_AGAIN, SIGTERM_CODE)))


def _state(pod: Any) -> Any:
    return next((s.state for s in pod.status.container_statuses or [] if s.name == CONTAINER), None)


def _terminated(pod: Any) -> Any:
    state = _state(pod)
    return state.terminated if state else None
