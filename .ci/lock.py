"""Resolve pyproject.toml's ranges from scratch and write the lock files: `python .ci/lock.py` (make lock).

Belongs here: pip's resolver asked once for everything, its answer split into what runs, what only
developers need, and what only tests of services need.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

# without a build named, pip takes the newest, with several GB for GPUs that a laptop does not have
TORCH = "torch==2.13.0"
HEAD = "# Made by `make lock` from pyproject.toml's ranges. Any build of torch 2.13.0 will do, CPU or CUDA.\n"


def resolve(*wanted: str) -> set[str]:
    """What pip would install for these requirements into an empty environment, as `name==version` lines."""
    argv = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", TORCH, *wanted]
    done = subprocess.run([sys.executable, "-m", "pip", *argv], stdout=subprocess.PIPE, text=True, check=True)
    found = (package["metadata"] for package in json.loads(done.stdout)["install"])
    return {
        f"{re.sub(r'[-_.]+', '-', package['name']).lower()}=={package['version'].partition('+')[0]}"
        for package in found
        if package["name"] != "m2m"
    }


def main() -> None:
    everything, needed = resolve(".[dev]"), resolve(".")
    needed &= everything  # one version of each, also where developers' tools narrow it
    Path("requirements.lock").write_text(HEAD + "".join(f"{line}\n" for line in sorted(needed)))
    Path("requirements-dev.lock").write_text(HEAD + "".join(f"{line}\n" for line in sorted(everything - needed)))
    pinned = [argument for name in ("requirements.lock", "requirements-dev.lock") for argument in ("-c", name)]
    more = resolve(".[dev,services]", *pinned) - everything
    Path("requirements-services.lock").write_text(HEAD + "".join(f"{line}\n" for line in sorted(more)))


if __name__ == "__main__":
    main()
