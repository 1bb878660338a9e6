"""A small Kubernetes for tests: its API over HTTP, its Job controller, and a kubelet that starts local processes.

Written from the API's published behaviour, as far as this project uses it: indexed Jobs with a pod failure policy, pods
with their phases and conditions, logs that are followed, headless Services, labels, deletion with a grace period.
Manifests that come in are held against the official schemas. No real cluster stands behind it.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

import contextlib
import datetime
import http.server
import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate

NAMESPACE, IMAGE = "m2m", "registry.example.org/m2m:1"
SCHEMAS = "1.31"
_CONTAINER = "stage"


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
        self.full = False
        self.silent = False
        self.url = ""
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

    def evict(self, pod: str) -> None:
        """As a node that is drained or lost: the pod gets DisruptionTarget, and its process is gone."""
        with self.lock:
            condition = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
            self.pods[pod]["status"]["conditions"].append(condition)
        self.kubelets[pod].signal(signal.SIGKILL)

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
        name = f"{job['metadata']['name']}-{index}-{uuid.uuid4().hex[:5]}"
        template = job["spec"]["template"]
        labels = {**template["metadata"]["labels"], "job-name": job["metadata"]["name"]}
        annotations = {"index": str(index)}
        pod: dict[str, Any] = {
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels, "annotations": annotations},
            "spec": template["spec"],
            "status": {"phase": "Pending", "conditions": [], "containerStatuses": []},
        }
        self.pods[name] = pod
        container = template["spec"]["containers"][0]
        status = {"name": _CONTAINER, "image": container["image"], "imageID": "", "ready": False, "restartCount": 0}
        if self.full:
            message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
            waits = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            pod["status"]["conditions"].append(waits)
        elif container["image"] != IMAGE:
            waits = {"reason": "ErrImagePull", "message": f"{container['image']}: not found"}
            pod["status"]["containerStatuses"] = [{**status, "state": {"waiting": waits}}]
        else:
            self.kubelets[name] = Kubelet(pod, index, self._environment)
            pod["status"]["phase"], pod["started"] = "Running", time.monotonic()
            pod["status"]["containerStatuses"] = [{**status, "state": {"running": {"startedAt": now()}}}]

    def _look_at(self, pod: dict[str, Any]) -> None:
        kubelet = self.kubelets.get(pod["metadata"]["name"])
        if pod["status"]["phase"] != "Running" or kubelet is None:
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
        reason = "Error" if code else "Completed"
        if any("hog" in line for _, line in kubelet.lines) and code == 137:
            reason = "OOMKilled"
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


def _chosen(items: dict[str, dict[str, Any]], query: dict[str, str]) -> list[dict[str, Any]]:
    found = list(items.values())
    for wanted in query.get("labelSelector", "").split(","):
        key, _, value = wanted.partition("=")
        if key:
            found = [
                item
                for item in found
                if key in item["metadata"]["labels"] and (not value or item["metadata"]["labels"][key] == value)
            ]
    return found


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def log_message(self, *said: object) -> None:
        pass

    def _answer(self, method: str) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        try:
            if self.cluster.silent:
                raise Refusal(503, "the server is currently unable to handle the request")
            found = re.fullmatch(r"/(api/v1|apis/batch/v1)/namespaces/([^/]+)/(\w+)(?:/([^/]+))?(/log)?", url.path)
            if not found:
                raise Refusal(404, "the server could not find the requested resource")
            _, namespace, kind, name, log = found.groups()
            if namespace != NAMESPACE:
                raise Refusal(404, f'namespaces "{namespace}" not found')
            if log:
                self._log(name, query)
                return
            self._send(200, json.dumps(self._resource(method, kind, name, query, body)).encode())
        except Refusal as refusal:
            status = {"kind": "Status", "status": "Failure", "message": str(refusal), "code": refusal.code}
            self._send(refusal.code, json.dumps(status).encode())

    def _resource(self, method: str, kind: str, name: str | None, query: dict[str, str], body: Any) -> Any:
        cluster = self.cluster
        items = {"jobs": cluster.jobs, "pods": cluster.pods, "services": cluster.services}[kind]
        if method == "POST":
            return cluster.create(kind, body)
        if method == "DELETE":
            cluster.delete_job(str(name))
            return {"kind": "Status", "status": "Success"}
        with cluster.lock:
            if name is None:
                return json.loads(json.dumps({"items": _chosen(items, query)}))
            if name not in items:
                raise Refusal(404, f'{kind} "{name}" not found')
            return json.loads(json.dumps(items[name]))

    def _log(self, name: str, query: dict[str, str]) -> None:
        kubelet = self.cluster.kubelets.get(name)
        if kubelet is None:
            raise Refusal(400, f"container {_CONTAINER} in pod {name} is waiting to start")
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        sent = max(len(kubelet.lines) - int(query["tailLines"]), 0) if "tailLines" in query else 0
        while True:
            alive = kubelet.reader.is_alive()
            for at, line in kubelet.lines[sent:]:
                said = f"{at} {line}\n" if query.get("timestamps") == "True" else f"{line}\n"
                self.wfile.write(said.encode())
                sent += 1
            if not alive or query.get("follow") != "True":
                return
            time.sleep(0.05)

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def kubernetes(folder: Path, environment: dict[str, str]) -> Iterator[tuple[Cluster, Path]]:
    """A cluster that answers, and the kubeconfig that leads to it; its processes are gone when the block is left."""
    cluster = Cluster(environment)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"cluster": cluster}))
    server.daemon_threads = True
    cluster.url = f"http://127.0.0.1:{server.server_address[1]}"
    over = threading.Event()

    def controllers() -> None:
        while not over.wait(0.05):
            cluster.work()

    threads = [threading.Thread(target=f, daemon=True) for f in (server.serve_forever, controllers)]
    for thread in threads:
        thread.start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": cluster.url}}],
        "users": [{"name": "test", "user": {}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}],
        "current-context": "test",
    }
    path = folder / "kubeconfig"
    path.write_text(json.dumps(config))
    try:
        yield cluster, path
    finally:
        over.set()
        threads[1].join()
        server.shutdown()
        server.server_close()
        for kubelet in cluster.kubelets.values():
            kubelet.signal(signal.SIGKILL)
