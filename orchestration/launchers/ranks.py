"""One process a GPU of this machine, for a training that several share: `python -m orchestration.launchers.ranks`.

    ranks.py --nodes 2 --node 0 --processes 8 --leader HOST:PORT -- python -m m2m pretrain ...

Belongs here: RANK, WORLD_SIZE and what else torch wants to know, passing signals on, one exit code. Not here: starting
it on each node (the launchers). It ends with the first process that fails and takes the others with it. torchrun would
do all of it but tell the command's own exit code, which says whether it goes on when it is called again.
"""

import argparse
import os
import signal
import subprocess
import sys
import time

_GRACE = 20.0  # seconds between asking the others to end and killing them
_EVERY = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description="start one process a GPU of this node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node", type=int, default=0)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--leader", default="127.0.0.1:29500", help="HOST:PORT of the first node")
    parser.add_argument("command", nargs="+")
    told = parser.parse_args()
    host, _, port = told.leader.rpartition(":")
    processes = []
    for local in range(told.processes):
        rank = told.node * told.processes + local
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(told.nodes * told.processes),
            "LOCAL_WORLD_SIZE": str(told.processes),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }
        if rank:  # the first speaks for all
            for name in ("DAGSTER_PIPES_CONTEXT", "DAGSTER_PIPES_MESSAGES"):
                environment.pop(name, None)
        processes.append(subprocess.Popen(told.command, env=environment))

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    failed = _first_failure(processes)
    pass_on(signal.SIGTERM, None)
    deadline = time.monotonic() + _GRACE
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(_EVERY)
    for process in processes:
        process.kill()
        process.wait()
    return failed if failed >= 0 else 128 - failed


def _first_failure(processes: list["subprocess.Popen[bytes]"]) -> int:
    """The exit code of the first process that fails; 0 when all have ended well."""
    while True:
        codes = [process.poll() for process in processes]
        if failed := [code for code in codes if code]:
            return failed[0]
        if None not in codes:
            return 0
        time.sleep(_EVERY)


if __name__ == "__main__":
    sys.exit(main())
