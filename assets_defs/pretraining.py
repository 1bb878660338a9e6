"""The two models of the paper, trained on MIS (sections 5 and 6.1).

Belongs here: the assets. Not here: training (`m2m.training.pretrain`), the models (`m2m.models`).
"""

from dagster import AssetExecutionContext, ResourceParam, asset

from assets_defs.launching import Launch, Launcher, Results, declared
from m2m.stages import STAGES


@asset(**declared("pretrain@self"), pool="gpu", owners=["team:models"])
def m2m_self(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """Attends to the preceding images' own latents."""
    yield from launcher.materialize(context, STAGES["pretrain@self"], config)


@asset(**declared("pretrain@dino"), pool="gpu", owners=["team:models"])
def m2m_dino(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """Attends to the preceding images' DINOv2 features."""
    yield from launcher.materialize(context, STAGES["pretrain@dino"], config)
