"""What of Dagster's surroundings a stage needs where a cluster does not pass them on by itself.

Belongs here: which variables. Not here: secrets, which the cluster has its own means for.
"""

import os

_NEEDED = ("M2M_OUTPUTS",)


def passed_on() -> dict[str, str]:
    """Variables that say where a stage's files lie."""
    return {"PYTHONUNBUFFERED": "1", **{name: os.environ[name] for name in _NEEDED if name in os.environ}}
