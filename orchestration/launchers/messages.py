"""What a stage's processes say over Dagster Pipes, read from files while they are written.

Belongs here: reading messages whole. Not here: what they mean (`outcome`).
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from dagster import PipesMessageReader
from dagster._core.pipes.context import PipesMessageHandler
from dagster_pipes import PipesDefaultMessageWriter, PipesParams

from orchestration.launchers.tail import Tail

_START = '{"__dagster_pipes_version"'


class MessageFiles(PipesMessageReader):
    """Messages of one process or of several, a file each.

    Dagster's own reader takes what is there of a line for all of it. A message that holds a picture is long enough to
    be met half written, and then nothing that follows is heard.

    A job that its cluster starts again goes on in the same file: it opens twice, and what it said of its first end
    is not the end.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._tails = [Tail(path) for path in paths]
        self._closed: dict[Path, Any] = {}
        self._every = 0.02 + 0.005 * len(paths)  # seconds between looks: many files are asked less often

    @property
    def all_closed(self) -> bool:
        """Whether each of the processes has said that it is done."""
        return len(self._closed) == len(self._tails)

    @contextmanager
    def read_messages(self, handler: PipesMessageHandler) -> Iterator[PipesParams]:
        """See `PipesMessageReader`. The parameters are those of the first file."""
        over = Event()
        thread = Thread(target=self._read_until, args=(over, handler), daemon=True)
        thread.start()
        try:
            yield message_parameters(self._tails[0].path)
        finally:
            over.set()
            thread.join()

    def no_messages_debug_text(self) -> str:
        """See `PipesMessageReader`."""
        return f"Attempted to read messages from {self._tails[0].path}."

    def _read_until(self, over: Event, handler: PipesMessageHandler) -> None:
        try:
            last = False
            while not last:
                last = over.wait(self._every)
                for tail in self._tails:
                    for line in tail.lines():
                        self._handle(handler, tail.path, _parsed(line))
            if self.all_closed:
                handler.handle_message(self._closed[self._tails[-1].path])
        except Exception:
            handler.report_pipes_framework_exception(f"{type(self).__name__} reader thread", sys.exc_info())

    def _handle(self, handler: PipesMessageHandler, path: Path, message: Any) -> None:
        if message["method"] == "closed":
            self._closed[path] = message
            return
        if message["method"] == "opened":
            self._closed.pop(path, None)
        handler.handle_message(message)


def message_parameters(path: Path) -> PipesParams:
    """What tells a process to write its messages into this file."""
    return {
        PipesDefaultMessageWriter.FILE_PATH_KEY: str(path),
        PipesDefaultMessageWriter.INCLUDE_STDIO_IN_MESSAGES_KEY: False,
    }


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        started_again = line.rfind(_START)  # a killed process left half a line, and the next one wrote on behind it
        if started_again <= 0:
            raise
        return json.loads(line[started_again:])
