"""The jobs: everything, and each part of it.

Belongs here: selections of assets under a name. Not here: the assets, when a job runs (`schedules`).
"""

import dagster as dg

from assets_defs.partitions import shards

# one run over all shards: Dagster makes one event a partition, the launcher starts one process
ALL_SHARDS = {
    "dagster/asset_partition_range_start": shards.get_partition_keys()[0],
    "dagster/asset_partition_range_end": shards.get_partition_keys()[-1],
}

m2m_pipeline = dg.define_asset_job(
    "m2m_pipeline",
    selection=dg.AssetSelection.all(include_sources=True),
    tags=ALL_SHARDS,
    description="Everything: from captions to the evaluation report. What is whole and current is left as it is.",
)
data_job = dg.define_asset_job(
    "data_job",
    selection=dg.AssetSelection.groups("data", include_sources=True),
    tags=ALL_SHARDS,
    description="Captions, image sets and DINO features (paper, section 4).",
)
pretraining_job = dg.define_asset_job(
    "pretraining_job",
    selection=dg.AssetSelection.assets("m2m_self", "m2m_dino"),
    description="M2M-Self and M2M-DINO on the image sets that are there (sections 5 and 6.1).",
)
finetuning_job = dg.define_asset_job(
    "finetuning_job",
    selection=dg.AssetSelection.assets("m2m_nvs", "m2m_vgsi"),
    description="Novel views and procedures from the M2M-DINO that is there (sections 6.2 and 8.5).",
)
evaluation_job = dg.define_asset_job(
    "evaluation_job",
    selection=dg.AssetSelection.groups("evaluation"),
    description="Every evaluation of the models that are there, and the report (sections 7 to 9).",
)

JOBS = [m2m_pipeline, data_job, pretraining_job, finetuning_job, evaluation_job]
