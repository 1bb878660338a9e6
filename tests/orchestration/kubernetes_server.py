"""The API of a small Kubernetes over HTTP, for tests: what the official client asks of a real one.

Belongs here: paths, labels that are asked for, refusals, logs that are followed. Not here: what happens in the cluster
(`kubernetes_cluster`). Manifests that come in are held against the official schemas there.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

import contextlib
import http.server
import json
import re
import signal
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kubernetes_cluster import CONTAINER, NAMESPACE, Cluster, Refusal


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
            if url.path == "/api/v1/nodes":
                self._send(200, json.dumps({"items": self._nodes(query)}).encode())
                return
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

    def _nodes(self, query: dict[str, str]) -> list[dict[str, Any]]:
        if self.cluster.nodes is None:
            raise Refusal(403, 'nodes is forbidden: User "dagster" cannot list resource "nodes" in API group ""')
        return _chosen({node["metadata"]["name"]: node for node in self.cluster.nodes}, query)

    def _resource(self, method: str, kind: str, name: str | None, query: dict[str, str], body: Any) -> Any:
        cluster = self.cluster
        if kind == "events":
            wanted = dict(pair.split("=") for pair in query.get("fieldSelector", "").split(","))
            return {
                "items": [e for e in cluster.events if e["involvedObject"]["name"] == wanted["involvedObject.name"]]
            }
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
            raise Refusal(400, f"container {CONTAINER} in pod {name} is waiting to start")
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
