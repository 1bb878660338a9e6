"""Stages as Jobs of a Kubernetes cluster, heard through their pods' logs.

Belongs here: following a launch from its Job to its end, taking up one that an earlier run left, ending what nobody
follows. Not here: manifests (`kubernetes_manifests`), logs (`kubernetes_logs`), what an end means (`outcome`).

The parts of dagster-k8s' `PipesK8sClient` are used (how it finds its cluster, how it reads a log) and not its `run`:
that starts a bare pod, which nobody starts again when its node is lost, and which a later run could not take up.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import contextlib
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg
from dagster import PipesEnvContextInjector, open_pipes_session
from pydantic import Field

from assets_defs.launching import Launch, Results
from assets_defs.profile import PROFILE
from m2m.arguments import EXIT_CALL_AGAIN
from m2m.config import Resources
from m2m.stages import Stage, resources
from orchestration.launchers.following import digest, is_orphan, may_take_up
from orchestration.launchers.kubernetes_manifests import (
    CONTAINER,
    LAUNCH_LABEL,
    RUN_LABEL,
    SIGTERM_CODE,
    PodSettings,
    job,
    service,
)
from orchestration.launchers.outcome import last_of_each, results, stage_arguments
from orchestration.launchers.process_mark import RUN_TAG, this_process
from orchestration.launchers.surroundings import passed_on

JOB_TAG = "m2m/kubernetes_job"
_FIRST_POLL = 0.2  # seconds; grows to `poll_seconds`
_MOST_PODS = 1000  # of a Job: its manifest names each part
_LINES_KEPT = 40
_PULLING = {"ErrImagePull", "ImagePullBackOff"}
_HOPELESS = {"InvalidImageName", "CreateContainerConfigError", "CreateContainerError", "ErrImageNeverPull"}


class KubernetesLauncher(dg.ConfigurableResource):
    """Runs `python -m m2m STAGE ...` in pods: a range of shards as an indexed Job, a training on several nodes as one
    with a headless Service. Outputs lie on a volume that the pods share, at the path that Dagster knows them by."""

    image: str = Field(description="with this package and its dependencies in it")
    namespace: str | None = Field(default=None, description="the kubeconfig's, or `default`")
    kubeconfig: str | None = Field(default=None, description="KUBECONFIG or ~/.kube/config; in a pod, its own account")
    context: str | None = Field(default=None, description="of the kubeconfig")
    command: list[str] = Field(default=["python", "-m", "m2m"], description="what a stage's arguments follow")
    gpu_resource: str = "nvidia.com/gpu"
    gpu_types: dict[str, dict[str, str]] = Field(
        default={}, description="node labels by the profile's gpu_type, for example nvidia.com/gpu.product"
    )
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    volumes: list[dict[str, Any]] = Field(default=[], description="as in a pod's spec")
    volume_mounts: list[dict[str, Any]] = Field(default=[], description="as in a container's spec")
    secrets: list[str] = Field(default=[], description="whose keys become environment variables")
    image_pull_secrets: list[str] = []
    service_account: str | None = None
    priority_class: str | None = None
    working_dir: str | None = Field(default=None, description="of the command; the image's own by default")
    shards_per_task: int = Field(default=1, ge=1, description="of a pod; more where there would be over 1,000 pods")
    tasks_at_once: int = Field(default=0, ge=0, description="pods of a range; 0: as many as the cluster lets run")
    grace_seconds: int = Field(default=120, ge=1, description="from SIGTERM to SIGKILL, to save a checkpoint in")
    poll_seconds: float = Field(default=5, gt=0, description="between looks at a job that has been running for long")
    pull_seconds: float = Field(default=120, description="that an image may fail to be pulled, before the step fails")
    orphan_seconds: float = Field(default=120, description="that a job outlives its run, for a new one to take it up")
    keep_seconds: int = Field(default=3600, ge=60, description="that the cluster keeps an ended job and its logs")

    def materialize(
        self, context: dg.AssetExecutionContext, stage: Stage, launch: Launch, *, shards: Sequence[str] | None = None
    ) -> Results:
        """Run the stage on the cluster; see `assets_defs.launching.Launcher`."""
        from orchestration.launchers.kubernetes_logs import JobLogs

        cluster = self._cluster()
        asked = resources(stage, PROFILE)
        commands = [[*self.command, *stage_arguments(stage, PROFILE, launch, part)] for part in self._parts(shards)]
        context.instance.add_run_tags(context.run.run_id, {RUN_TAG: this_process()})
        reader = JobLogs()
        started = time.monotonic()
        with open_pipes_session(
            context=context, context_injector=PipesEnvContextInjector(), message_reader=reader
        ) as session:
            name, run = cluster.left_by_an_earlier_run(context, digest(commands)) or (None, None)
            try:
                if name is None:
                    environment = {**session.get_bootstrap_env_vars(), **passed_on()}
                    name = cluster.start(context, stage, commands, environment, asked)
                else:
                    context.log.info(f"job {name} of run {run} is still there: followed, not launched again")
                context.instance.add_run_tags(context.run.run_id, {f"{JOB_TAG}/{_step(context)}": name})
                with reader.following(context, cluster.core, cluster.namespace) as followed:
                    code, why, last_lines = cluster.follow(context, stage, name, asked, followed)
            except BaseException:
                cluster.end(context, digest(commands))
                raise
        told = {
            "kubernetes_job": dg.MetadataValue.text(f"{cluster.namespace}/{name}"),
            "seconds": dg.MetadataValue.float(round(time.monotonic() - started, 1)),
        }
        yield from results(
            context, stage, last_of_each(session.get_reported_results()), code, last_lines, told, why=why
        )

    def end_orphans(self, instance: dg.DagsterInstance) -> list[str]:
        """Delete jobs whose run has been over for a while; returns their names. Another Dagster's are left alone."""
        with contextlib.suppress(dg.Failure):  # no cluster answers: the next tick asks again
            cluster = self._cluster()
            with cluster.clear_refusals():
                jobs = cluster.jobs(RUN_LABEL)
            orphans = [
                found.metadata.name
                for found in jobs
                if not _has_ended(found)
                and is_orphan(
                    instance, JOB_TAG, found.metadata.name, found.metadata.labels[RUN_LABEL], self.orphan_seconds
                )
            ]
            for name in orphans:
                cluster.delete(name)
            return orphans
        return []

    def _parts(self, shards: Sequence[str] | None) -> list[Sequence[str] | None]:
        if shards is None:
            return [None]
        each = max(self.shards_per_task, math.ceil(len(shards) / _MOST_PODS))
        keys = sorted(shards)
        return [keys[start : start + each] for start in range(0, len(keys), each)]

    def _cluster(self) -> "_Cluster":
        try:
            import kubernetes
            from dagster_k8s import PipesK8sClient
            from dagster_k8s.client import DagsterKubernetesClient
        except ImportError:
            raise _failure("the launcher is kubernetes, which needs `pip install 'm2m[kubernetes]'`") from None
        found = PipesK8sClient(kubeconfig_file=self.kubeconfig, kube_context=self.context)
        try:
            found._load_k8s_config()
            client = DagsterKubernetesClient.production_client()
            namespace = self.namespace or _namespace_of(self.kubeconfig, self.context) or "default"
        except kubernetes.config.ConfigException as error:
            said = f"no Kubernetes cluster is known here: {error}"
            raise _failure(f"{said}. Set the launcher's kubeconfig and context (M2M_LAUNCHER)") from None
        return _Cluster(self, client.batch_api, client.core_api, namespace)


class _Cluster:
    """One namespace of a cluster that answers."""

    def __init__(self, launcher: KubernetesLauncher, batch: Any, core: Any, namespace: str) -> None:
        self.batch, self.core, self.namespace = batch, core, namespace
        self._launcher = launcher

    def left_by_an_earlier_run(self, context: dg.AssetExecutionContext, commands: str) -> tuple[str, str] | None:
        """A job that does what is wanted and that nobody follows any more, and the run that launched it."""
        with self.clear_refusals():
            jobs = self.jobs(f"{LAUNCH_LABEL}={commands}")
        for found in jobs:
            name, run = found.metadata.name, found.metadata.labels[RUN_LABEL]
            free = not _has_ended(found) and may_take_up(context.instance, context.run.run_id, JOB_TAG, name, run)
            if free:
                return name, run
        return None

    def start(
        self,
        context: dg.AssetExecutionContext,
        stage: Stage,
        commands: Sequence[Sequence[str]],
        environment: dict[str, str],
        asked: Resources,
    ) -> str:
        """Create the Job, and its Service where its pods have to find each other; returns its name."""
        launcher = self._launcher
        words = re.sub(r"[^a-z0-9]+", "-", f"m2m-{PROFILE.name}-{stage.key}".lower())[:40].strip("-")
        retry = context.op_execution_context.retry_number
        name = f"{words}-{context.run.run_id[:8]}-{retry}"
        labels = {RUN_LABEL: context.run.run_id, LAUNCH_LABEL: digest(commands)}
        settings = PodSettings(
            namespace=self.namespace,
            **{
                field: getattr(launcher, field)
                for field in PodSettings.__dataclass_fields__
                if field in KubernetesLauncher.model_fields and field != "namespace"
            },
        )
        manifest = job(
            name,
            labels,
            commands,
            environment,
            asked,
            settings,
            partitioned=stage.partitioned,
            at_once=launcher.tasks_at_once,
        )
        with self.clear_refusals():
            made = self.batch.create_namespaced_job(self.namespace, manifest)
            if manifest["spec"]["template"]["spec"].get("subdomain"):
                self.core.create_namespaced_service(self.namespace, service(name, labels, settings, made.metadata.uid))
        context.log.info(f"job {self.namespace}/{name} created: {manifest['spec']['completions']} pod(s)")
        return name

    def follow(
        self, context: dg.AssetExecutionContext, stage: Stage, name: str, asked: Resources, followed: Any
    ) -> tuple[int, str | None, list[str]]:
        """Wait for the Job's end, however long the cluster does not answer; its end as a command's.

        Returns:
            exit code; why, where the cluster knows that better; the end of what the command said.
        """
        wait, seen, failing_since = _FIRST_POLL, "", 0.0
        while True:
            try:
                now = self.batch.read_namespaced_job(name, self.namespace)
                pods = self.core.list_namespaced_pod(self.namespace, label_selector=f"job-name={name}").items
            except Exception as error:
                if _status(error) == 404:
                    return 1, f"{stage.key}: job {name} was deleted on the cluster; what is whole is kept", []
                if _status(error) not in (None, 429, 500, 502, 503, 504):
                    raise
                now, pods, said = None, [], f"the cluster does not answer ({_short(error)}); the job itself goes on"
            else:
                said = _counted(pods)
            if said != seen:
                context.log.info(f"job {name}: {said}")
                seen, wait = said, _FIRST_POLL
            for pod in pods:
                if _has_started(pod):
                    followed.begin(pod.metadata.name)
            if now is not None and _has_ended(now):
                return self._outcome(stage, name, asked, now, pods)
            hopeless, why = _will_not_start(pods)
            failing_since = (failing_since or time.monotonic()) if why else 0.0
            if why and (hopeless or time.monotonic() - failing_since > self._launcher.pull_seconds):
                raise _failure(
                    f"{stage.key}: {why}. Set the launcher's image, image_pull_secrets or secrets (M2M_LAUNCHER)"
                )
            time.sleep(wait)
            wait = min(wait * 1.3, self._launcher.poll_seconds)

    def end(self, context: dg.AssetExecutionContext, commands: str) -> None:
        """Delete what this run launched and wait until its pods are gone."""
        mine = f"{RUN_LABEL}={context.run.run_id},{LAUNCH_LABEL}={commands}"
        deadline = time.monotonic() + self._launcher.grace_seconds + 30
        with contextlib.suppress(Exception):
            for found in self.jobs(mine):
                self.delete(found.metadata.name)
                context.log.info(f"job {found.metadata.name} asked to end")
            while self.core.list_namespaced_pod(self.namespace, label_selector=mine).items:
                if time.monotonic() > deadline:
                    break
                time.sleep(_FIRST_POLL)
            else:
                return
        context.log.error("the job may not be gone; the sensor lost_runs looks again")

    def jobs(self, labels: str) -> list[Any]:
        return self.batch.list_namespaced_job(self.namespace, label_selector=labels).items

    def delete(self, name: str) -> None:
        with contextlib.suppress(Exception):  # gone already; if not, the sensor tries again
            self.batch.delete_namespaced_job(name, self.namespace, propagation_policy="Background")

    def _outcome(
        self, stage: Stage, name: str, asked: Resources, ended: Any, pods: Sequence[Any]
    ) -> tuple[int, str | None, list[str]]:
        failed = next((c for c in ended.status.conditions if c.type == "Failed" and c.status == "True"), None)
        if failed is None:
            return 0, None, []
        ends = [(pod, state) for pod in pods if pod.status.phase == "Failed" for state in [_terminated(pod)]]
        lost = [pod for pod, state in ends if _was_taken_away(pod, state)]
        own = [(pod, state) for pod, state in ends if pod not in lost]
        if not own:
            return EXIT_CALL_AGAIN, f"{stage.key}: job {name} was stopped; it goes on from what is whole", []
        pod, state = min(own, key=lambda end: end[1].finished_at if end[1] else 0)
        if state and state.reason == "OOMKilled":
            more = f"it asked for {asked.memory_gb:g} GB a node: raise {stage.command}.resources.memory_gb"
            return -9, f"{stage.key} ran out of memory (pod {pod.metadata.name}); {more}", self._last_lines(pod)
        if state is None:
            return 1, f"{stage.key}: pod {pod.metadata.name}: {pod.status.reason}: {pod.status.message}", []
        code = state.exit_code or 1
        return (128 - code if code > 128 else code), None, self._last_lines(pod)

    def _last_lines(self, pod: Any) -> list[str]:
        with contextlib.suppress(Exception):
            log = self.core.read_namespaced_pod_log(
                pod.metadata.name, self.namespace, tail_lines=_LINES_KEPT, _preload_content=False
            )
            lines = log.data.decode(errors="replace").splitlines()
            return [line for line in lines if "__dagster_pipes_version" not in line]
        return []

    @contextlib.contextmanager
    def clear_refusals(self) -> Iterator[None]:
        """A cluster that says no, or nothing at all, as a failure that says what to set."""
        import kubernetes
        import urllib3

        try:
            yield
        except kubernetes.client.ApiException as error:
            said = _short(error)
            meant = {
                401: "the cluster does not know who asks",
                403: f"the account may not do that in namespace {self.namespace}: give it a role for jobs, pods, "
                "pods/log and services",
                404: f"there is no namespace {self.namespace}",
            }.get(int(error.status or 0), "the cluster refuses the job")
            raise _failure(f"{meant}: {said}. Set the launcher's settings (M2M_LAUNCHER)") from None
        except urllib3.exceptions.HTTPError as error:
            host = self.batch.api_client.configuration.host
            raise _failure(
                f"Kubernetes does not answer at {host}: {_short(error)}. Set the launcher's kubeconfig and context"
            ) from None


def _has_ended(found: Any) -> bool:
    return any(c.type in ("Complete", "Failed") and c.status == "True" for c in found.status.conditions or [])


def _has_started(pod: Any) -> bool:
    state = next((s.state for s in pod.status.container_statuses or [] if s.name == CONTAINER), None)
    return bool(state and (state.running or state.terminated))


def _terminated(pod: Any) -> Any:
    return next((s.state.terminated for s in pod.status.container_statuses or [] if s.name == CONTAINER), None)


def _was_taken_away(pod: Any, state: Any) -> bool:
    """Whether the same command, called again, takes up the work: it was ended from outside, or stopped to go on."""
    disrupted = any(c.type == "DisruptionTarget" and c.status == "True" for c in pod.status.conditions or [])
    too_long = pod.status.reason == "DeadlineExceeded"
    return disrupted or too_long or bool(state and state.exit_code in (EXIT_CALL_AGAIN, SIGTERM_CODE))


def _will_not_start(pods: Sequence[Any]) -> tuple[bool, str]:
    """Whether a pod fails to start, for good or so far, and why."""
    for pod in pods:
        for status in pod.status.container_statuses or []:
            waiting = status.state.waiting if status.state else None
            if waiting and waiting.reason in _PULLING | _HOPELESS:
                why = f"pod {pod.metadata.name} can't start: {waiting.reason}: {waiting.message or status.image}"
                return waiting.reason in _HOPELESS, why
    return False, ""


def _counted(pods: Sequence[Any]) -> str:
    phases = sorted(pod.status.phase or "Pending" for pod in pods)
    said = ", ".join(f"{phases.count(phase)} {phase}" for phase in dict.fromkeys(phases)) or "no pods yet"
    for pod in pods:
        for condition in pod.status.conditions or []:
            if condition.type == "PodScheduled" and condition.reason == "Unschedulable":
                return f"{said}; {pod.metadata.name} waits: {condition.message}"
    return said


def _status(error: Exception) -> int | None:
    return getattr(error, "status", None)


def _short(error: Exception) -> str:
    body = str(getattr(error, "body", "") or "")
    found = re.search(r'"message":\s*"([^"]*)"', body)
    return found[1] if found else str(getattr(error, "reason", None) or error)


def _namespace_of(kubeconfig: str | None, context: str | None) -> str | None:
    from dagster_k8s.utils import detect_current_namespace

    return detect_current_namespace(kubeconfig)


def _failure(why: str) -> dg.Failure:
    return dg.Failure(why, allow_retries=False)


def _step(context: dg.AssetExecutionContext) -> str:
    return context.op_execution_context.get_step_execution_context().step.key
