"""Where a toy pipeline runs.

Belongs here: its folders, its surroundings. Not here: what runs there.
"""

import dataclasses
import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Ground:
    """A place where the toy pipeline runs: its profile, its outputs and its Dagster instance."""

    folder: Path

    @classmethod
    def laid(cls, folder: Path) -> "Ground":
        """Three shards, and Dagster as `make` sets it up."""
        (folder / "configs").mkdir()
        (folder / "configs" / "toy.yaml").write_text("generate-sets: {shards: 3}\ncache-features: {shards: 3}\n")
        (folder / "dagster").mkdir()
        (folder / "dagster" / "dagster.yaml").write_text((ROOT / "orchestration" / "dagster.yaml").read_text())
        return cls(folder)

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs" / "toy"

    @property
    def environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if name == "M2M_SERVICES" or name[:4] != "M2M_"},
            "M2M_PROFILE": str(self.folder / "configs" / "toy.yaml"),
            "DAGSTER_HOME": str(self.folder / "dagster"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        }
