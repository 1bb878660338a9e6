"""`python -m m2m`."""

import sys

from m2m.cli import main

sys.exit(main())
