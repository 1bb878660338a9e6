"""What M2M promises of speed, memory and exactness, measured: both sides of a promise in one run of one script.

Belongs here: a small script for each promise (`python -m benchmarks.NAME`; `python -m benchmarks` runs all).
Not here: tests.
"""
