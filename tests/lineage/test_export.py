"""An exported model stands alone: its card says only what manifests say, its checksums hold, the hub gets it whole."""

import base64
import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from m2m import artifacts, licences
from m2m.cli import main
from m2m.errors import M2MError
from m2m.export import UploadFailed, export, upload
from m2m.progress import Progress
from m2m.stage_run import run_stage
from m2m.stages import STAGES


def head_of(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize("key", ["pretrain@self", "pretrain@dino", "finetune@nvs"])
def test_the_folder_holds_the_model_as_it_is_and_sums_of_every_file(chain, tmp_path, key):
    out = tmp_path / "out"
    export(str(STAGES[key].folder(chain)), out)
    for name in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        assert (out / name).read_bytes() == (STAGES[key].folder(chain) / name).read_bytes()
    assert not (out / "manifest.json").exists()
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=out, check=False).returncode == 0
    summed = {line.split("  ", 1)[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert summed == {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {"SHA256SUMS"}


def test_the_card_says_what_the_manifests_say(chain, tmp_path):
    export(str(chain.outputs / "pretrain" / "self"), tmp_path / "out")
    manifest = artifacts.require_whole(chain.outputs / "pretrain" / "self", "")
    text, head = (tmp_path / "out" / "README.md").read_text(), head_of(tmp_path / "out")
    assert head["license"] == "apache-2.0"  # of the only source's card
    assert manifest.fingerprint in text and manifest.digest in text
    assert "`captions.tsv`" in text and "| licence | apache-2.0 |" in text
    assert (
        text.index("# A toy (toys)") < text.index("## Use") < text.index("## Data")
    )  # the model's own card, completed
    results = {r["dataset"]["name"]: r["metrics"] for r in head["model-index"][0]["results"]}
    assert results["evaluate@table_1"] == [{"type": "fid_self", "value": 10.5}]
    assert "evaluate@novel_views" not in results  # it looks at another model
    assert str(tmp_path) not in text + (tmp_path / "out" / "provenance.json").read_text()
    assert set(json.loads((tmp_path / "out" / "provenance.json").read_text())) == {
        "pretrain@self",
        "generate-sets",
        "filter-captions",
    }


def test_figures_of_an_earlier_model_are_not_claimed(chain, tmp_path):
    run_stage(STAGES["pretrain@self"], chain, overrides=["value=9"], progress=Progress(quiet=True))
    export(str(chain.outputs / "pretrain" / "self"), tmp_path / "out")
    assert "model-index" not in head_of(tmp_path / "out")
    assert "No evaluation of this very model is there." in (tmp_path / "out" / "README.md").read_text()


def test_the_same_model_is_exported_to_the_same_bytes(chain, tmp_path):
    for name in ("one", "two", "two"):  # an export may be replaced
        export(str(chain.outputs / "pretrain" / "dino"), tmp_path / name)
    one, two = (artifacts.record_files(tmp_path / name) for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    "argv, words",
    [
        (["report"], "only trained models can be exported"),
        (["pretrain@self", "--out", "{root}"], "holds something that no export wrote"),
    ],
)
def test_what_can_not_be_exported_is_said(chain, capsys, argv, words):
    assert main(["export", *(text.format(root=chain.root) for text in argv), "--config", str(chain.path)]) == 2
    assert words in capsys.readouterr().err


def test_a_damaged_model_and_one_without_a_licence_are_refused(chain, tmp_path):
    (chain.root / "weights" / "README.md").write_text("no licence")
    with pytest.raises(M2MError, match="--licence"):
        export(str(chain.outputs / "pretrain" / "self"), tmp_path / "out")
    export(str(chain.outputs / "pretrain" / "self"), tmp_path / "out", licence="openrail++")
    assert head_of(tmp_path / "out")["license"] == "openrail++"
    weights = chain.outputs / "pretrain" / "self" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(M2MError, match="has other content than when it was made"):
        export(str(chain.outputs / "pretrain" / "self"), tmp_path / "other", licence="mit")
    assert not (tmp_path / "other").exists()


def test_licences_are_those_that_the_hub_has_names_for():
    spdx = {name.lower() for name in licences.OF_SPDX if canonicalize_license_expression(name)}
    assert spdx == licences.OF_SPDX
    for name in licences.OF_THE_HUB:
        with pytest.raises(InvalidLicenseExpression):
            canonicalize_license_expression(name)
    assert all(licences.known(of) for of in licences._MODELS.values())


@pytest.mark.parametrize("said, meant", [("MIT", "mit"), ("CC-BY-4.0", "cc-by-4.0"), ("openrail++", "openrail++")])
def test_a_licence_is_written_as_the_hub_writes_it(chain, tmp_path, said, meant):
    export(str(chain.outputs / "pretrain" / "self"), tmp_path / "out", licence=said)
    assert head_of(tmp_path / "out")["license"] == meant


def test_a_licence_that_the_hub_has_no_name_for_is_named_as_another(chain, tmp_path):
    model = str(chain.outputs / "pretrain" / "self")
    with pytest.raises(M2MError, match=r"Did you mean apache-2\.0"):
        export(model, tmp_path / "out", licence="apache2")
    export(model, tmp_path / "out", licence="other:Our Own 1")
    head = head_of(tmp_path / "out")
    assert (head["license"], head["license_name"]) == ("other", "Our Own 1")
    (chain.root / "weights" / "README.md").write_text("---\nlicense: a licence of mine\n---\n")
    with pytest.raises(M2MError, match="weights is under 'a licence of mine', for which the hub has no name"):
        export(model, tmp_path / "other")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload of small files takes."""

    repos: set[str]
    files: dict[str, bytes]
    refuses: int | None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refuses:
            return self._answer({"error": "no write access to this repository"}, self.refuses)
        if self.path == "/api/repos/create":
            name = "/".join(filter(None, [json.loads(body).get("organization"), json.loads(body)["name"]]))
            self.repos.add(name)
            return self._answer({"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
        if self.path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            return self._answer({"files": modes})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer(
                {"commitUrl": f"http://{self.headers['Host']}/someone/toys/commit/1", "commitOid": "1", "success": True}
            )
        return self._answer({"success": True, "errors": [], "warnings": []})

    def do_GET(self) -> None:
        self._answer({"error": "not there"}, 404)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, content: dict, status: int = 200) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)


@pytest.fixture
def hub(monkeypatch):
    kind = type("OneHub", (Hub,), {"repos": set(), "files": {}, "refuses": None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield kind, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_hub_gets_every_file(chain, tmp_path, hub):
    kind, endpoint = hub
    export(str(chain.outputs / "pretrain" / "self"), tmp_path / "out")
    assert upload(tmp_path / "out", "someone/toys", endpoint=endpoint) == f"{endpoint}/someone/toys/commit/1"
    there = {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
    assert kind.repos == {"someone/toys"}
    assert kind.files.items() >= {name: content for name, content in there.items() if content}.items()


def test_an_upload_without_a_token_is_refused_in_one_line(chain, tmp_path, monkeypatch, capsys):
    """As on a machine where nobody has logged in, and no hub can be reached."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    argv = ["export", str(chain.outputs / "pretrain" / "self"), "--out", str(tmp_path / "out")]
    assert main([*argv, "--upload", "someone/toys"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: someone/toys: the hub did not take ") and "The folder is whole" in line
    assert main([*argv, "--upload", "no/such/name"]) == 2
    assert "no/such/name" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["refused", "unreachable"])
def test_a_failed_upload_is_one_clear_error_and_the_folder_stays(chain, tmp_path, hub, how):
    kind, endpoint = hub
    kind.refuses = 403
    export(str(chain.outputs / "pretrain" / "self"), tmp_path / "out")
    with pytest.raises(UploadFailed, match=r"someone/toys: the hub did not take .* --upload someone/toys"):
        upload(tmp_path / "out", "someone/toys", endpoint=endpoint if how == "refused" else "http://127.0.0.1:9")
    assert (tmp_path / "out" / "SHA256SUMS").is_file()
