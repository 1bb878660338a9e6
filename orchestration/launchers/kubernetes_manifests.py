"""What a launch is to Kubernetes: a Job, and for a training across nodes a headless Service.

Belongs here: manifests, from a stage's request and the launcher's settings. Not here: sending them (`kubernetes`).

Always an Indexed Job, also of one pod. What its cluster does is answered by the cluster, also while Dagster is away: a
pod that is evicted, preempted or on a lost node does not count and is started again; one that stopped after a
checkpoint is started again; any other end of a command fails the Job at once.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from m2m.arguments import EXIT_CALL_AGAIN
from m2m.config import Resources

RUN_LABEL, LAUNCH_LABEL, INDEX_LABEL = "m2m/run", "m2m/launch", "batch.kubernetes.io/job-completion-index"
CONTAINER = "stage"
SIGTERM_CODE = 143
_PORT = 29500
_RESTARTS = 20


@dataclass(frozen=True)
class PodSettings:
    """What a cluster wants of every pod; fields as Kubernetes has them."""

    image: str
    namespace: str
    gpu_resource: str = "nvidia.com/gpu"
    gpu_types: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Mapping[str, Any]] = ()
    volumes: Sequence[Mapping[str, Any]] = ()
    volume_mounts: Sequence[Mapping[str, Any]] = ()
    secrets: Sequence[str] = ()
    image_pull_secrets: Sequence[str] = ()
    service_account: str | None = None
    working_dir: str | None = None
    priority_class: str | None = None
    pod: Mapping[str, Any] = field(default_factory=dict)
    container: Mapping[str, Any] = field(default_factory=dict)
    grace_seconds: int = 120
    keep_seconds: int = 3600


def job(
    name: str,
    labels: Mapping[str, str],
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    asked: Resources,
    settings: PodSettings,
    *,
    partitioned: bool,
    at_once: int = 0,
) -> dict[str, Any]:
    """A Job of one pod a command; of one pod a node where a command is shared by several GPUs or nodes.

    Args:
        commands: of a range of shards, one a part; else a single one.
        at_once: pods that may run together; 0 for all.
    """
    shared = not partitioned and asked.nodes * max(asked.gpus, 1) > 1
    pods = asked.nodes if shared else len(commands)
    together = asked.nodes > 1 and shared
    rules: list[dict[str, Any]] = []
    if not together:
        rules = [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {
                "action": "FailJob",
                "onExitCodes": {
                    "containerName": CONTAINER,
                    "operator": "NotIn",
                    "values": [0, EXIT_CALL_AGAIN, SIGTERM_CODE],
                },
            },
        ]
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": min(at_once or pods, pods) if not together else pods,
        "backoffLimit": 0 if together else _RESTARTS,  # of a training across nodes none can go on without the others
        "ttlSecondsAfterFinished": settings.keep_seconds,
        "template": {
            "metadata": {"labels": dict(labels)},
            "spec": _pod(name, commands, environment, asked, settings, shared=shared, together=together),
        },
    }
    if rules:
        spec["podFailurePolicy"] = {"rules": rules}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(name, labels, settings), "spec": spec}


def service(name: str, labels: Mapping[str, str], settings: PodSettings, owner_uid: str) -> dict[str, Any]:
    """The headless Service by which the pods of a training find the first of them; goes with its Job."""
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": owner_uid}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**_metadata(name, labels, settings), "ownerReferences": [owner]},
        "spec": {
            "clusterIP": "None",
            "selector": {"job-name": name},
            "publishNotReadyAddresses": True,  # they look for each other while they start
            "ports": [{"name": "rendezvous", "port": _PORT}],
        },
    }


def shell_command(commands: Sequence[Sequence[str]]) -> list[str]:
    """One command line for all pods, that becomes the command of the pod's index."""
    if len(commands) == 1:
        return list(commands[0])
    cases = [f"{index}) exec {shlex.join(command)} ;;" for index, command in enumerate(commands)]
    return ["/bin/sh", "-c", "\n".join(['case "$JOB_COMPLETION_INDEX" in', *cases, "esac"])]


def _pod(
    name: str,
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    asked: Resources,
    settings: PodSettings,
    *,
    shared: bool,
    together: bool,
) -> dict[str, Any]:
    command = _shared_command(name, commands[0], asked) if shared else shell_command(commands)
    size: dict[str, Any] = {"cpu": str(asked.cpus), "memory": f"{math.ceil(asked.memory_gb * 1024)}Mi"}
    limits = {"memory": size["memory"]}  # no limit of CPUs: a pod may use what others leave
    if asked.gpus:
        limits[settings.gpu_resource] = size[settings.gpu_resource] = str(asked.gpus)
    selector = {**settings.node_selector, **settings.gpu_types.get(asked.gpu_type or "", {})}
    container = {
        "name": CONTAINER,
        "image": settings.image,
        "command": command,
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "resources": {"requests": size, "limits": limits},
        "envFrom": [{"secretRef": {"name": secret}} for secret in settings.secrets],
        "volumeMounts": [dict(mount) for mount in settings.volume_mounts],
        **({"workingDir": settings.working_dir} if settings.working_dir else {}),
    }
    volumes = [dict(volume) for volume in settings.volumes]
    if asked.gpus:  # NCCL and data loaders share memory; a container has 64 MB of it by default
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    optional = {
        "nodeSelector": selector,
        "tolerations": [dict(toleration) for toleration in settings.tolerations],
        "imagePullSecrets": [{"name": secret} for secret in settings.image_pull_secrets],
        "serviceAccountName": settings.service_account,
        "priorityClassName": settings.priority_class,
        "subdomain": name if together else None,
    }
    made = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": math.ceil(asked.hours * 3600),
        "terminationGracePeriodSeconds": settings.grace_seconds,  # to save a checkpoint in
        "containers": [_joined(container, settings.container)],
        "volumes": volumes,
        **{key: value for key, value in optional.items() if value},
    }
    return _joined(made, settings.pod)


def _joined(ours: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """What a cluster wants beside what the launcher sets: mappings key by key, lists one after the other."""
    joined = dict(ours)
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(joined.get(key), Mapping):
            joined[key] = _joined(joined[key], value)
        elif isinstance(value, list) and isinstance(joined.get(key), list):
            joined[key] = [*joined[key], *value]
        else:
            joined[key] = value
    return joined


def _shared_command(name: str, command: Sequence[str], asked: Resources) -> list[str]:
    leader = f"{name}-0.{name}" if asked.nodes > 1 else "127.0.0.1"
    told = ["--nodes", str(asked.nodes), "--processes", str(max(asked.gpus, 1)), "--leader", f"{leader}:{_PORT}"]
    ranks = [command[0], "-m", "m2m.ranks", *told]
    return ["/bin/sh", "-c", f'exec {shlex.join(ranks)} --node "$JOB_COMPLETION_INDEX" -- {shlex.join(command)}']


def _metadata(name: str, labels: Mapping[str, str], settings: PodSettings) -> dict[str, Any]:
    return {"name": name, "namespace": settings.namespace, "labels": dict(labels)}
