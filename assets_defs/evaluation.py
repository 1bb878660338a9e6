"""What the models can do, measured (paper, sections 7 to 9), and the one page that shows it.

Belongs here: the assets. Not here: metrics and protocols (`m2m.evaluation`).
"""

from typing import Any

from dagster import AssetExecutionContext, ResourceParam, asset

from assets_defs.launching import Launch, Launcher, Results, declared
from assets_defs.upkeep import WHEN_EVALUATED, WHEN_TRAINED, report_freshness
from m2m.stages import STAGES

_EVALUATION: Any = {"pool": "gpu", "owners": ["team:evaluation"], "automation_condition": WHEN_TRAINED}


@asset(**declared("evaluate@table_1"), **_EVALUATION)
def table_1(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """Each metric by n-th generated image, then its mean and deviation over them."""
    yield from launcher.materialize(context, STAGES["evaluate@table_1"], config)


@asset(**declared("evaluate@preceding_images"), **_EVALUATION)
def preceding_images(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """The same sets continued from one, two, three and four images."""
    yield from launcher.materialize(context, STAGES["evaluate@preceding_images"], config)


@asset(**declared("evaluate@consistency"), **_EVALUATION)
def consistency(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """What of a set is kept, and that nothing of it is copied."""
    yield from launcher.materialize(context, STAGES["evaluate@consistency"], config)


@asset(**declared("evaluate@real_images"), **_EVALUATION)
def real_images(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """Photographs, which no model has seen in training."""
    yield from launcher.materialize(context, STAGES["evaluate@real_images"], config)


@asset(**declared("evaluate@novel_views"), **_EVALUATION)
def novel_views(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """Against the true views of objects that were held out."""
    yield from launcher.materialize(context, STAGES["evaluate@novel_views"], config)


@asset(**declared("evaluate@procedures"), **_EVALUATION)
def procedures(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """Against the true steps of procedures that were held out."""
    yield from launcher.materialize(context, STAGES["evaluate@procedures"], config)


@asset(**declared("evaluate@sampling_speed"), **_EVALUATION)
def sampling_speed(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """A measurement of time: two runs differ, and it is declared so."""
    yield from launcher.materialize(context, STAGES["evaluate@sampling_speed"], config)


@asset(**declared("evaluate@rollouts"), **_EVALUATION)
def rollouts(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """Sequences far longer than the sets that were trained on."""
    yield from launcher.materialize(context, STAGES["evaluate@rollouts"], config)


@asset(
    **declared("report"),
    owners=["team:evaluation"],
    automation_condition=WHEN_EVALUATED,
    freshness_policy=report_freshness(),
)
def evaluation_report(context: AssetExecutionContext, config: Launch, launcher: ResourceParam[Launcher]) -> Results:
    """One HTML file that needs nothing beside it."""
    yield from launcher.materialize(context, STAGES["report"], config)
