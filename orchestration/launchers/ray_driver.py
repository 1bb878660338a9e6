"""What a Ray job runs: `python -m orchestration.launchers.ray_driver LAUNCH.json`.

Belongs here: asking Ray for what a stage needs and starting its commands there. Not here: submitting the job (`ray`).
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
from pathlib import Path
from typing import Any

from dagster_pipes import DAGSTER_PIPES_MESSAGES_ENV_VAR, encode_param

from m2m.arguments import EXIT_CALL_AGAIN
from orchestration.launchers import die_with_parent
from orchestration.launchers.messages import message_parameters

_RESTARTS = 20
_LEAVE = 2.5  # seconds of the three between Ray's SIGTERM and its SIGKILL


def main() -> int:
    told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import ray

    ray.init(log_to_driver=False)
    if not told["autoscaling"] and (lacking := _lacking(ray.nodes(), told)):
        print(f"error: {lacking}", file=sys.stderr)
        return 1
    running = _together(ray, told) if told["shared"] else _one_by_one(ray, told)

    def end(*_: object) -> None:
        for task in running:
            ray.cancel(task)  # as Ctrl-C in the task, which ends its process
        ray.wait(running, num_returns=len(running), timeout=_LEAVE)
        os._exit(EXIT_CALL_AGAIN)

    signal.signal(signal.SIGTERM, end)
    waiting, code = list(running), 0
    while waiting and code in (0, EXIT_CALL_AGAIN):
        done, waiting = ray.wait(waiting)
        try:
            ended = ray.get(done[0])
        except ray.exceptions.RayError as error:  # its node is lost, more often than Ray starts it again
            print(f"error: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            ended = EXIT_CALL_AGAIN
        code = ended or code
    for task in waiting:
        ray.cancel(task)
    if waiting:
        ray.wait(waiting, num_returns=len(waiting), timeout=_LEAVE)
    return code


def work(command: list[str], environment: dict[str, str], out: str, err: str) -> int:
    """One command on the node where the task is; its exit code."""
    tied = [sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid()), *command]
    with open(out, "ab") as stdout, open(err, "ab") as stderr:
        process = subprocess.Popen(tied, env=os.environ | environment, stdout=stdout, stderr=stderr)
        try:
            return process.wait()
        except KeyboardInterrupt:  # cancelled
            process.terminate()
            return process.wait()


def _one_by_one(ray: Any, told: dict[str, Any]) -> list[Any]:
    task = ray.remote(work).options(max_retries=_RESTARTS, **told["needs"])
    folder = Path(told["folder"])
    return [
        task.remote(command, _heard_in(folder, index), str(folder / f"{index}.out"), str(folder / f"{index}.err"))
        for index, command in enumerate(told["commands"])
    ]


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
    folder, (command,) = Path(told["folder"]), told["commands"]
    ranks = [sys.executable, "-m", "m2m.ranks", "--nodes", str(told["nodes"]), "--leader", leader]
    return [
        ray.remote(work)
        .options(max_retries=0, scheduling_strategy=place, **needs)
        .remote(
            [*ranks, "--processes", str(told["processes"]), "--node", str(node), "--", *command],
            _heard_in(folder, 0),
            str(folder / f"{node}.out"),
            str(folder / f"{node}.err"),
        )
        for node, place in enumerate(places)
    ]


def _address() -> str:
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


def _heard_in(folder: Path, index: int) -> dict[str, str]:
    return {DAGSTER_PIPES_MESSAGES_ENV_VAR: encode_param(message_parameters(folder / f"{index}.messages"))}


def _lacking(nodes: list[dict[str, Any]], told: dict[str, Any]) -> str | None:
    """Why no nodes of this cluster will ever do."""
    needs = told["needs"]
    wanted = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"], "memory": needs["memory"], **needs["resources"]}
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    fit = [node for node in alive if all(node.get(name, 0) >= amount for name, amount in wanted.items())]
    if len(fit) >= told["nodes"]:
        return None
    there = [f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs, {n.get('memory', 0) / 2**30:.0f} GB" for n in alive]
    asked = (
        f"{told['nodes']} node(s) of {wanted['CPU']:g} CPUs, {wanted['GPU']:g} GPUs, {wanted['memory'] / 2**30:.0f} GB"
    )
    return (
        f"the stage asks for {asked}; the Ray cluster has {'; '.join(there)}. Set the stage's resources in the "
        "profile, or the launcher's autoscaling where nodes are still to come"
    )


if __name__ == "__main__":
    sys.exit(main())
