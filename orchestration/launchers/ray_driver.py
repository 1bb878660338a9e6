"""What a Ray job runs: `python -m orchestration.launchers.ray_driver LAUNCH.json`.

Belongs here: asking Ray for what a stage needs and starting its commands there. Not here: submitting the job (`ray`),
what its end means (`ray_outcome`), imports that take long: nothing of a stage begins before them.
A part of a range of shards is a task, which Ray starts again on another node when its own is lost. A training on
several nodes has a task on each, started together. A process ends with the task that started it, however that ends.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2m.die_with_parent import tied
from m2m.training.stopping import STOPPED

STARTED = "the nodes' environment is there"
"""A line of the job's log: what comes before it is said by a shell that could not start this."""

_RESTARTS = 20
_PEERS = 60.0  # seconds: what one node of a training is told at once by its lost peers, Ray notices later
_LINES = 40
_STOP = "stop"
"""A file in the launch's folder that asks its commands to end: Ray's own word takes seconds on a busy machine."""


def main() -> int:
    told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(STARTED, flush=True)
    try:
        import ray

        ray.init(log_to_driver=False)
    except Exception as error:  # no ray in this environment, another version of it than the cluster's
        return _failed(f"{type(error).__name__}: {' '.join(str(error).split())}")
    if not told["autoscaling"] and (lacking := _lacking(ray.nodes(), told)):
        return _failed(lacking)
    running = _together(ray, told) if told["shared"] else _one_by_one(ray, told)
    leave = max(told["grace_seconds"] - 0.5, 0.5)  # Ray's SIGKILL comes at the end of it
    stop = Path(told["folder"]) / _STOP

    def end(*_: object) -> None:
        _cancel(ray, running, leave, stop)
        os._exit(STOPPED)

    signal.signal(signal.SIGTERM, end)
    waiting, codes = list(running), []
    while waiting and (told["shared"] or all(code in (0, STOPPED) for code in codes)):
        done, waiting = ray.wait(waiting, timeout=_PEERS if told["shared"] and any(codes) else None)
        if not done:
            break
        codes.append(_code(ray, done[0], Path(told["folder"]), running.index(done[0]), told["stage"]))
    _cancel(ray, waiting, leave, stop)
    if told["shared"] and STOPPED in codes:  # of the others' errors it is the cause
        return STOPPED
    return next((code for code in codes if code not in (0, STOPPED)), max(codes))


def work(command: list[str], environment: dict[str, str], checkout: str, out: str, err: str) -> int:
    """One command on the node where the task is; its exit code. Asked to end once, it may take its time."""
    stop, asked = Path(out).with_name(_STOP), False
    with open(out, "ab") as stdout, open(err, "ab") as stderr:
        process = subprocess.Popen(
            tied(command), env=os.environ | environment, cwd=checkout, stdout=stdout, stderr=stderr
        )
        while True:
            try:
                while process.poll() is None:
                    if not asked and stop.exists():
                        raise KeyboardInterrupt
                    time.sleep(0.1)  # Ray's cancel interrupts Python between two steps, and no wait() of the system's
                return process.returncode
            except KeyboardInterrupt:
                if not asked:
                    asked = True
                    process.terminate()


def _code(ray: Any, task: Any, folder: Path, index: int, stage: str) -> int:
    """How a task ended, as an exit code; an error and the last lines of a command that failed go to the job's log."""
    try:
        code = ray.get(task)
    except ray.exceptions.OutOfMemoryError as error:
        node = _short(error).partition(" was running")[0]
        return _failed(f"a node ran out of memory and Ray ended the task ({node}): raise {stage}.resources.memory_gb")
    except (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError) as error:
        return _failed(_short(error))
    except ray.exceptions.RayError as error:  # its node is lost, more often than Ray starts it again
        print(f"{type(error).__name__}: {_short(error)}", file=sys.stderr)
        return STOPPED
    err = folder / f"{index}.err"
    if code not in (0, STOPPED) and err.exists():
        print("\n".join(err.read_text(errors="replace").splitlines()[-_LINES:]), file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code  # as a shell tells of a signal


def _cancel(ray: Any, tasks: Sequence[Any], seconds: float, stop: Path) -> None:
    """End tasks, and with them their commands, which have some time to save what they have."""
    if tasks:
        stop.touch()
    for task in tasks:
        ray.cancel(task)  # as Ctrl-C in the task
    if tasks:
        ray.wait(list(tasks), num_returns=len(tasks), timeout=seconds)


def _one_by_one(ray: Any, told: dict[str, Any]) -> list[Any]:
    task = ray.remote(work).options(max_retries=_RESTARTS, **told["needs"])
    return [task.remote(command, *_where(told, index, index)) for index, command in enumerate(told["commands"])]


def _together(ray: Any, told: dict[str, Any]) -> list[Any]:
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    needs = told["needs"]
    bundle = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"], "memory": needs["memory"], **needs["resources"]}
    bundle = {name: amount for name, amount in bundle.items() if amount}
    group = placement_group([bundle] * told["nodes"], strategy="STRICT_SPREAD" if told["nodes"] > 1 else "PACK")
    ray.get(group.ready())
    places = [PlacementGroupSchedulingStrategy(group, index) for index in range(told["nodes"])]
    leader = ray.get(ray.remote(_address).options(num_cpus=0, scheduling_strategy=places[0]).remote())
    (command,) = told["commands"]
    ranks = [sys.executable, "-m", "m2m.ranks", "--nodes", str(told["nodes"]), "--leader", leader]
    return [
        ray.remote(work)
        .options(max_retries=0, scheduling_strategy=place, **needs)
        .remote(
            [*ranks, "--processes", str(told["processes"]), "--node", str(node), "--", *command],
            *_where(told, 0, node),
        )
        for node, place in enumerate(places)
    ]


def _where(told: dict[str, Any], command: int, task: int) -> tuple[dict[str, str], str, str, str]:
    """What a task's command is told, the folder where it starts, and the files that it prints into."""
    printed = Path(told["folder"]) / str(task)
    return told["heard"][command], os.getcwd(), f"{printed}.out", f"{printed}.err"


def _address() -> str:
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


def _lacking(nodes: list[dict[str, Any]], told: dict[str, Any]) -> str | None:
    """Why no nodes of this cluster will ever do."""
    needs = told["needs"]
    wanted = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"], "memory": needs["memory"], **needs["resources"]}
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    fit = [node for node in alive if all(node.get(name, 0) >= amount for name, amount in wanted.items())]
    if len(fit) >= told["nodes"]:
        return None
    there = [_shown(node, needs["resources"]) for node in alive]
    return (
        f"the stage asks for {told['nodes']} node(s) of {_shown(wanted, needs['resources'])}; the Ray cluster has "
        f"{'; '.join(there)}. Set {told['stage']}.resources in the profile, the launcher's gpu_types, or its "
        "autoscaling where nodes are still to come"
    )


def _shown(node: dict[str, float], more: dict[str, float]) -> str:
    size = f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs, {node.get('memory', 0) / 2**30:.0f} GB"
    return ", ".join([size, *(f"{node.get(name, 0):g} {name}" for name in more)])


def _failed(why: str) -> int:
    print(f"error: {why}", file=sys.stderr, flush=True)
    return 1


def _short(error: Exception) -> str:
    """The last line: before it stand the frames of the cluster's processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
