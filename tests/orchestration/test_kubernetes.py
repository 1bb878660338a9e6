"""Stages as Kubernetes Jobs: real processes, real Pipes over followed logs, on an API server of the tests."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false, reportCallIssue=false

import dataclasses
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

pytest.importorskip("kubernetes", reason="the kubernetes client is not installed: pip install 'm2m[kubernetes]'")
pytest.importorskip("dagster_k8s", reason="dagster-k8s is not installed: pip install 'm2m[kubernetes]'")
pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

from beside import beside
from kubernetes_cluster import IMAGE, NAMESPACE, Cluster, Refusal
from kubernetes_server import kubernetes
from test_outcome import checks, failure
from waiting import wait_for

from m2m.config import load_profile
from orchestration.definitions import build_defs
from orchestration.launchers import kubernetes as launching
from orchestration.launchers.kubernetes import KubernetesLauncher

pytestmark = pytest.mark.services  # of these packages, which make test-services installs
TOY = [sys.executable, str(Path(__file__).with_name("toy_stages.py"))]


@dataclasses.dataclass
class Place:
    cluster: Cluster
    settings: dict[str, Any]
    instance: dg.DagsterInstance

    def launcher(self, **more) -> KubernetesLauncher:
        return KubernetesLauncher(**{**self.settings, **more})

    def run(self, asset: str, act: str = "work", shards: tuple[str, str] | None = None, **more):
        launcher = self.launcher(**more)
        tags = dict(zip(["start", "end"], shards or (), strict=False))
        return (
            build_defs(resource_overrides={"launcher": launcher})
            .resolve_job_def("data_job")
            .execute_in_process(
                asset_selection=[dg.AssetKey(asset)],
                run_config={"ops": {asset: {"config": {"overrides": [f"act={act}"]}}}},
                tags={f"dagster/asset_partition_range_{end}": key for end, key in tags.items()},
                raise_on_error=False,
                instance=self.instance,
            )
        )


@pytest.fixture
def place(ground, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "PROFILE", load_profile(ground.environment["M2M_PROFILE"]))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with kubernetes(tmp_path, ground.environment) as (cluster, config), dg.instance_for_test() as instance:
        waits = {"poll_seconds": 0.3, "start_seconds": 1, "grace_seconds": 2}
        yield Place(cluster, {"image": IMAGE, "kubeconfig": str(config), "command": TOY, **waits}, instance)


def test_a_stage_is_a_job_and_what_it_says_is_heard(place):
    result = place.run("filtered_captions")
    assert result.success and checks(result) == {"counts_add_up": True, "captions_kept": True}
    (made,) = result.asset_materializations_for_node("filtered_captions")
    assert made.metadata["white"].value.startswith("![white](data:image/png;base64,")
    assert made.metadata["kubernetes_job"].value.startswith(f"{NAMESPACE}/m2m-toy-filter-captions-")
    (manifest,) = place.cluster.created
    assert manifest["spec"]["completions"] == 1


def test_a_range_of_shards_is_one_indexed_job(place, ground):
    assert place.run("filtered_captions").success
    result = place.run("mis_shards", shards=("00000", "00002"))
    assert result.success and all(checks(result).values())
    assert len(result.asset_materializations_for_node("mis_shards")) == 3
    assert place.cluster.created[-1]["spec"]["completions"] == 3
    assert (ground.outputs / "generate-sets" / "manifest.json").exists()


def test_a_failed_stage_says_why_in_one_line_and_is_not_tried_again(place):
    result = place.run("filtered_captions", "fail")
    step = failure(result)
    assert step.error.message.strip().endswith("filter-captions failed: in.tsv:3: no tab between URL and caption")
    assert len(place.cluster.kubelets) == 1


def test_a_stage_that_was_stopped_after_a_checkpoint_goes_on_in_another_pod(place):
    assert place.run("filtered_captions", "stop once").success
    assert len(place.cluster.kubelets) == 2 and len(place.cluster.created) == 1


def struck(place, ground, strike, act="sleep once", **settings):
    """A run whose first pod is struck while its stage works; what Dagster logged of it."""

    def strike_when_asleep():
        wait_for(lambda: (ground.outputs / "asleep").exists())
        strike(next(iter(place.cluster.kubelets)))

    with beside(strike_when_asleep):
        result = place.run("filtered_captions", act, **settings)
    return result, [entry.user_message for entry in place.instance.all_logs(result.run_id)]


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("EvictionByEvictionAPI", "Eviction API: evicting"),
        ("PreemptionByScheduler", "default-scheduler: preempting to accommodate a higher priority pod"),
        ("TerminationByKubelet", "The node was low on resource: memory"),
    ],
)
def test_a_pod_that_is_taken_away_is_started_again_and_the_log_says_why(place, ground, reason, message):
    result, log = struck(place, ground, lambda pod: place.cluster.evict(pod, reason, message))
    assert result.success and len(place.cluster.kubelets) == 2 and len(place.cluster.created) == 1
    assert any(f"was taken away: {reason}: {message}" in line for line in log)


def test_of_a_lost_node_the_log_says_what_the_cluster_waits_for(place, ground):
    """Kubernetes starts no other pod as long as it can't know that the lost one has ended."""

    def lose(pod):
        place.cluster.lose_node(pod)
        time.sleep(1)
        place.cluster.remove_node(pod)

    result, log = struck(place, ground, lose)
    assert result.success and len(place.cluster.kubelets) == 2
    assert any(
        "node node-7 does not end" in line and "once node node-7 is back, deleted, or tainted" in line for line in log
    )
    assert any("was taken away: DeletionByPodGC" in line for line in log)


def test_a_pod_that_ran_out_of_memory_says_what_to_raise_and_is_not_tried_again(place, ground):
    result, _ = struck(place, ground, place.cluster.kill_for_memory, "sleep")
    message = failure(result).error.message
    assert "ran out of memory (pod m2m-toy-filter-captions-" in message
    assert "it asked for 4 GB a node: raise filter-captions.resources.memory_gb" in message
    assert len(place.cluster.kubelets) == 1


def test_a_cluster_that_is_silent_for_a_while_is_waited_for(place, ground):
    def silence():
        wait_for(lambda: (ground.outputs / "asleep").exists())
        place.cluster.silent = True
        time.sleep(1.5)
        place.cluster.silent = False
        (ground.outputs / "wake").touch()

    with beside(silence):
        result = place.run("filtered_captions", "wait")
    assert result.success and len(place.cluster.kubelets) == 1


def die(monkeypatch) -> None:
    """Dagster's process goes, and can do nothing more about its job."""

    def follow(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launching._Cluster, "follow", follow)
    monkeypatch.setattr(launching._Cluster, "end", lambda *_: None)


def lost_run(place) -> str:
    """A run whose process died while its job goes on."""
    job_def = build_defs().resolve_job_def("data_job")
    run = place.instance.create_run_for_job(job_def, status=dg.DagsterRunStatus.STARTED)
    place.instance.report_run_failed(run)
    for found in place.cluster.jobs.values():
        found["metadata"]["labels"]["m2m/run"] = run.run_id
    return run.run_id


def leave_a_job(place, ground, monkeypatch, act: str) -> None:
    """A job whose run is lost, and which nobody follows."""
    with monkeypatch.context() as dying:
        die(dying)
        place.run("filtered_captions", act)
    wait_for(lambda: (ground.outputs / "asleep").exists())
    lost_run(place)


@pytest.mark.parametrize("taken_up", [False, True])
def test_a_cancelled_run_leaves_no_pod(place, ground, monkeypatch, taken_up):
    if taken_up:
        leave_a_job(place, ground, monkeypatch, "sleep")

    def interrupted(seconds):
        mine = threading.current_thread() is threading.main_thread()
        if mine and (ground.outputs / "asleep").exists() and not interrupted.done:
            interrupted.done = True
            raise dg.DagsterExecutionInterruptedError()
        sleep(seconds)

    interrupted.done, sleep = False, time.sleep
    monkeypatch.setattr(launching.time, "sleep", interrupted)
    started = time.monotonic()
    assert not place.run("filtered_captions", "sleep").success and interrupted.done
    assert not place.cluster.jobs and not place.cluster.pods
    assert all(kubelet.process.poll() is not None for kubelet in place.cluster.kubelets.values())
    assert time.monotonic() - started < 20


def test_a_job_that_a_lost_run_left_is_taken_up_and_not_launched_twice(place, ground, monkeypatch):
    leave_a_job(place, ground, monkeypatch, "wait")

    def wake_when_followed():
        going = lambda: [run for run in place.instance.get_runs() if not run.is_finished]  # noqa: E731
        wait_for(lambda: any(tag.startswith(launching.JOB_TAG) for run in going() for tag in run.tags))
        (ground.outputs / "wake").touch()

    with beside(wake_when_followed):
        assert place.run("filtered_captions", "wait").success
    assert len(place.cluster.created) == 1 and len(place.cluster.kubelets) == 1


def test_an_orphan_is_ended(place, ground, monkeypatch):
    with monkeypatch.context() as dying:
        die(dying)
        place.run("filtered_captions", "sleep")
    wait_for(lambda: (ground.outputs / "asleep").exists())
    assert place.launcher().end_orphans(place.instance) == []
    lost_run(place)
    assert len(place.launcher(orphan_seconds=-1.0).end_orphans(place.instance)) == 1
    wait_for(lambda: not place.cluster.pods)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"image": "registry.example.org/nothing:1"}, "ErrImagePull: registry.example.org/nothing:1: not found"),
        ({"secrets": ["hub-token"]}, 'CreateContainerConfigError: secret "hub-token" not found'),
        ({"command": ["/nowhere/python"]}, 'exec: "/nowhere/python": executable file not found in $PATH'),
        ({"namespace": "nowhere"}, "there is no namespace nowhere"),
        ({"kubeconfig": "/nowhere/config"}, "no Kubernetes cluster is known here"),
        ({"context": "other"}, "no Kubernetes cluster is known here"),
        ({"volumes": [{"nam": "data"}]}, "the cluster refuses the job: jobs is invalid"),
    ],
)
def test_what_is_set_wrongly_is_said_at_launch(place, setting, said):
    message = failure(place.run("filtered_captions", **setting)).error.message
    assert said in message and "Set the launcher's" in message
    assert not place.cluster.pods or not any(k.process.poll() is None for k in place.cluster.kubelets.values())


QUOTA = 'pods "m2m-0" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu={}, used: {}, limited: {}'
GPUS = "requests.nvidia.com/gpu={}".format


@pytest.mark.parametrize(
    ("why", "way_out"),
    [
        (QUOTA.format(8, GPUS(0), GPUS(4)), "Set filter-captions.resources, or have the namespace's quota raised"),
        ('pods "m2m-0" is forbidden: violates PodSecurity "restricted:latest"', "the launcher's service_account"),
        ('error looking up service account m2m/trainer: serviceaccount "trainer" not found', "service_account"),
        ("maximum memory usage per Container is 1Gi, but limit is 4Gi", "Set filter-captions.resources"),
    ],
)
def test_where_the_clusters_rules_allow_no_pod_they_are_said(place, why, way_out):
    place.cluster.no_pods = why
    message = failure(place.run("filtered_captions")).error.message
    assert f"the cluster makes no pod: Error creating: {why}" in message and way_out in message
    assert not place.cluster.jobs


def test_a_quota_that_others_use_up_is_waited_for(place):
    place.cluster.no_pods = QUOTA.format(2, GPUS(3), GPUS(4))

    def free():
        wait_for(lambda: place.cluster.events)
        time.sleep(1.5)  # longer than what is wrong may last
        place.cluster.no_pods = None

    with beside(free):
        result = place.run("filtered_captions")
    assert result.success
    log = [entry.user_message for entry in place.instance.all_logs(result.run_id)]
    assert any("no pods yet; the cluster makes no pod" in line and "exceeded quota" in line for line in log)


def test_where_no_node_takes_a_pod_the_log_says_what_to_set_and_patience_is_a_setting(place):
    place.cluster.unscheduled = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    result = place.run("filtered_captions", wait_seconds=1.0)
    message = failure(result).error.message
    assert "waits for a node: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu." in message
    assert "Set filter-captions.resources" in message.replace("set filter", "Set filter") and "gpu_types" in message
    assert not place.cluster.jobs


def test_a_claim_of_a_volume_that_is_not_there_is_said(place):
    place.cluster.unscheduled = 'persistentvolumeclaim "m2m" not found'
    message = failure(place.run("filtered_captions")).error.message
    assert 'persistentvolumeclaim "m2m" not found. Set the launcher\'s volumes' in message


def nodes(*gpus: int) -> list[dict[str, Any]]:
    labels = {"nvidia.com/gpu.product": "A100"}
    sizes = [{"cpu": "63770m", "memory": "528Gi", "nvidia.com/gpu": str(count)} for count in gpus]
    return [
        {"metadata": {"name": f"n{i}", "labels": labels}, "status": {"allocatable": s}} for i, s in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("resources", "settings", "said"),
    [
        ("{gpus: 16}", {}, "asks for nodes of 1 CPUs, 16 GPUs, 4 GB; the cluster has 2 x 63.77 CPUs, 8 GPUs, 528 GB"),
        (
            "{gpus: 1, gpu_type: h100}",
            {"gpu_types": {"h100": {"nvidia.com/gpu.product": "H100"}}},
            "has none with nvid",
        ),
        ("{gpus: 1, gpu_type: h100}", {"gpu_types": {"a100": {}}}, "gpu_type h100; the launcher's gpu_types have a100"),
    ],
)
def test_more_than_any_node_has_is_said_at_launch(place, ground, monkeypatch, resources, settings, said):
    place.cluster.nodes = nodes(8, 8)
    (ground.folder / "configs" / "toy.yaml").write_text(f"filter-captions: {{resources: {resources}}}\n")
    monkeypatch.setattr(launching, "PROFILE", load_profile(ground.environment["M2M_PROFILE"]))
    assert said in failure(place.run("filtered_captions", **settings)).error.message
    assert not place.cluster.created


def test_nodes_that_are_still_to_come_are_waited_for_where_the_launcher_says_so(place):
    place.cluster.nodes = []
    assert not place.run("filtered_captions").success
    assert place.run("filtered_captions", autoscaling=True).success


def test_a_refusal_says_whether_a_role_is_missing(place, monkeypatch):
    monkeypatch.setattr(place.cluster, "create", lambda kind, manifest: refuse(kind))

    def refuse(kind):
        raise Refusal(403, f'{kind} is forbidden: User "dagster" cannot create resource "{kind}" in API group "batch"')

    message = failure(place.run("filtered_captions")).error.message
    assert 'User "dagster" cannot create resource "jobs"' in message and "give it a role for jobs" in message


def test_the_namespace_is_that_of_the_context(place):
    """Of the one that is asked for, which need not be the current one."""
    path = Path(place.settings["kubeconfig"])
    config = json.loads(path.read_text())
    other = {"name": "other", "context": {"cluster": "test", "user": "test", "namespace": "elsewhere"}}
    path.write_text(json.dumps(config | {"contexts": [*config["contexts"], other]}))
    assert place.run("filtered_captions").success
    message = failure(place.run("filtered_captions", context="other")).error.message
    assert "there is no namespace elsewhere" in message


def test_a_cluster_that_does_not_answer_is_said(place, tmp_path):
    config = Path(place.settings["kubeconfig"]).read_text().replace(place.cluster.url, "http://127.0.0.1:9")
    (tmp_path / "away").write_text(config)
    message = failure(place.run("filtered_captions", kubeconfig=str(tmp_path / "away"))).error.message
    assert "Kubernetes does not answer at http://127.0.0.1:9" in message


def test_a_launch_of_all_of_the_papers_shards_stays_within_what_a_cluster_takes():
    launcher = KubernetesLauncher(image=IMAGE)
    parts = launcher._parts([f"{shard:05d}" for shard in range(12_238)])
    assert len(parts) <= 1000 and sum(len(part or ()) for part in parts) == 12_238
