"""What the pods of a Job say: Pipes messages among the lines of their logs.

Belongs here: following several pods as one speaker. Not here: what the messages mean (`outcome`).
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
from dagster._core.pipes.context import PipesMessageHandler
from dagster_k8s.pipes import PipesK8sPodLogsMessageReader
from dagster_pipes import PipesParams

_AT_ONCE = 32  # pods followed at one time; the logs of others wait, also of those that have ended


class JobLogs(PipesK8sPodLogsMessageReader):
    """dagster-k8s' reader of one pod's log, for as many pods as there are.

    Its `closed` is heard once, when each pod that was followed has closed: after it nothing would be listened to.
    """

    @contextmanager
    def read_messages(self, handler: PipesMessageHandler) -> Iterator[PipesParams]:
        """See `PipesMessageReader`."""
        together = _Together(handler)
        with super().read_messages(together) as parameters:  # type: ignore[arg-type]
            yield parameters
        together.close()

    @contextmanager
    def following(self, context: dg.AssetExecutionContext, core_api: Any, namespace: str) -> Iterator["Followed"]:
        """Logs of pods as they start; all that they have said is heard when the block is left, unless by an error."""
        followed = Followed(lambda pod: self._follow(context, core_api, pod, namespace))
        yield followed
        followed.wait()

    def _follow(self, context: dg.AssetExecutionContext, core_api: Any, pod: str, namespace: str) -> None:
        try:
            self.consume_pod_logs(context, core_api, pod, namespace)
        except Exception as error:  # a pod that is gone with its node: its output tells what is whole
            context.log.warning(f"the log of pod {pod} could not be read to its end: {error}")


class Followed:
    """Pods whose logs are read, each once and each by a thread of its own."""

    def __init__(self, follow: Callable[[str], None]) -> None:
        self._follow = follow
        self._threads: dict[str, threading.Thread] = {}
        self._room = threading.Semaphore(_AT_ONCE)

    def begin(self, pod: str) -> None:
        if pod not in self._threads:
            # a daemon: the log of a job that could not be ended must not hold Dagster's process up
            self._threads[pod] = threading.Thread(target=self._read, args=(pod,), daemon=True)
            self._threads[pod].start()

    def wait(self) -> None:
        for thread in self._threads.values():
            thread.join()

    def _read(self, pod: str) -> None:
        with self._room:
            self._follow(pod)


class _Together:
    """Stands for Dagster's handler before the readers of several logs."""

    def __init__(self, handler: PipesMessageHandler) -> None:
        self._handler = handler
        self._lock = threading.Lock()
        self._closed: Any = None

    def handle_message(self, message: Any) -> None:
        with self._lock:
            if message["method"] == "closed":
                self._closed = message
            else:
                self._handler.handle_message(message)

    def close(self) -> None:
        if self._closed:
            self._handler.handle_message(self._closed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)
