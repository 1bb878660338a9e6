"""Whether the nodes of a Kubernetes cluster will ever do for what a stage asks for.

Belongs here: reading nodes' sizes. Not here: asking the cluster for them (`kubernetes`), pods (`kubernetes_pods`).
"""
# pyright: reportMissingImports=false

from collections.abc import Sequence
from typing import Any

from m2m.config import Resources
from m2m.stages import Stage


def lacking(stage: Stage, asked: Resources, nodes: Sequence[Any], chosen: str, gpu_resource: str) -> str | None:
    """Why none of these nodes is large enough, and what to set; None where one is.

    Args:
        nodes: all that have the labels `chosen`.
        gpu_resource: the cluster's name of GPUs, for example nvidia.com/gpu.
    """
    from kubernetes.utils import parse_quantity

    wanted = {"cpu": asked.cpus, "memory": asked.memory_gb * 2**30, gpu_resource: asked.gpus}
    there = [{what: float(parse_quantity(n.status.allocatable.get(what, 0))) for what in wanted} for n in nodes]
    if any(all(node[what] >= amount for what, amount in wanted.items()) for node in there):
        return None
    shown = [_size(*node.values()) for node in there]
    has = ", ".join(f"{shown.count(size)} x {size}" for size in dict.fromkeys(shown)) or "none"
    return (
        f"{stage.key} asks for nodes of {_size(*wanted.values())}; the cluster has {has}"
        f"{f' with {chosen}' if chosen else ''}. Set {stage.command}.resources in the profile, or the launcher's "
        "gpu_types, gpu_resource, node_selector, or its autoscaling where nodes are still to come (M2M_LAUNCHER)"
    )


def _size(cpus: float, memory: float, gpus: float) -> str:
    return f"{cpus:g} CPUs, {gpus:g} GPUs, {memory / 2**30:.0f} GB"
