"""From a report back to the captions, and from two results to what differs between them."""

import json
import shutil
import time
from pathlib import Path

import pytest
from toy_chain import git

from m2m import artifacts
from m2m.asset_metadata import origin
from m2m.cli import main
from m2m.config import load_profile
from m2m.export import export
from m2m.progress import Progress
from m2m.provenance import find_output, trace, verify
from m2m.released import read_release
from m2m.stage_run import run_stage
from m2m.stages import STAGES
from m2m.trace import differences, tree


def make(profile, key: str, *overrides: str) -> None:
    run_stage(STAGES[key], profile, overrides=overrides, progress=Progress(quiet=True))


def test_a_report_leads_back_to_the_caption_file_through_every_stage(chain):
    made = trace(chain, "report")
    nodes = {node.key: node for node in made.each()}
    assert set(nodes) == set(STAGES)
    assert not [gap for node in nodes.values() for gap in node.gaps]
    (captions,) = nodes["filter-captions"].sources
    assert captions.path == "captions.tsv"
    assert all(node.run["manifest"] == node.manifest.digest for node in nodes.values() if node.manifest)
    assert verify(made, chain) == []


def test_the_tree_names_code_settings_and_machine(chain):
    lines = "\n".join(tree(trace(chain, "report")))
    assert "source = captions.tsv (sha256 " in lines
    assert "m2m_dino = pretrain@dino (above)" in lines  # told once, read by many
    assert "torch " in lines and "cpus " in lines and "seed 0" in lines and "value 8" in lines


@pytest.mark.parametrize("what", ["report", "report/made.txt", "evaluate/table_1", "finetune/nvs/unet/config.json"])
def test_an_output_is_found_by_its_folder_and_by_any_file_in_it(chain, what):
    profile, key = find_output(str(chain.outputs / what))
    assert profile.outputs == chain.outputs
    assert (chain.outputs / what).is_relative_to(STAGES[key].folder(chain))


def test_the_command_takes_a_path_or_a_stage(chain, capsys):
    started = time.monotonic()
    assert main(["trace", str(chain.outputs / "report")]) == 0
    assert time.monotonic() - started < 2
    assert capsys.readouterr().out.splitlines()[-1] == "16 outputs, 2 sources, 0 gaps"
    assert main(["trace", "pretrain@dino", "--config", str(chain.path), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["outputs"]) == {
        "pretrain@dino",
        "cache-features",
        "generate-sets",
        "filter-captions",
    }


@pytest.mark.parametrize("argv, words", [([], "takes one result"), (["{root}/captions.tsv"], "neither a whole output")])
def test_what_is_no_result_is_said(chain, capsys, argv, words):
    assert main(["trace", *(text.format(root=chain.root) for text in argv)]) == 2
    assert words in capsys.readouterr().err


def damage_file(root: Path) -> None:
    (root / "outputs/tiny/pretrain/dino/made.txt").write_text("other bytes, as many\n")


def change_source(root: Path) -> None:
    (root / "weights/w.bin").write_bytes(b"v")


def change_manifest(root: Path) -> None:
    path = root / "outputs/tiny/generate-sets/manifest.json"
    path.write_text(path.read_text().replace('"value": 2', '"value": 9'))


@pytest.mark.parametrize(
    "fault, said",
    [
        (damage_file, "pretrain@dino: made.txt"),
        (change_source, "pretrain@self: source: weights has other content than when it was read"),
        (change_manifest, "generate-sets: the fingerprint in its manifest is not that of its settings"),
    ],
)
def test_verify_finds_every_kind_of_damage(chain, capsys, fault, said):
    fault(chain.root)
    assert main(["trace", str(chain.outputs / "report"), "--verify"]) == 1
    assert said in capsys.readouterr().out


def test_broken_chains_are_gaps(chain):
    make(chain, "generate-sets", "value=3")
    assert any("generate-sets was made anew since" in gap for gap in trace(chain, "pretrain@self").gaps)
    shutil.rmtree(chain.outputs / "generate-sets")
    gaps = [gap for node in trace(chain, "pretrain@self").each() for gap in node.gaps]
    assert any("python -m m2m generate-sets" in gap for gap in gaps)
    shutil.rmtree(chain.outputs / "runs")
    assert "there is no record here of the run that made it" in trace(chain, "pretrain@self").gaps


def test_sources_are_found_by_the_profile_where_nothing_is_remembered(chain):
    """As in a fresh clone: only the outputs themselves came back from the remote."""
    shutil.rmtree(chain.outputs / ".identities")
    assert [source.path for source in trace(chain, "filter-captions").sources] == ["captions.tsv"]
    (chain.root / "captions.tsv").write_text("other")
    assert trace(chain, "filter-captions").gaps == ["source: not known where it lay"]


def test_differences_name_the_setting_that_was_changed_and_what_came_of_it(chain, tmp_path):
    shutil.copytree(chain.root, tmp_path / "other")
    other = load_profile(tmp_path / "other" / "configs" / "tiny.yaml")
    assert differences(trace(chain, "report"), trace(other, "report")) == []
    (tmp_path / "other" / "captions.tsv").write_text("https://example.org/2\ta blue star\n")
    make(other, "filter-captions")
    make(other, "generate-sets", "value=9")
    lines = differences(trace(chain, "generate-sets"), trace(other, "generate-sets"))
    assert "  config value: 2 -> 9" in lines
    assert any(line.startswith("  data source: captions.tsv ") for line in lines)
    assert any(line.startswith("  data captions: ") for line in lines)
    assert not any("seed" in line or "package" in line for line in lines)


def test_a_hub_model_is_told_by_its_revision_also_where_nothing_is_remembered(chain):
    """As in a fresh clone; one without a revision is a gap: the hub may give another one another day."""
    for said, gaps in [("owner/name@4e63", []), ("owner/name", ["hub: owner/name has no revision"])]:
        make(chain, "pretrain@self", f"hub={said}")
        shutil.rmtree(chain.outputs / ".identities")
        made = trace(chain, "pretrain@self")
        assert [of.path for of in made.sources if of.setting == "hub"] == [said]
        assert len(made.gaps) == len(gaps) and all(map(str.startswith, made.gaps, gaps))


def test_files_that_lie_elsewhere_are_verified_there(chain, capsys):
    folder, away = chain.outputs / "generate-sets", chain.root / "away"
    away.mkdir()
    shutil.move(folder / "made.txt", away)
    artifacts.write_json(folder / artifacts.ELSEWHERE, {"url": f"file://{away}", "ending": ".txt"})
    assert verify(trace(chain, "generate-sets"), chain) == []
    (away / "made.txt").write_bytes(b"?" + (away / "made.txt").read_bytes()[1:])
    (found,) = verify(trace(chain, "generate-sets"), chain)
    assert found == f"generate-sets: file://{away}/made.txt has other content than when it was made"


def test_a_released_model_is_traced_by_itself(chain, tmp_path, capsys):
    export(str(chain.outputs / "pretrain" / "dino"), tmp_path / "released")
    known = differences(trace(chain, "pretrain@dino"), read_release(tmp_path / "released"))
    shutil.rmtree(chain.root)
    assert known == []
    assert main(["trace", str(tmp_path / "released" / "unet" / "config.json"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "captions = filter-captions: elsewhere" in said and "source = captions.tsv (sha256 " in said
    assert "4 outputs, 2 sources, 0 gaps\n" in said
    (tmp_path / "released" / "unet" / "config.json").write_text("{}")
    (tmp_path / "released" / "model_index.json").unlink()
    assert main(["trace", str(tmp_path / "released"), "--verify"]) == 1
    assert "unet/config.json has other content than when it was released" in (told := capsys.readouterr().out)
    assert "model_index.json is missing" in told
    (tmp_path / "released" / "provenance.json").write_text("[]")
    assert main(["trace", str(tmp_path / "released")]) == 2
    assert "provenance.json: can't be read" in capsys.readouterr().err


def test_two_models_can_be_compared(chain):
    lines = differences(trace(chain, "pretrain@self"), trace(chain, "pretrain@dino"))
    assert "  config value: 4 -> 5" in lines
    assert "cache-features: only behind the second" in lines
    assert not any(line.startswith("filter-captions") for line in lines)


def test_dvcs_own_record_of_earlier_stages_does_not_make_the_code_changed(chain):
    root = chain.root
    (root / ".gitignore").write_text("/outputs/\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "Begin")
    (root / "dvc.lock").write_text("of an earlier stage")
    make(chain, "filter-captions", "value=3")
    assert trace(chain, "filter-captions").run["git"]["dirty"] is False
    (root / "code.py").write_text("")
    make(chain, "filter-captions", "value=4")
    assert trace(chain, "filter-captions").run["git"]["dirty"] is True


def test_a_materialization_leads_to_what_it_was_made_from(chain):
    folder = chain.outputs / "pretrain" / "dino"
    manifest = artifacts.require_whole(folder, "")
    told = origin(manifest, folder)
    assert told["manifest"] == manifest.digest[:16] and told["trace"] == f"python -m m2m trace {folder}"
    table = told["made_from"]["raw_value"]
    assert f"| features | [dino_features](/assets/dino_features) | `{manifest.inputs['features'][:16]}` |" in table
    assert "| source | weights | " in table
