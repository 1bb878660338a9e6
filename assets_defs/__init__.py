"""Dagster's view of the stages: one thin asset each. No ML, no paths, no branching; the work is done by a launcher."""

import warnings

from dagster import BetaWarning

warnings.filterwarnings("ignore", category=BetaWarning)  # BackfillPolicy, since long; the lock file pins its behaviour
