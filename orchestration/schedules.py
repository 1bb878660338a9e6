"""When jobs run by themselves.

Belongs here: schedules. Not here: jobs.
"""

import os

import dagster as dg

from orchestration.jobs import evaluation_job

reevaluation = dg.ScheduleDefinition(
    name="reevaluation",
    job=evaluation_job,
    cron_schedule=os.environ.get("M2M_REEVALUATION_CRON", "0 6 * * 1"),
    execution_timezone=os.environ.get("M2M_TIMEZONE", "UTC"),
    tags={"dagster/priority": "-1"},  # what people launch goes first
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Evaluate again what was trained, or set otherwise, since. Mondays at six unless M2M_REEVALUATION_CRON "
    "and M2M_TIMEZONE say otherwise; evaluations that are current are left as they are.",
)

SCHEDULES = [reevaluation]
