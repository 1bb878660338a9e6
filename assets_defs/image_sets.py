"""MIS, the paper's dataset of image sets (section 4), one partition a shard.

Belongs here: the asset. Not here: generating (`m2m.generation.image_sets`), shards on disk (`m2m.data.shards`).
"""

from dagster import AssetExecutionContext, BackfillPolicy, ResourceParam, asset

from assets_defs.launching import Launch, Launcher, Results, declared
from assets_defs.partitions import shards
from m2m.stages import STAGES


@asset(
    **declared("generate-sets"),
    partitions_def=shards,
    backfill_policy=BackfillPolicy.single_run(),
    pool="gpu",
    owners=["team:data"],
)
def mis_shards(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """All shards of a run in one launch: the models are loaded once."""
    yield from launcher.materialize(context, STAGES["generate-sets"], config, shards=context.partition_keys)
