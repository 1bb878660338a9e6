"""lakeFS over the wire, with the real client and a server from lakeFS' published API. A real server was not tried."""

import subprocess
from pathlib import Path

import pytest
from lakefs_server import KEYS, Linked, Repository, serve
from launching import Here, materialize

from m2m import artifacts
from m2m.config import Profile
from m2m.progress import Progress
from m2m.stage_run import run_stage
from m2m.stages import STAGES
from orchestration.lineage.__main__ import main as asked
from orchestration.lineage.lakefs import LakeFS
from orchestration.lineage.recording import Recording, RecordingError, RecordingLauncher
from orchestration.lineage.store_record import StoreRecorder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server():
    server, repositories = serve()
    yield f"http://127.0.0.1:{server.server_port}", repositories["m2m"]
    server.shutdown()
    server.server_close()


@pytest.fixture
def lake(server) -> LakeFS:
    return LakeFS(server[0], "m2m", *KEYS)


@pytest.fixture
def there(server) -> Repository:
    return server[1]


def recording(profile: Profile, key: str, run_id: str = "1") -> Recording:
    manifest = artifacts.read_manifest(STAGES[key].folder(profile))
    assert manifest is not None
    return Recording(STAGES[key], profile, manifest, run_id)


def make(profile: Profile, key: str, *overrides: str) -> None:
    run_stage(STAGES[key], profile, overrides=overrides, progress=Progress(quiet=True))


def test_an_output_is_committed_with_where_it_came_from_and_merged(chain, lake, there):
    made = recording(chain, "pretrain@self")
    reference = lake.record(made)
    assert there.branches["main"] == reference
    of_run = there.commits[there.branches["run-1"]]
    assert of_run.message == "Record pretrain@self"
    assert of_run.metadata["fingerprint"] == made.manifest.fingerprint
    assert of_run.metadata["input sets"] == made.manifest.inputs["sets"]
    names = {f"tiny/pretrain/self/{record.path}" for record in made.manifest.files}
    assert set(there.commits[reference].tree) == names | {"tiny/pretrain/self/manifest.json"}


def test_stages_of_one_run_share_a_branch_and_the_same_again_changes_nothing(chain, lake, there):
    for key in ("filter-captions", "generate-sets"):
        lake.record(recording(chain, key))
    commits, uploads = len(there.commits), there.uploads
    assert lake.record(recording(chain, "generate-sets")) == "main has it"
    assert (len(there.commits), there.uploads) == (commits, uploads)
    assert set(there.branches) == {"main", "run-1"}


def test_only_changed_files_are_sent_and_those_gone_are_taken_away(chain, lake, there):
    lake.record(recording(chain, "pretrain@self", "1"))
    uploads = there.uploads
    tree = there.staged["main"]
    tree["tiny/pretrain/self/of an earlier version.bin"] = b""
    there.add("main", dict(tree), [there.branches["main"]], "By hand", {})
    make(chain, "pretrain@self", "seed=1")  # the toy's files are the same; its manifest is not
    lake.record(recording(chain, "pretrain@self", "2"))
    assert there.uploads == uploads + 1
    assert "tiny/pretrain/self/of an earlier version.bin" not in there.staged["main"]


def test_a_data_set_is_read_as_it_was_at_a_tag(chain, lake, tmp_path):
    stage = STAGES["generate-sets"]
    first = recording(chain, "generate-sets")
    lake.record(first)
    lake.tag("v1")
    make(chain, "generate-sets", "value=9")
    lake.record(recording(chain, "generate-sets", "2"))
    assert lake.fetch(stage, "tiny", "v1", tmp_path / "old") == first.manifest
    assert artifacts.faults(tmp_path / "old", first.manifest, content=True) == []
    assert lake.fetch(stage, "tiny", "main", tmp_path / "new").config["value"] == 9
    with pytest.raises(RecordingError, match="tag already exists"):
        lake.tag("v1")


def test_what_a_store_holds_is_linked_and_read_at_a_commit_from_there(chain, server, there, tmp_path):
    made, store = recording(chain, "generate-sets"), f"file://{tmp_path / 'store'}"
    lake = LakeFS(server[0], "m2m", *KEYS, linked=store)
    address = StoreRecorder(store, ["generate-sets"]).record(made)
    reference = lake.record(made)
    tree = there.commits[reference].tree
    linked = {name: found.decode() for name, found in tree.items() if isinstance(found, Linked)}
    assert linked == {f"tiny/generate-sets/{of.path}": f"{address}/{of.path}" for of in made.manifest.files}
    assert there.uploads == 1  # the manifest
    assert lake.fetch(STAGES["generate-sets"], "tiny", reference, tmp_path / "read") == made.manifest
    lake.record(recording(chain, "filter-captions"))  # of which the store has nothing
    assert there.uploads == 1 + len(recording(chain, "filter-captions").manifest.files) + 1


def test_tars_that_lie_elsewhere_are_linked_from_there(chain, server, there, tmp_path):
    made = recording(chain, "generate-sets")
    folder = STAGES["generate-sets"].folder(chain)
    (tmp_path / "away").mkdir()
    (folder / "made.txt").rename(tmp_path / "away" / "made.txt")
    artifacts.write_json(folder / artifacts.ELSEWHERE, {"url": f"file://{tmp_path / 'away'}", "ending": ".txt"})
    reference = LakeFS(server[0], "m2m", *KEYS).record(made)
    found = there.commits[reference].tree["tiny/generate-sets/made.txt"]
    assert isinstance(found, Linked) and found.decode() == f"file://{tmp_path / 'away' / 'made.txt'}"


def test_a_store_that_can_not_be_asked_fails_the_record_in_one_line(chain, server):
    with pytest.raises(RecordingError, match=r"recording generate-sets on branch run-1: nosuch://"):
        LakeFS(server[0], "m2m", *KEYS, linked="nosuch://m2m").record(recording(chain, "generate-sets"))


def test_a_release_is_named_and_read_back_by_command(chain, server, monkeypatch, capsys, tmp_path):
    first = recording(chain, "generate-sets")
    LakeFS(server[0], "m2m", *KEYS).record(first)
    assert asked(["tag", "v1"]) == 2
    assert "M2M_LAKEFS is not set" in capsys.readouterr().err
    named = ("", "_REPOSITORY", "_KEY_ID", "_SECRET")
    for name, value in zip(named, (server[0], "m2m", *KEYS), strict=True):
        monkeypatch.setenv(f"M2M_LAKEFS{name}", value)
    assert asked(["tag", "v1"]) == 0
    assert asked(["fetch", "generate-sets", "v1", "--out", str(tmp_path / "old")]) == 0
    assert artifacts.require_whole(tmp_path / "old", "") == first.manifest
    assert asked(["fetch", "generate-sets", "v2", "--out", str(tmp_path / "new")]) == 2
    assert "there is no tiny/generate-sets/ at v2" in capsys.readouterr().err
    monkeypatch.setenv("M2M_LAKEFS_LINK", "on")
    assert asked(["tag", "v2"]) == 2
    assert "M2M_STORE" in capsys.readouterr().err


def test_a_conflict_keeps_the_branch_and_a_new_run_goes_through(chain, lake, there):
    lake.record(recording(chain, "generate-sets", "1"))
    make(chain, "generate-sets", "value=8")
    lake._ensure_branch("run-2")
    lake.record(recording(chain, "generate-sets", "3"))
    make(chain, "generate-sets", "value=9")
    mine = recording(chain, "generate-sets", "2")
    with pytest.raises(RecordingError, match="main has another generate-sets since branch run-2 began"):
        lake.record(mine)
    kept = there.commits[there.branches["run-2"]]
    assert kept.metadata["manifest"] == mine.manifest.digest
    lake.record(recording(chain, "generate-sets", "4"))
    assert there.staged["main"] == kept.tree


def test_a_conflict_fails_no_run_and_the_next_run_is_merged(chain, lake, there, monkeypatch):
    launcher, sent = RecordingLauncher(Here(chain), [lake], chain), lake._send

    def meanwhile(made: Recording, branch: str) -> bool:
        done = sent(made, branch)
        theirs = {"tiny/generate-sets/made.txt": b"by somebody else"}
        there.add("main", theirs, [there.branches["main"]], "By somebody else", {})
        return done

    with monkeypatch.context() as patch:
        patch.setattr(lake, "_send", meanwhile)
        told = str(materialize(launcher, "generate-sets")["recorded by lakeFS"])
    assert told.startswith("no: ") and "main has another generate-sets since branch" in told
    assert artifacts.require_whole(STAGES["generate-sets"].folder(chain), "")
    assert materialize(launcher, "generate-sets")["recorded by lakeFS"] == there.branches["main"]


def test_an_upload_that_was_cut_off_is_finished_by_the_next_one(chain, lake, there, monkeypatch):
    made, sent = recording(chain, "pretrain@self"), lake._upload

    def cut_off(branch: str, path: str, file: Path) -> None:
        if path.endswith(".safetensors"):
            raise OSError("connection reset by peer")
        sent(branch, path, file)

    monkeypatch.setattr(lake, "_upload", cut_off)
    with pytest.raises(RecordingError, match="connection reset by peer"):
        lake.record(made)
    assert not any(name.endswith("manifest.json") for name in there.staged["run-1"])
    assert there.commits[there.branches["main"]].tree == {}
    monkeypatch.undo()
    lake.record(made)
    assert len(there.commits[there.branches["main"]].tree) == len(made.manifest.files) + 1


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"secret": "other"}, "are the access key and its secret right"),
        ({"repository": "other"}, "repository not found"),
        ({"endpoint": "http://127.0.0.1:9"}, "refused"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(chain, server, wrong, words):
    right = {"endpoint": server[0], "repository": "m2m", "key_id": KEYS[0], "secret": KEYS[1]}
    with pytest.raises(RecordingError) as caught:
        LakeFS(**{**right, **wrong}).record(recording(chain, "filter-captions"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_else_knows_the_client():
    found = subprocess.run(
        ["grep", "-rl", "lakefs_client", "m2m", "assets_defs", "orchestration"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    assert [name for name in found if name.endswith(".py")] == ["orchestration/lineage/lakefs.py"]
