"""What was made, sent to an object store by itself: reports for people to read, shards for machines to train from.

Belongs here: which stages' outputs are sent. Not here: sending (`m2m.stores`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from m2m.errors import M2MError
from m2m.stores import send
from orchestration.lineage.recording import Recording, RecordingError


@dataclass(frozen=True)
class StoreRecorder:
    """Sends the outputs of some stages; leaves others alone.

    Attributes:
        url: for example s3://bucket/path.
        commands: of the stages, for example `report`, `generate-sets`.
    """

    url: str
    commands: Sequence[str] = ("report",)
    name: str = "store"

    def record(self, made: Recording) -> str | None:
        """Send an output; returns its address. See `Recorder`."""
        if made.stage.command not in self.commands:
            return None
        try:
            return send(made.stage.folder(made.profile), made.manifest, self.url, made.profile.name)
        except (M2MError, OSError) as error:
            raise RecordingError(" ".join(str(error).split())) from error
