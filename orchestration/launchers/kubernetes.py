"""Stages as Jobs of a Kubernetes cluster, heard through their pods' logs.

Belongs here: following a launch from its Job to its end, taking up one that an earlier run left, ending what nobody
follows. Not here: manifests (`kubernetes_manifests`), logs (`kubernetes_logs`), what states mean (`kubernetes_pods`).

The parts of dagster-k8s' `PipesK8sClient` are used (how it finds its cluster, how it reads a log) and not its `run`:
that starts a bare pod, which nobody starts again when its node is lost, and which a later run could not take up.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import contextlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg
from dagster import PipesEnvContextInjector, open_pipes_session
from pydantic import Field

from assets_defs.launching import Launch, Results
from assets_defs.profile import PROFILE
from m2m.config import Resources
from m2m.stages import Stage, resources
from orchestration.launchers.following import digest, is_orphan, may_take_up
from orchestration.launchers.kubernetes_manifests import LAUNCH_LABEL, RUN_LABEL, PodSettings, job, service
from orchestration.launchers.kubernetes_nodes import lacking
from orchestration.launchers.kubernetes_pods import counted, culprit, end_of, has_started, taken_away, trouble
from orchestration.launchers.outcome import LINES_KEPT, last_of_each, results, stage_arguments
from orchestration.launchers.process_mark import RUN_TAG, this_process
from orchestration.launchers.surroundings import passed_on

JOB_TAG = "m2m/kubernetes_job"
_FIRST_POLL = 0.2  # seconds; grows to `poll_seconds`
_MOST_PODS = 1000  # of a Job: its manifest names each part


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
    labels: dict[str, str] = Field(default={}, description="more of them, on Jobs and pods: a queue's name, a team")
    pod: dict[str, Any] = Field(default={}, description="more of a pod's spec: securityContext, affinity")
    container: dict[str, Any] = Field(default={}, description="more of its container: securityContext, env")
    autoscaling: bool = Field(default=False, description="wait for nodes that the cluster does not have yet")
    shards_per_task: int = Field(default=1, ge=1, description="of a pod; more where there would be over 1,000 pods")
    tasks_at_once: int = Field(default=0, ge=0, description="pods of a range; 0: as many as the cluster lets run")
    grace_seconds: int = Field(default=120, ge=1, description="from SIGTERM to SIGKILL, to save a checkpoint in")
    poll_seconds: float = Field(default=5, gt=0, description="between looks at a job that has been running for long")
    start_seconds: float = Field(
        default=120,
        description="that a pod may fail to be made or to start (image, volume), before the step fails",
    )
    wait_seconds: float = Field(
        default=0, ge=0, description="that pods may wait for a node or a quota, before the step fails; 0: for ever"
    )
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
                cluster.end(context, name, digest(commands))
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
            namespace = self.namespace or _namespace_of(self.kubeconfig, self.context)
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
        if launcher.gpu_types and asked.gpu_type and asked.gpu_type not in launcher.gpu_types:
            there = ", ".join(launcher.gpu_types)
            raise _failure(f"{stage.key} asks for gpu_type {asked.gpu_type}; the launcher's gpu_types have {there}")
        words = re.sub(r"[^a-z0-9]+", "-", f"m2m-{PROFILE.name}-{stage.key}".lower())[:40].strip("-")
        retry = context.op_execution_context.retry_number
        name = f"{words}-{context.run.run_id[:8]}-{retry}"
        labels = {**launcher.labels, RUN_LABEL: context.run.run_id, LAUNCH_LABEL: digest(commands)}
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
        spec = manifest["spec"]["template"]["spec"]
        if not launcher.autoscaling and (why := self._lacking(stage, asked, spec.get("nodeSelector", {}))):
            raise _failure(why)
        with self.clear_refusals():
            made = self.batch.create_namespaced_job(self.namespace, manifest)
            if spec.get("subdomain"):
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
        wait, seen, troubled, told = _FIRST_POLL, "", ("", 0.0), set()
        while True:
            held = None
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
                held = trouble(stage, pods, self._warnings(now, pods))
                said = counted(pods) + (f"; {held.why}. {held.way_out}" if held else "")
            if said != seen:
                context.log.info(f"job {name}: {said}")
                seen, wait = said, _FIRST_POLL
            for pod in pods:
                if has_started(pod):
                    followed.begin(pod.metadata.name)
                if (why := taken_away(pod)) and pod.metadata.name not in told:
                    context.log.warning(f"pod {pod.metadata.name} was taken away: {why}")
                    told.add(pod.metadata.name)
            if now is not None and _has_ended(now):
                pod = culprit(pods)
                last_lines = self._last_lines(pod) if pod else []
                failed = next((c for c in now.status.conditions if c.type == "Failed" and c.status == "True"), None)
                return *end_of(stage, name, asked, failed, pod, last_lines), last_lines
            if now is not None:
                hope = held.hope if held else ""
                troubled = troubled if hope == troubled[0] else (hope, time.monotonic())
            if held:
                patience = {"none": 0.0, "some": self._launcher.start_seconds}
                allowed = patience.get(held.hope, self._launcher.wait_seconds or math.inf)
                if time.monotonic() - troubled[1] >= allowed:
                    raise _failure(f"{stage.key}: {held.why}. {held.way_out} (M2M_LAUNCHER)")
            time.sleep(wait)
            wait = min(wait * 1.3, self._launcher.poll_seconds)

    def end(self, context: dg.AssetExecutionContext, name: str | None, commands: str) -> None:
        """Delete the job that is followed and wait until its pods are gone.

        Args:
            name: None where its creation was broken off: what this run launched is looked for.
        """
        launched = f"{RUN_LABEL}={context.run.run_id},{LAUNCH_LABEL}={commands}"
        mine = f"job-name={name}" if name else launched
        deadline = time.monotonic() + self._launcher.grace_seconds + 30
        with contextlib.suppress(Exception):
            for job_name in [name] if name else [found.metadata.name for found in self.jobs(launched)]:
                self.delete(job_name)
                context.log.info(f"job {job_name} asked to end")
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

    def _warnings(self, found: Any, pods: Sequence[Any]) -> list[Any]:
        """The latest about a Job that has not all its pods, and about a pod that does not start."""
        ended = [pod.status.phase for pod in pods].count("Succeeded")
        active = [pod for pod in pods if pod.status.phase in ("Pending", "Running")]
        about = [pod.metadata.name for pod in active if not has_started(pod)][:1]
        if len(active) < min(found.spec.parallelism, found.spec.completions - ended) and not _has_ended(found):
            about.append(found.metadata.name)
        warnings = []
        for name in about:
            with contextlib.suppress(Exception):  # an account may not be allowed to read them
                chosen = f"type=Warning,involvedObject.name={name}"
                events = self.core.list_namespaced_event(self.namespace, field_selector=chosen).items
                warnings += sorted(events, key=lambda e: e.last_timestamp or e.metadata.creation_timestamp)[-1:]
        return warnings

    def _last_lines(self, pod: Any) -> list[str]:
        with contextlib.suppress(Exception):
            log = self.core.read_namespaced_pod_log(
                pod.metadata.name, self.namespace, tail_lines=LINES_KEPT, _preload_content=False
            )
            lines = log.data.decode(errors="replace").splitlines()
            return [line for line in lines if "__dagster_pipes_version" not in line]
        return []

    def _lacking(self, stage: Stage, asked: Resources, labels: Mapping[str, str]) -> str | None:
        try:
            chosen = ",".join(f"{key}={value}" for key, value in labels.items())
            nodes = self.core.list_node(label_selector=chosen).items
        except Exception:  # the account may not look at nodes
            return None
        return lacking(stage, asked, nodes, chosen, self._launcher.gpu_resource)

    @contextlib.contextmanager
    def clear_refusals(self) -> Iterator[None]:
        """A cluster that says no, or nothing at all, as a failure that says what to set."""
        import kubernetes
        import urllib3

        try:
            yield
        except kubernetes.client.ApiException as error:
            said = _short(error)
            role = f"the account may not do that in namespace {self.namespace}: give it a role for jobs, pods, "
            meant = {
                401: "the cluster does not know who asks",
                403: f"{role}pods/log, events and services"
                if " cannot " in said
                else "the cluster's rules are against the job",
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


def _status(error: Exception) -> int | None:
    return getattr(error, "status", None)


def _short(error: Exception) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return json.loads(getattr(error, "body", ""))["message"]
    return str(getattr(error, "reason", None) or error)


def _namespace_of(kubeconfig: str | None, context: str | None) -> str:
    """The context's; in a pod, its own."""
    import kubernetes
    from dagster_k8s.utils import detect_current_namespace

    if context is None and (own := detect_current_namespace(kubeconfig)):
        return own
    with contextlib.suppress(kubernetes.config.ConfigException):  # in a pod there is none
        contexts, active = kubernetes.config.list_kube_config_contexts(kubeconfig)
        chosen: Any = next((one for one in contexts if dict(one)["name"] == context), active)
        return chosen["context"].get("namespace") or "default"
    return "default"


def _failure(why: str) -> dg.Failure:
    return dg.Failure(why, allow_retries=False)


def _step(context: dg.AssetExecutionContext) -> str:
    return context.op_execution_context.get_step_execution_context().step.key
