"""`python -m benchmarks`: all benchmarks, then one table; exit code 1 if one falls short.

Belongs here: running them one after another. Not here: measuring. Arguments that are not known here go to each of them
that runs models.
"""

import argparse
import json
import subprocess
import sys

SMALL = ("cached_context", "training_pass", "int8_context", "gradient_checkpointing", "training_attention")
OF_RUNS = ("launchers",)  # whole processes of Dagster's, not calls of a model
PAPER_SIZE = ("step_time",)
ON_GPUS = ("training_speed",)
DATA = ("captions", "reads", "epoch_order", "waiting", "generation", "killed_generation", "damaged_shards")
EVALUATION = ("evaluation_numbers", "evaluation_gate")  # the two others take half an hour


def main() -> int:
    parser = argparse.ArgumentParser(description="all benchmarks; further arguments go to each that runs models")
    parser.add_argument("--paper-size", action="store_true", help="models of the paper's size too: minutes on a CPU")
    given, further = parser.parse_known_args()
    rows = []
    paper_size = PAPER_SIZE + (ON_GPUS if "cuda" in further else ())
    for name in SMALL + OF_RUNS + (paper_size if given.paper_size else ()) + DATA + EVALUATION:
        told = [] if name in DATA + EVALUATION else further
        ran = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *told], stdout=subprocess.PIPE, text=True)
        lines = ran.stdout.splitlines()
        print("\n".join(lines[:-1]), flush=True)
        rows.append((name, _ended(lines[-1] if lines else "", ran.returncode)))
    print()
    for name, fault in rows:
        print(f"{name:26} {fault or 'reached'}")
    return int(any(fault for _, fault in rows))


def _ended(line: str, code: int) -> str:
    """What is wrong with a benchmark's end; empty where it reached all it is to reach."""
    try:
        return "" if json.loads(line)["ok"] else "NOT REACHED"
    except (ValueError, KeyError, TypeError):
        return f"failed with exit code {code}"


if __name__ == "__main__":
    sys.exit(main())
