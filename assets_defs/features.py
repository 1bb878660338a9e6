"""DINOv2 features of the image sets, what M2M-DINO reads instead of latents (paper, section 5.2).

Belongs here: the asset. Not here: encoding (`m2m.generation.features`).
"""

from dagster import AssetExecutionContext, BackfillPolicy, ResourceParam, asset

from assets_defs.launching import Launch, Launcher, Results, declared
from assets_defs.partitions import shards
from m2m.stages import STAGES


@asset(
    **declared("cache-features"),
    partitions_def=shards,
    backfill_policy=BackfillPolicy.single_run(),
    pool="gpu",
    owners=["team:data"],
)
def dino_features(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """The same partitions as the image sets: a shard of features beside each shard of sets."""
    yield from launcher.materialize(context, STAGES["cache-features"], config, shards=context.partition_keys)
