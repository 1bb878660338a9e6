"""Running the assets: definitions, jobs, schedules, launchers. No asset bodies."""
