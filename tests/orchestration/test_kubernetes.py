"""Stages as Kubernetes Jobs: real processes, real Pipes over followed logs, on an API server of the tests."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false, reportCallIssue=false

import dataclasses
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

import kubernetes_validate
from kubernetes_server import IMAGE, NAMESPACE, SCHEMAS, Cluster, kubernetes
from test_jobs_end_to_end import wait_for
from test_outcome import checks, failure

from m2m.config import Resources, load_profile
from orchestration.definitions import build_defs
from orchestration.launchers import kubernetes as launching
from orchestration.launchers.kubernetes import KubernetesLauncher
from orchestration.launchers.kubernetes_manifests import PodSettings, job, service

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
        waits = {"poll_seconds": 0.3, "pull_seconds": 1, "grace_seconds": 2}
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


def test_a_pod_that_is_evicted_is_started_again(place, ground):
    def evict():
        wait_for(lambda: (ground.outputs / "asleep").exists())
        place.cluster.evict(next(iter(place.cluster.kubelets)))

    evicting = threading.Thread(target=evict)
    evicting.start()
    result = place.run("filtered_captions", "sleep once")
    evicting.join()
    assert result.success and len(place.cluster.kubelets) == 2


def test_a_cluster_that_is_silent_for_a_while_is_waited_for(place, ground):
    def silence():
        wait_for(lambda: (ground.outputs / "asleep").exists())
        place.cluster.silent = True
        time.sleep(1.5)
        place.cluster.silent = False
        (ground.outputs / "wake").touch()

    silencing = threading.Thread(target=silence)
    silencing.start()
    result = place.run("filtered_captions", "wait")
    silencing.join()
    assert result.success and len(place.cluster.kubelets) == 1


def test_a_cancelled_run_leaves_no_pod(place, ground, monkeypatch):
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


def test_a_job_that_a_lost_run_left_is_taken_up_and_not_launched_twice(place, ground, monkeypatch):
    with monkeypatch.context() as dying:
        die(dying)
        place.run("filtered_captions", "wait")
    wait_for(lambda: (ground.outputs / "asleep").exists())
    lost_run(place)

    def wake_when_followed():
        going = lambda: [run for run in place.instance.get_runs() if not run.is_finished]  # noqa: E731
        wait_for(lambda: any(tag.startswith(launching.JOB_TAG) for run in going() for tag in run.tags))
        (ground.outputs / "wake").touch()

    waking = threading.Thread(target=wake_when_followed)
    waking.start()
    assert place.run("filtered_captions", "wait").success
    waking.join()
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


def test_a_cluster_that_does_not_answer_is_said(place, tmp_path):
    config = Path(place.settings["kubeconfig"]).read_text().replace(place.cluster.url, "http://127.0.0.1:9")
    (tmp_path / "away").write_text(config)
    message = failure(place.run("filtered_captions", kubeconfig=str(tmp_path / "away"))).error.message
    assert "Kubernetes does not answer at http://127.0.0.1:9" in message


SETTINGS = PodSettings(
    image=IMAGE,
    namespace=NAMESPACE,
    gpu_types={"a100-80gb": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}},
    node_selector={"pool": "gpu"},
    tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    volumes=[{"name": "data", "persistentVolumeClaim": {"claimName": "m2m"}}],
    volume_mounts=[{"name": "data", "mountPath": "/data"}],
    secrets=["hub-token"],
    image_pull_secrets=["registry"],
    service_account="m2m",
    priority_class="training",
    working_dir="/data/m2m",
)
EIGHT = Resources(nodes=2, gpus=8, gpu_type="a100-80gb", cpus=64, memory_gb=512, hours=168)


def made(asked=EIGHT, commands=(("python", "-m", "m2m", "pretrain"),), **more):
    return job("train-1", {"m2m/run": "r"}, commands, {"A": "b"}, asked, SETTINGS, **{"partitioned": False, **more})


@pytest.mark.parametrize("version", ["1.30", SCHEMAS, kubernetes_validate.latest_version()])
def test_manifests_hold_against_the_official_schemas(version):
    kubernetes_validate.validate(made(), version, strict=True)
    kubernetes_validate.validate(service("train-1", {}, SETTINGS, "uid"), version, strict=True)
    kubernetes_validate.validate(made(Resources(gpus=1), [["a"], ["b"]], partitioned=True), version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError, match="completionz"):  # which would not pass what is wrong
        wrong = made()
        kubernetes_validate.validate({**wrong, "spec": {**wrong["spec"], "completionz": 2}}, version, strict=True)


def test_a_request_becomes_gpus_nodes_volumes_and_secrets():
    spec = made()["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["resources"]["limits"] == {"memory": "524288Mi", "nvidia.com/gpu": "8"}
    assert container["resources"]["requests"]["cpu"] == "64"
    assert spec["nodeSelector"] == {"pool": "gpu", "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    assert container["envFrom"] == [{"secretRef": {"name": "hub-token"}}]
    assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]
    assert spec["activeDeadlineSeconds"] == 168 * 3600


def test_a_training_across_nodes_has_a_pod_a_node_that_find_the_first():
    manifest = made()
    assert (manifest["spec"]["completions"], manifest["spec"]["parallelism"]) == (2, 2)
    assert manifest["spec"]["backoffLimit"] == 0 and "podFailurePolicy" not in manifest["spec"]
    found = service("train-1", {}, SETTINGS, "uid")
    assert found["spec"]["clusterIP"] == "None" and found["spec"]["selector"] == {"job-name": "train-1"}
    assert manifest["spec"]["template"]["spec"]["subdomain"] == found["metadata"]["name"]
    assert "--leader train-1-0.train-1:29500" in manifest["spec"]["template"]["spec"]["containers"][0]["command"][-1]


def test_a_launch_of_all_of_the_papers_shards_stays_within_what_a_cluster_takes():
    launcher = KubernetesLauncher(image=IMAGE)
    parts = launcher._parts([f"{shard:05d}" for shard in range(12_238)])
    assert len(parts) <= 1000 and sum(len(part or ()) for part in parts) == 12_238
