"""What a launch is to Kubernetes, held against the official schemas."""
# pyright: reportMissingImports=false, reportCallIssue=false

import dataclasses

import pytest

pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

import kubernetes_validate
from kubernetes_cluster import IMAGE, NAMESPACE, SCHEMAS

from m2m.config import Resources
from orchestration.launchers.kubernetes_manifests import PodSettings, job, service

pytestmark = pytest.mark.services  # of this package, which make test-services installs
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


def test_what_a_cluster_wants_more_is_joined_with_what_the_launcher_sets():
    more = {"securityContext": {"runAsNonRoot": True}, "tolerations": [{"key": "spot", "operator": "Exists"}]}
    own = {"env": [{"name": "NCCL_DEBUG", "value": "INFO"}], "resources": {"limits": {"rdma/ib": "1"}}}
    settings = dataclasses.replace(SETTINGS, pod=more, container=own)
    manifest = job("train-1", {"m2m/run": "r"}, [["a"]], {"A": "b"}, EIGHT, settings, partitioned=False)
    kubernetes_validate.validate(manifest, SCHEMAS, strict=True)
    spec = manifest["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"] == {"runAsNonRoot": True} and len(spec["tolerations"]) == 2
    assert container["env"] == [{"name": "A", "value": "b"}, *own["env"]]
    assert container["resources"]["limits"] == {"memory": "524288Mi", "nvidia.com/gpu": "8", "rdma/ib": "1"}


def test_a_training_across_nodes_has_a_pod_a_node_that_find_the_first():
    manifest = made()
    assert (manifest["spec"]["completions"], manifest["spec"]["parallelism"]) == (2, 2)
    assert manifest["spec"]["backoffLimit"] == 0 and "podFailurePolicy" not in manifest["spec"]
    found = service("train-1", {}, SETTINGS, "uid")
    assert found["spec"]["clusterIP"] == "None" and found["spec"]["selector"] == {"job-name": "train-1"}
    assert manifest["spec"]["template"]["spec"]["subdomain"] == found["metadata"]["name"]
    assert "--leader train-1-0.train-1:29500" in manifest["spec"]["template"]["spec"]["containers"][0]["command"][-1]
