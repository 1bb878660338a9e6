"""Launches as OpenLineage events, sent by its own client to a real endpoint on loopback."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from launching import Here, materialize

from m2m import artifacts
from m2m.errors import ConfigError
from orchestration.launchers.local import LocalLauncher
from orchestration.lineage import chosen
from orchestration.lineage.recording import RecordingLauncher


@pytest.fixture
def endpoint(monkeypatch):
    """What was posted to `/api/v1/lineage`."""
    posted: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/api/v1/lineage"
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(201)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{server.server_port}")
    yield posted
    server.shutdown()
    server.server_close()


@pytest.fixture
def launcher(chain, endpoint) -> RecordingLauncher:
    pytest.importorskip("openlineage.client")
    from orchestration.lineage.openlineage import OpenLineage

    return RecordingLauncher(Here(chain), [], chain, [OpenLineage()])


def test_a_launch_is_a_start_and_a_completion_with_what_was_read_and_written(chain, launcher, endpoint):
    materialize(launcher, "pretrain@dino")
    start, complete = endpoint
    manifest = artifacts.require_whole(chain.outputs / "pretrain" / "dino", "")
    assert [event["eventType"] for event in (start, complete)] == ["START", "COMPLETE"]
    assert start["run"]["runId"] == complete["run"]["runId"]
    assert complete["job"]["name"] == "m2m_dino"
    versions = {of["name"]: of["facets"]["version"]["datasetVersion"] for of in complete["inputs"]}
    assert versions["tiny/generate-sets"] == manifest.inputs["sets"]
    assert versions["tiny/cache-features"] == manifest.inputs["features"]
    assert set(versions) == {"tiny/generate-sets", "tiny/cache-features", "weights"}
    (output,) = complete["outputs"]
    assert (output["name"], output["facets"]["version"]["datasetVersion"]) == ("tiny/pretrain/dino", manifest.digest)
    assert output["outputFacets"]["outputStatistics"]["fileCount"] == len(manifest.files)
    assert complete["run"]["facets"]["m2m_run"]["facts"]["fingerprint"] == manifest.fingerprint


def test_what_one_job_writes_the_next_one_reads_under_the_same_name_and_version(launcher, endpoint):
    materialize(launcher, "filter-captions")
    materialize(launcher, "generate-sets")
    written, read = endpoint[1]["outputs"][0], endpoint[3]["inputs"][0]
    assert (written["namespace"], written["name"]) == (read["namespace"], read["name"])
    assert written["facets"]["version"]["datasetVersion"] == read["facets"]["version"]["datasetVersion"]


def test_a_launch_that_fails_is_told_with_its_reason(launcher, endpoint):
    with pytest.raises(Exception, match="valeu is not a setting"):
        materialize(launcher, "filter-captions", overrides=["valeu=1"])
    assert [event["eventType"] for event in endpoint] == ["START", "FAIL"]
    assert "valeu is not a setting" in endpoint[1]["run"]["facets"]["errorMessage"]["message"]
    assert endpoint[1]["outputs"] == []


def test_an_endpoint_that_is_away_fails_no_launch(chain, monkeypatch):
    pytest.importorskip("openlineage.client")
    from orchestration.lineage.openlineage import OpenLineage

    monkeypatch.setenv("OPENLINEAGE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "http")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__URL", "http://127.0.0.1:9")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__RETRY", '{"total": 0}')
    launcher = RecordingLauncher(Here(chain), [], chain, [OpenLineage()])
    assert materialize(launcher, "filter-captions")["seconds"] == 1


def test_it_is_off_until_it_is_asked_for(monkeypatch, endpoint):
    launcher = LocalLauncher()
    assert chosen.with_recorders(launcher) is launcher
    monkeypatch.setenv("M2M_OPENLINEAGE", "perhaps")
    with pytest.raises(ConfigError, match="M2M_OPENLINEAGE is 'perhaps'"):
        chosen.with_recorders(launcher)
    monkeypatch.setenv("M2M_OPENLINEAGE", "on")
    pytest.importorskip("openlineage.client")
    assert isinstance(chosen.with_recorders(launcher), RecordingLauncher)


def test_without_its_client_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openlineage.client", None)
    monkeypatch.setenv("M2M_OPENLINEAGE", "on")
    with pytest.raises(ConfigError, match=r"pip install 'm2m\[openlineage\]'"):
        chosen.with_recorders(LocalLauncher())
