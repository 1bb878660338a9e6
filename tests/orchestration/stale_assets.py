"""What Dagster shows as stale, for the profile and the instance of the surroundings: `python stale_assets.py`.

Belongs here: asking, as the web server does. Not here: what ought to be stale.
"""

import dagster as dg
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from orchestration.definitions import defs


def main() -> None:
    with dg.DagsterInstance.get() as instance:
        graph = defs.resolve_asset_graph()
        resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
        for key in graph.materializable_asset_keys:
            partitions = graph.get(key).partitions_def
            each = [None] if partitions is None else partitions.get_partition_keys()
            if any(resolver.get_status(key, one) == StaleStatus.STALE for one in each):
                print(key.to_user_string())


if __name__ == "__main__":
    main()
