"""Keeping what was made: DVC's and git's records of it, lakeFS. Each can be off; none can fail a run."""
