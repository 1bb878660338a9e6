"""M2M-DINO fine-tuned for the paper's two applications (sections 6.2 and 8.5).

Belongs here: the assets. Not here: fine-tuning (`m2m.training.finetune`), the data's readers (`m2m.data`).
"""

from dagster import AssetExecutionContext, ResourceParam, asset

from assets_defs.launching import Launch, Launcher, Results, declared
from m2m.stages import STAGES


@asset(**declared("finetune@nvs"), pool="gpu", owners=["team:models"])
def m2m_nvs(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """New views of an object from posed ones."""
    yield from launcher.materialize(context, STAGES["finetune@nvs"], config)


@asset(**declared("finetune@vgsi"), pool="gpu", owners=["team:models"])
def m2m_vgsi(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """The next steps of a procedure from the steps before."""
    yield from launcher.materialize(context, STAGES["finetune@vgsi"], config)
