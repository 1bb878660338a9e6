"""The captions that image sets are made from (paper, section 4).

Belongs here: the asset, and the file that it reads. Not here: the filter (`m2m.data.captions`).
"""

from dagster import AssetExecutionContext, DataVersion, ResourceParam, asset, observable_source_asset

from assets_defs.launching import Launch, Launcher, Results, declared
from assets_defs.profile import PROFILE
from m2m.config import source_digest
from m2m.stages import STAGES


@observable_source_asset(
    group_name="data",
    tags={"dagster/kind/file": ""},
    description="The profile's caption file as it lies there. Another content makes what comes after it stale; nothing "
    "is made again by itself.",
)
def caption_file() -> DataVersion:
    """Observed by the pipeline's own runs and by the sensor `new_captions`."""
    return caption_file_version()


def caption_file_version() -> DataVersion:
    """What the caption file holds, by its content.

    Raises:
        InputError: the profile's file is not there.
    """
    source = PROFILE.section("filter-captions").get("source")
    return DataVersion(source_digest(source, PROFILE.root) if source else "no source is set")


@asset(**declared("filter-captions", caption_file.key), owners=["team:data"])
def filtered_captions(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """One table for all shards: a caption's split must not depend on how the work is cut."""
    yield from launcher.materialize(context, STAGES["filter-captions"], config)
