"""What holds for all tests. Fixtures stand beside the tests that use them."""

import os

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in m2m/__main__.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device here"))
