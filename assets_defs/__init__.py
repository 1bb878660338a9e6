"""Dagster's view of the stages: one thin asset each. No ML, no paths, no branching; the work is done by a launcher."""

import warnings

from dagster import BetaWarning, PreviewWarning

# backfill policies and Pipes, both as the lock file pins them
warnings.filterwarnings("ignore", category=BetaWarning)
warnings.filterwarnings("ignore", category=PreviewWarning)
