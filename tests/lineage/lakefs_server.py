"""As much of a lakeFS server as the resource asks for, from lakeFS' published OpenAPI description.

Branches, staged, linked and committed objects, commits with metadata, three-way merges, conflicts, tags, paging.
"""

import base64
import hashlib
import json
import threading
import urllib.parse
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEYS = ("AKIAOFATEST", "secret")


class Linked(bytes):
    """The physical address of an object whose bytes are not the server's own."""

    @property
    def content(self) -> bytes:
        return Path(urllib.parse.urlsplit(self.decode()).path).read_bytes()


@dataclass
class Commit:
    id: str
    tree: dict[str, bytes]
    parents: list[str]
    message: str
    metadata: dict[str, str]


@dataclass
class Repository:
    """Branches point at commits; beside each lies what is staged on it."""

    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    staged: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    uploads: int = 0

    def __post_init__(self) -> None:
        self.add("main", {}, [], "Repository created", {})

    def add(self, branch: str, tree: dict[str, bytes], parents: list[str], message: str, metadata: dict) -> Commit:
        name = hashlib.sha256(json.dumps([message, parents, len(self.commits)]).encode()).hexdigest()
        self.commits[name] = Commit(name, tree, parents, message, metadata)
        self.branches[branch] = name
        self.staged[branch] = dict(tree)
        return self.commits[name]

    def tree(self, ref: str) -> dict[str, bytes] | None:
        if ref in self.staged:
            return self.staged[ref]
        commit = self.commits.get(self.tags.get(ref, ref))
        return commit.tree if commit else None

    def head(self, ref: str) -> str | None:
        return self.branches.get(ref) or self.tags.get(ref) or (ref if ref in self.commits else None)

    def base(self, one: str, two: str) -> dict[str, bytes]:
        """The tree of the nearest commit that both come from."""
        seen, waiting = set(), [one]
        while waiting:
            seen.add(name := waiting.pop())
            waiting += self.commits[name].parents
        waiting = [two]
        while (name := waiting.pop(0)) not in seen:
            waiting += self.commits[name].parents
        return self.commits[name].tree


class Handler(BaseHTTPRequestHandler):
    """`/api/v1/repositories/{repository}/...`"""

    repositories: dict[str, Repository]
    page: int

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def do_DELETE(self) -> None:
        self._route("DELETE")

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _route(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        asked = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
        expected = "Basic " + base64.b64encode(":".join(KEYS).encode()).decode()
        if self.headers.get("Authorization") != expected:
            return self._fail(401, "error authenticating request")
        parts = [urllib.parse.unquote(part) for part in url.path.removeprefix("/api/v1/repositories/").split("/")]
        repository = self.repositories.get(parts[0])
        if repository is None:
            return self._fail(404, "repository not found")
        match method, parts[1:]:
            case "POST", ["branches"]:
                return self._create_branch(repository, **json.loads(body))
            case "POST", ["branches", branch, "objects"] if branch in repository.branches:
                repository.uploads += 1
                repository.staged[branch][asked["path"]] = self._content(body)
                return self._answer(self._stats(asked["path"], repository.staged[branch][asked["path"]]), 201)
            case "PUT", ["branches", branch, "objects"] if branch in repository.branches:
                repository.staged[branch][asked["path"]] = Linked(json.loads(body)["physical_address"].encode())
                return self._answer(self._stats(asked["path"], repository.staged[branch][asked["path"]]), 201)
            case "DELETE", ["branches", branch, "objects"] if branch in repository.branches:
                repository.staged[branch].pop(asked["path"], None)
                return self._answer(None, 204)
            case "POST", ["branches", branch, "commits"] if branch in repository.branches:
                return self._commit(repository, branch, json.loads(body))
            case "GET", ["refs", ref, "objects"]:
                return self._get(repository, ref, asked["path"])
            case "GET", ["refs", ref, "objects", "ls"]:
                return self._list(repository, ref, asked)
            case "POST", ["refs", source, "merge", target] if target in repository.branches:
                return self._merge(repository, source, target, json.loads(body or b"{}"))
            case "POST", ["tags"]:
                return self._tag(repository, **json.loads(body))
        return self._fail(404, "not found")

    def _create_branch(self, repository: Repository, name: str, source: str, **_: Any) -> None:
        head = repository.head(source)
        if head is None:
            return self._fail(404, "branch not found")
        if name in repository.branches:
            return self._fail(409, "branch already exists")
        repository.branches[name] = head
        repository.staged[name] = dict(repository.commits[head].tree)
        return self._send(head.encode(), 201, "text/html")

    def _commit(self, repository: Repository, branch: str, asked: dict) -> None:
        head = repository.branches[branch]
        if repository.staged[branch] == repository.commits[head].tree:
            return self._fail(400, "commit: no changes")
        tree = dict(repository.staged[branch])
        made = repository.add(branch, tree, [head], asked["message"], asked.get("metadata", {}))
        said = {"id": made.id, "parents": made.parents, "committer": "tester", "message": made.message}
        return self._answer({**said, "creation_date": 1, "meta_range_id": "", "metadata": made.metadata}, 201)

    def _get(self, repository: Repository, ref: str, path: str) -> None:
        tree = repository.tree(ref)
        if tree is None or path not in tree:
            return self._fail(404, "object not found" if tree is not None else "ref not found")
        found = tree[path]
        content = found.content if isinstance(found, Linked) else found
        return self._send(content, 200, "application/octet-stream")

    def _list(self, repository: Repository, ref: str, asked: dict[str, str]) -> None:
        tree = repository.tree(ref)
        if tree is None:
            return self._fail(404, "ref not found")
        prefix, after = asked.get("prefix", ""), asked.get("after", "")
        names = sorted(name for name in tree if name.startswith(prefix) and name > after)
        page = names[: min(self.page, int(asked.get("amount", 100)))]
        told = {
            "has_more": len(page) < len(names),
            "next_offset": page[-1] if page else "",
            "results": len(page),
            "max_per_page": self.page,
        }
        return self._answer({"pagination": told, "results": [self._stats(name, tree[name]) for name in page]})

    def _merge(self, repository: Repository, source: str, target: str, asked: dict) -> None:
        ours, theirs = repository.branches[target], repository.head(source)
        if theirs is None:
            return self._fail(404, "ref not found")
        base, mine, other = (
            repository.base(ours, theirs),
            repository.commits[ours].tree,
            repository.commits[theirs].tree,
        )
        changed = {name for name in {*base, *other} if base.get(name) != other.get(name)}
        if not changed:
            return self._fail(400, "merge: no changes")
        if any(base.get(name) != mine.get(name) != other.get(name) for name in changed):
            return self._answer({"reference": "", "message": "conflict found"}, 409)
        tree = {**mine, **{name: other[name] for name in changed if name in other}}
        tree = {name: content for name, content in tree.items() if name not in changed or name in other}
        made = repository.add(target, tree, [ours, theirs], asked.get("message", "Merge"), asked.get("metadata", {}))
        return self._answer({"reference": made.id})

    def _tag(self, repository: Repository, id: str, ref: str, **_: Any) -> None:
        head = repository.head(ref)
        if head is None:
            return self._fail(404, "ref not found")
        if id in repository.tags:
            return self._fail(409, "tag already exists")
        repository.tags[id] = head
        return self._answer({"id": id, "commit_id": head}, 201)

    def _content(self, body: bytes) -> bytes:
        """The one file of a multipart form."""
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        form: Any = BytesParser(policy=HTTP).parsebytes(head + body)
        (part,) = form.iter_parts()
        return part.get_payload(decode=True)

    def _stats(self, path: str, content: bytes) -> dict[str, Any]:
        told = {"path": path, "path_type": "object", "physical_address": f"mem://{path}", "mtime": 1}
        return {**told, "checksum": hashlib.md5(content).hexdigest(), "size_bytes": len(content)}

    def _fail(self, status: int, message: str) -> None:
        self._answer({"message": message}, status)

    def _answer(self, content: Any, status: int = 200) -> None:
        self._send(b"" if content is None else json.dumps(content).encode(), status, "application/json")

    def _send(self, content: bytes, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def serve(page: int = 2) -> tuple[ThreadingHTTPServer, dict[str, Repository]]:
    """A server on loopback with one empty repository, `m2m`; lists come in pages of `page`."""
    repositories = {"m2m": Repository()}
    kind = type("OneServer", (Handler,), {"repositories": repositories, "page": page})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, repositories
