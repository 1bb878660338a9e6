"""`python -m m2m`."""

import os
import sys

# GNU OpenMP reads this when torch loads. Its threads otherwise spin for long while they wait for each other: with other
# work on the cores that made two threads six times slower. Two thousand rounds cost nothing on free cores.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# Importing diffusers otherwise tells every time that there is no torchvision, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars are for terminals; a log gets lines of our own

from m2m.cli import main

sys.exit(main())
