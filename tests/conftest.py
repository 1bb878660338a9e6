"""What holds for all tests. Fixtures stand beside the tests that use them."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in m2m/__main__.py
