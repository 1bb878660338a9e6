"""How a job of this project is told from others, by what Slurm itself keeps of it.

Belongs here: what a job's comment says. Not here: Slurm's commands (`slurm_jobs`), whether a run still follows the job
(`following`), what is done about a job (`slurm`).
"""

from dataclasses import dataclass

JOB_TAG = "m2m/slurm_job"
"""Of a run; `JOB_TAG/STEP` holds the job's id."""


@dataclass(frozen=True)
class Mark:
    """What a job's comment says: who launched it, what it does, where its files lie."""

    run: str
    commands: str
    folder: str

    def written(self) -> str:
        return f"m2m:{self.run}:{self.commands}:{self.folder}"

    @classmethod
    def read(cls, comment: str) -> "Mark | None":
        first, *rest = comment.split(":")
        return cls(*rest) if first == "m2m" and len(rest) == 3 else None
