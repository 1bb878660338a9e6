"""Shards as Dagster partitions.

Belongs here: which shards there are. Not here: how a shard is made, or which of them a run makes.
"""

import dagster as dg

from assets_defs.profile import PROFILE
from m2m.config import Profile
from m2m.errors import ConfigError
from m2m.stages import shard_key


def shard_keys(profile: Profile) -> list[str]:
    """One key a shard of the profile's image sets.

    Raises:
        ConfigError: `generate-sets.shards` is not a count.
    """
    count = profile.section("generate-sets").get("shards", 1)
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"{profile.path}: generate-sets.shards must be a count of at least 1, got {count!r}")
    return [shard_key(shard) for shard in range(count)]


shards = dg.StaticPartitionsDefinition(shard_keys(PROFILE))
"""The partitions of `mis_shards` and `dino_features`; the profile's, not one run's."""
