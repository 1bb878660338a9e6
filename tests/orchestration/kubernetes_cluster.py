"""A small Kubernetes for tests: its Job controller, its scheduler's answers, a kubelet that starts local processes.

Written from the published behaviour, as far as this project uses it: indexed Jobs with a pod failure policy, pods with
their phases, conditions and events, logs, deletion with a grace period; nodes and pods can be struck. Not here: the API
over HTTP (`kubernetes_server`). No real cluster stands behind it.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

import contextlib
import datetime
import os
import signal
import subprocess
import threading
import time
import uuid
from typing import Any

import kubernetes_validate

NAMESPACE, IMAGE = "m2m", "registry.example.org/m2m:1"
SCHEMAS = "1.31"
CONTAINER = "stage"


class Refusal(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Kubelet:
    """One pod's process and what it printed."""

    def __init__(self, pod: dict[str, Any], index: int, environment: dict[str, str]) -> None:
        self.pod, self.lines = pod, []
        container = pod["spec"]["containers"][0]
        given = {entry["name"]: entry["value"] for entry in container.get("env", [])}
        self.process = subprocess.Popen(
            container["command"],
            env=environment | given | {"JOB_COMPLETION_INDEX": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append((now(), line.rstrip("\n")))

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Cluster:
    """What is in the namespace, and the controllers that work on it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.services: dict[str, dict[str, Any]] = {}
        self.kubelets: dict[str, Kubelet] = {}
        self.created: list[dict[str, Any]] = []
        self.lock = threading.RLock()
        self.nodes: list[dict[str, Any]] | None = None  # what an account of one namespace may not look at
        self.secrets: set[str] = set()
        self.events: list[dict[str, Any]] = []
        self.no_pods: str | None = None  # why a quota or a rule lets none be made
        self.unscheduled: str | None = None  # why no node takes one
        self.silent = False
        self.url = ""
        self.lost: set[str] = set()
        self._environment = environment
        self._done: dict[str, set[int]] = {}
        self._failures: dict[str, int] = {}

    def create(self, kind: str, manifest: dict[str, Any]) -> dict[str, Any]:
        try:
            kubernetes_validate.validate(manifest, SCHEMAS, strict=True)
        except kubernetes_validate.ValidationError as error:
            raise Refusal(422, f"{kind} is invalid: {error.message}") from None
        name = manifest["metadata"]["name"]
        kept = {"jobs": self.jobs, "services": self.services}[kind]
        with self.lock:
            if name in kept:
                raise Refusal(409, f"{kind} {name} already exists")
            manifest["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
            manifest["status"] = {}
            kept[name] = manifest
            self.created.append(manifest)
        return manifest

    def delete_job(self, name: str) -> None:
        with self.lock:
            if self.jobs.pop(name, None) is None:
                raise Refusal(404, f"jobs {name} not found")
            mine = [pod for pod in self.pods.values() if pod["metadata"]["labels"]["job-name"] == name]
        for pod in mine:
            threading.Thread(target=self._end_pod, args=(pod,), daemon=True).start()

    def evict(self, pod: str, reason: str = "EvictionByEvictionAPI", message: str = "") -> None:
        """As a node that is drained, or a pod that goes first: it gets DisruptionTarget, and its process is gone."""
        with self.lock:
            condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}
            self.pods[pod]["status"]["conditions"].append(condition)
        self.kubelets[pod].signal(signal.SIGKILL)

    def kill_for_memory(self, pod: str) -> None:
        with self.lock:
            self.pods[pod]["metadata"]["annotations"]["reason"] = "OOMKilled"
        self.kubelets[pod].signal(signal.SIGKILL)

    def lose_node(self, pod: str) -> None:
        """Its pod is to be deleted, but nobody is there to say that it is gone; its process is gone."""
        with self.lock:
            self.pods[pod]["metadata"]["deletionTimestamp"] = "2020-01-01T00:00:00Z"
            self.lost.add(pod)
        self.kubelets[pod].signal(signal.SIGKILL)

    def remove_node(self, pod: str) -> None:
        """Whoever runs the cluster deletes the lost node: the pod garbage collector says that its pod has failed."""
        with self.lock:
            self.lost.discard(pod)
            self.evict(pod, "DeletionByPodGC", "PodGC: node no longer exists")

    def warn(self, name: str, reason: str, message: str) -> None:
        about = {"name": name, "namespace": NAMESPACE}
        told = {"type": "Warning", "reason": reason, "message": message, "lastTimestamp": now()}
        self.events.append({"metadata": {"name": uuid.uuid4().hex}, "involvedObject": about, **told})

    def work(self) -> None:
        """One round of the controllers."""
        with self.lock:
            for pod in list(self.pods.values()):
                self._look_at(pod)
            for job in list(self.jobs.values()):
                if not job["status"].get("conditions"):
                    self._reconcile(job)

    def _reconcile(self, job: dict[str, Any]) -> None:
        name, spec = job["metadata"]["name"], job["spec"]
        done = self._done.setdefault(name, set())
        active: set[int] = set()
        for pod in [p for p in self.pods.values() if p["metadata"]["labels"]["job-name"] == name]:
            index, phase = int(pod["metadata"]["annotations"]["index"]), pod["status"]["phase"]
            if phase == "Succeeded":
                done.add(index)
            elif phase in ("Pending", "Running"):
                active.add(index)
            elif not pod["metadata"]["annotations"].get("seen"):
                pod["metadata"]["annotations"]["seen"] = "yes"
                match self._policy(spec, pod):
                    case "FailJob":
                        self._fail(job, "PodFailurePolicy")
                        return
                    case "Count":
                        self._failures[name] = self._failures.get(name, 0) + 1
        if self._failures.get(name, 0) > spec["backoffLimit"]:
            self._fail(job, "BackoffLimitExceeded")
            return
        if len(done) == spec["completions"]:
            job["status"]["conditions"] = [{"type": "Complete", "status": "True"}]
            return
        for index in range(spec["completions"]):
            if index not in done | active and len(active) < spec["parallelism"]:
                self._start_pod(job, index)
                active.add(index)

    def _policy(self, spec: dict[str, Any], pod: dict[str, Any]) -> str:
        codes = [s["state"]["terminated"]["exitCode"] for s in pod["status"]["containerStatuses"]]
        disrupted = any(c["type"] == "DisruptionTarget" for c in pod["status"]["conditions"])
        for rule in spec.get("podFailurePolicy", {}).get("rules", []):
            if "onPodConditions" in rule and disrupted:
                return rule["action"]
            if "onExitCodes" in rule and not any(code in rule["onExitCodes"]["values"] for code in codes):
                return rule["action"]
        return "Count"

    def _fail(self, job: dict[str, Any], reason: str) -> None:
        job["status"]["conditions"] = [{"type": "Failed", "status": "True", "reason": reason}]
        for pod in self.pods.values():
            if pod["metadata"]["labels"]["job-name"] == job["metadata"]["name"] and pod["status"]["phase"] == "Running":
                self.kubelets[pod["metadata"]["name"]].signal(signal.SIGTERM)

    def _start_pod(self, job: dict[str, Any], index: int) -> None:
        if self.no_pods:
            if not any(event["involvedObject"]["name"] == job["metadata"]["name"] for event in self.events):
                self.warn(job["metadata"]["name"], "FailedCreate", f"Error creating: {self.no_pods}")
            return
        name = f"{job['metadata']['name']}-{index}-{uuid.uuid4().hex[:5]}"
        template = job["spec"]["template"]
        labels = {**template["metadata"]["labels"], "job-name": job["metadata"]["name"]}
        annotations = {"index": str(index)}
        pod: dict[str, Any] = {
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels, "annotations": annotations},
            "spec": {**template["spec"], "nodeName": "node-7"},
            "status": {"phase": "Pending", "conditions": [], "containerStatuses": []},
        }
        self.pods[name] = pod
        container = template["spec"]["containers"][0]
        status = {"name": CONTAINER, "image": container["image"], "imageID": "", "ready": False, "restartCount": 0}
        wanted = [source["secretRef"]["name"] for source in container.get("envFrom", [])]
        if self.unscheduled:
            waits = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": self.unscheduled}
            pod["status"]["conditions"].append(waits)
        elif container["image"] != IMAGE:
            waits = {"reason": "ErrImagePull", "message": f"{container['image']}: not found"}
            pod["status"]["containerStatuses"] = [{**status, "state": {"waiting": waits}}]
        elif missing := [secret for secret in wanted if secret not in self.secrets]:
            waits = {"reason": "CreateContainerConfigError", "message": f'secret "{missing[0]}" not found'}
            pod["status"]["containerStatuses"] = [{**status, "state": {"waiting": waits}}]
        else:
            try:
                self.kubelets[name] = Kubelet(pod, index, self._environment)
            except FileNotFoundError:
                said = f'exec: "{container["command"][0]}": executable file not found in $PATH'
                ended = {"exitCode": 128, "reason": "StartError", "message": said, "finishedAt": now()}
                pod["status"]["phase"] = "Failed"
                pod["status"]["containerStatuses"] = [{**status, "state": {"terminated": ended}}]
                return
            pod["status"]["phase"], pod["started"] = "Running", time.monotonic()
            pod["status"]["containerStatuses"] = [{**status, "state": {"running": {"startedAt": now()}}}]

    def _look_at(self, pod: dict[str, Any]) -> None:
        kubelet = self.kubelets.get(pod["metadata"]["name"])
        if pod["status"]["phase"] != "Running" or kubelet is None or pod["metadata"]["name"] in self.lost:
            return
        code = kubelet.process.poll()
        if code is None:
            if time.monotonic() - pod["started"] > pod["spec"]["activeDeadlineSeconds"]:
                pod["status"]["reason"] = "DeadlineExceeded"
                kubelet.signal(signal.SIGTERM)
            return
        kubelet.reader.join()
        code = code if code >= 0 else 128 - code
        pod["status"]["phase"] = "Failed" if code else "Succeeded"
        reason = pod["metadata"]["annotations"].get("reason") or ("Error" if code else "Completed")
        ended = {"exitCode": code, "reason": reason, "finishedAt": now()}
        pod["status"]["containerStatuses"][0]["state"] = {"terminated": ended}

    def _end_pod(self, pod: dict[str, Any]) -> None:
        name = pod["metadata"]["name"]
        if kubelet := self.kubelets.get(name):
            kubelet.signal(signal.SIGTERM)
            try:
                kubelet.process.wait(pod["spec"]["terminationGracePeriodSeconds"])
            except subprocess.TimeoutExpired:
                kubelet.signal(signal.SIGKILL)
                kubelet.process.wait()
        with self.lock:
            self.pods.pop(name, None)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
