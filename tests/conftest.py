"""What holds for all tests. Fixtures stand beside the tests that use them."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in m2m/__main__.py
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; what it starts would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
_SERVICES = Path(os.environ.get("M2M_SERVICES") or Path(__file__).parents[1] / ".services")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` or `services` are skipped, with the reason, where there is no GPU or nobody asks for them."""
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "torch finds no CUDA device here")
    if "services" not in str(config.getoption("markexpr")):
        _skip(items, "services", "needs servers or a browser: make test-services starts them and asks for it")


def _skip(items: list[pytest.Item], mark: str, why: str) -> None:
    for item in items:
        if item.get_closest_marker(mark):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def _answering_slurm() -> Path | None:
    # the project's own alone: the tests cancel what they find, and a user's SLURM_CONF is a cluster with others on it
    conf = _SERVICES / "slurm" / "slurm.conf"
    if not conf.is_file() or not shutil.which("scontrol"):
        return None
    asked = subprocess.run(["scontrol", "ping"], env=os.environ | {"SLURM_CONF": str(conf)}, capture_output=True)
    return conf if asked.returncode == 0 else None


@pytest.fixture
def own_slurm(_answering_slurm, monkeypatch) -> Iterator[Path]:
    """The slurm.conf of the Slurm that `services/slurm/up.sh` started; its queue is empty, before and after."""
    if _answering_slurm is None:
        pytest.skip("no Slurm answers: services/slurm/up.sh starts one (make test-services does it all)")
    monkeypatch.setenv("SLURM_CONF", str(_answering_slurm))
    yield _answering_slurm
    subprocess.run(["scancel", "--me"], check=False)
    subprocess.run(["scancel", "--me", "--signal=KILL", "--full"], check=False, capture_output=True)
    deadline = time.monotonic() + 60
    while subprocess.run(["squeue", "-h", "--me"], capture_output=True, text=True).stdout.strip():
        assert time.monotonic() < deadline, "jobs of this test are still there"
        time.sleep(0.1)
