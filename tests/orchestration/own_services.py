"""Where the services that `services/*/up.sh` started answer: the project's own, never a user's."""

import os
from pathlib import Path

from toy_ground import ROOT

SERVICES = Path(os.environ.get("M2M_SERVICES") or ROOT / ".services")


def where(service: str, what: str = "url") -> str:
    """What `up.sh` wrote down; an address where nobody answers if it did not."""
    written = SERVICES / service / what
    return written.read_text().strip() if written.exists() else "http://127.0.0.1:9"
