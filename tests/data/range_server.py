"""Stores on loopback that stumble as often as they are told: a folder by range requests, and a door before another one.

Belongs here: the servers. Not here: what is asked of them.
"""

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class RangeServer:
    """Where it is, what it was asked for (method, path, range), and which requests it fails, by their number."""

    folder: Path
    url: str = ""
    fails: Callable[[int], bool] = lambda number: False
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    def bytes_of(self, ending: str) -> int:
        """Bytes that were asked for of files with this ending."""
        spans = [
            span.removeprefix("bytes=").split("-") for _, path, span in self.asked if path.endswith(ending) and span
        ]
        return sum(int(last) - int(first) + 1 for first, last in spans)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[RangeServer]:
    """A server of the folder's files, gone when the block is left."""

    def answer(path: str, span: str, handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        file = folder / path.lstrip("/")
        if not file.is_file():
            return 404, {}, b""
        content = file.read_bytes()
        if not span:
            return 200, {"Accept-Ranges": "bytes"}, content
        first, _, last = span.removeprefix("bytes=").partition("-")
        return 206, {"Accept-Ranges": "bytes"}, content[int(first) : int(last) + 1]

    with _running(RangeServer(folder), answer) as state:
        yield state


@contextlib.contextmanager
def forwarding(endpoint: str, fails: Callable[[int], bool]) -> Iterator[RangeServer]:
    """A door before a store at `endpoint`: requests that do not fail go through as they are."""

    def answer(path: str, span: str, handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=30)
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        connection.request(handler.command, path, body, dict(handler.headers))
        found = connection.getresponse()
        content = found.read()
        headers = {k: v for k, v in found.getheaders() if k.lower() not in ("content-length", "transfer-encoding")}
        if handler.command == "HEAD":
            headers["Content-Length"] = found.getheader("Content-Length") or "0"
        connection.close()
        return found.status, headers, content

    with _running(RangeServer(Path(), fails=fails), answer) as state:
        yield state


Answer = Callable[[str, str, BaseHTTPRequestHandler], tuple[int, dict[str, str], bytes]]


@contextlib.contextmanager
def _running(state: RangeServer, answer: Answer) -> Iterator[RangeServer]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            span = self.headers.get("Range", "")
            with lock:
                state.asked.append((self.command, self.path, span))
                failing = state.fails(len(state.asked))
            if failing:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, headers, content = 503, {}, b"come back later"
            else:
                status, headers, content = answer(self.path, span, self)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
