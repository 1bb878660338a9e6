"""Starting the processes that make one output together, so that the exit code says how they ended.

    python -m m2m.ranks --nodes 2 --node 0 --processes 8 --leader HOST:PORT -- python -m m2m pretrain ...

Belongs here: starting those of one machine, passing signals on, one exit code for all. Not here: what they say to each
other (`m2m.processes`), starting this on each of several machines (the launchers).

torchrun starts them as well, but ends with 1 where they asked to be called again, sends no SIGUSR1 on, and kills them
30 seconds after a SIGTERM, which may be too soon for a checkpoint.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from m2m.die_with_parent import tied
from m2m.training.stopping import SIGNALS, STOPPED

_LOOK = 0.1  # seconds between looks at the processes


@dataclass(frozen=True)
class Node:
    """One machine among those that make an output together.

    Attributes:
        number: of this one, from 0.
        count: how many there are.
        leader: HOST:PORT that all can reach of the first; None for a free port of this machine.
    """

    number: int = 0
    count: int = 1
    leader: str | None = None


def run_together(command: Sequence[str], count: int, grace: float = 60.0, node: Node = Node()) -> int:
    """A command run by `count` processes a machine that find each other as torchrun's do; this machine's exit code.

    That is the code of the first that failed; 75 where a signal asked all to stop. SIGTERM and SIGUSR1 go on to all.

    Args:
        grace: seconds that the others have when one has failed: what they wait for may never come.
        node: which machine this is.
    """
    host, _, port = (node.leader or f"127.0.0.1:{_free_port()}").rpartition(":")
    shared = {
        "WORLD_SIZE": str(count * node.count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    ranks: list[subprocess.Popen] = []
    with _passed_on(ranks) as asked:
        for local in range(count):
            own = {"RANK": str(node.number * count + local), "LOCAL_RANK": str(local)}
            ranks.append(subprocess.Popen(tied(command), env=os.environ | shared | own))
        for number in asked:  # who was started while it came
            for process in ranks:
                process.send_signal(number)
        codes = _ends(ranks, grace)
    failed = [code for code in codes if code]
    if not failed:
        return 0
    # of several that are asked, one may not listen yet, or break off while it waits for another that is gone
    if asked and (STOPPED in failed or -failed[0] in SIGNALS):
        return STOPPED
    return failed[0] if failed[0] > 0 else 128 - failed[0]  # a shell's way to tell of a signal


def _ends(ranks: Sequence[subprocess.Popen], grace: float) -> list[int]:
    """Exit codes in the order in which the processes ended; some time after a failure the others are killed."""
    codes: list[int] = []
    running, patience = list(ranks), float("inf")
    try:
        while running:
            for process in [one for one in running if one.poll() is not None]:
                running.remove(process)
                codes.append(process.returncode)
                if process.returncode:
                    patience = min(patience, time.monotonic() + grace)
            if time.monotonic() > patience:
                break
            time.sleep(_LOOK)
    finally:  # also where this process is interrupted
        for process in running:
            process.kill()
        codes += [process.wait() for process in running]
    return codes


@contextlib.contextmanager
def _passed_on(ranks: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """While it is open, signals go on to the processes; the list tells which came."""
    came: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        came.append(number)
        for process in ranks:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m m2m.ranks", description="start one process a GPU of this machine")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node", type=int, default=0)
    parser.add_argument("--processes", type=int, required=True, help="on this machine")
    parser.add_argument("--leader", help="HOST:PORT of the first node; needed where there are several")
    parser.add_argument("command", nargs="+")
    told = parser.parse_args()
    if told.nodes > 1 and not told.leader:
        parser.error("--nodes needs --leader HOST:PORT, for the nodes to find each other")
    return run_together(told.command, told.processes, node=Node(told.node, told.nodes, told.leader))


if __name__ == "__main__":
    sys.exit(main())
