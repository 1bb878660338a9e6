"""The captions that image sets are made from (paper, section 4).

Belongs here: the asset. Not here: the filter (`m2m.data.captions`).
"""

from dagster import AssetExecutionContext, ResourceParam, asset

from assets_defs.launching import Launch, Launcher, Results, declared
from m2m.stages import STAGES


@asset(**declared("filter-captions"), owners=["team:data"])
def filtered_captions(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """One table for all shards: a caption's split must not depend on how the work is cut."""
    yield from launcher.materialize(context, STAGES["filter-captions"], config)
