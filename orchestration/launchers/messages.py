"""What a stage's process says over Dagster Pipes, read from a file while it is written.

Belongs here: reading messages whole. Not here: what they mean (`outcome`).
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

from dagster import PipesFileMessageReader, PipesMessageReader
from dagster._core.pipes.context import PipesMessageHandler
from dagster._core.pipes.utils import tail_file
from dagster_pipes import PipesParams


class TemporaryFileReader(PipesMessageReader):
    """`PipesTempFileMessageReader` whose messages may be long."""

    @contextmanager
    def read_messages(self, handler: PipesMessageHandler) -> Iterator[PipesParams]:
        """See `PipesMessageReader`."""
        with (
            TemporaryDirectory() as folder,
            WholeLineReader(str(Path(folder) / "messages")).read_messages(handler) as params,
        ):
            yield params

    def no_messages_debug_text(self) -> str:
        """See `PipesMessageReader`."""
        return "Attempted to read messages from a local temporary file."


class WholeLineReader(PipesFileMessageReader):
    """`PipesFileMessageReader` that waits for a line's end.

    Dagster's takes what is there of a line for all of it. A message that holds a picture is long enough to be met half
    written, and then nothing that follows is heard.
    """

    def _reader_thread(self, handler: PipesMessageHandler, is_resource_complete: Event) -> None:
        line = ""
        try:
            for part in tail_file(self._path, is_resource_complete.is_set):
                line += part
                if line.endswith("\n"):
                    handler.handle_message(json.loads(line))
                    line = ""
        except Exception:
            handler.report_pipes_framework_exception(f"{type(self).__name__} reader thread", sys.exc_info())
