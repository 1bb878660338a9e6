"""The page of results: its places are filled from outputs, its words stay, and what is missing is said."""

import shutil

import pytest

from m2m import artifacts
from m2m.artifacts import Summary, faults, read_manifest
from m2m.config import Profile
from m2m.errors import InputError
from m2m.stages import STAGES
from m2m.tiny import WEIGHTS
from m2m.tiny.reached import best_guidance, reached
from m2m.tiny.results import markdown, rebuild
from tests.evaluation.outputs_by_hand import write_output

KEPT = "kept where shared"
PAGE = """# Words

<!-- table evaluate@preceding_images: Kept | model, kept | sets=12/13, model=M2M-Self -->
old
<!-- end -->
Between.
<!-- curve evaluate@preceding_images: A curve -->
<!-- end -->
<!-- picture evaluate@preceding_images: M2M-Self -->
<!-- end -->
<!-- table evaluate@novel_views: Views -->
old
<!-- end -->
<!-- losses -->
<!-- end -->
<!-- time -->
<!-- end -->
"""


def _rows(kept: float, alone: float = 0.2):
    row = {"model": "M2M-Self", "preceding images": 4, "agreement": 0.8, "ideal observer": 0.9}
    return [
        {**row, "guidance": 1.0, KEPT: 0.5},
        {**row, "guidance": 4.0, KEPT: kept},
        {**row, "guidance": 4.0, KEPT: alone, "preceding images": 0},
    ]


@pytest.fixture
def outputs(tmp_path):
    """Outputs of two seeds: one with 0.8, one with 0.9 kept."""
    folders = []
    for seed, kept in enumerate((0.8, 0.9)):
        profile = Profile(tmp_path / "x.yaml", {}, tmp_path / f"seed-{seed}", root=tmp_path)
        key = "evaluate@preceding_images"
        summary = Summary(
            tables={"Kept": [{"model": name, "kept": kept, "kept ±": 0.01, "sets": 12} for name in ("M2M-Self", "x")]},
            curves={"A curve": {"x": [1.0, 2.0], "M2M-Self": [0.1, 0.2]}},
            pictures={"M2M-Self: sets": "M2M-Self.png"},
        )
        write_output(profile, key, summary, {}, {})
        metrics = {"rows": _rows(kept), "nearest": []}
        artifacts.write_json(STAGES[key].folder(profile) / "metrics.json", metrics)
        folders.append(profile.outputs)
    return folders


def test_places_are_filled_words_stay_and_what_is_missing_is_said(outputs, tmp_path):
    page = tmp_path / "docs" / "README.md"
    page.parent.mkdir()
    page.write_text(PAGE)
    assert rebuild(page, outputs, WEIGHTS) == ["table evaluate@novel_views: Views"]
    text = page.read_text()
    assert "# Words" in text and "\nBetween.\n" in text and "old" not in text
    said = "2 seeds, mean ± standard deviation over them"
    assert f"-->\n{said}:\n\n| model | kept |\n| --- | --- |\n| M2M-Self | 0.850 ± 0.071 |\n<!-- end" in text
    assert "**A curve (mean of 2 seeds)**" in text
    assert "*Not measured yet.*" in text and "evaluate@preceding_images | 12 |" in text.replace("13", "12")
    for name in ("preceding-images-a-curve.svg", "preceding-images-m2m-self.png", "losses.svg"):
        assert f"]({name})" in text and (page.parent / name).stat().st_size > 100
    rebuild(page, outputs, WEIGHTS)
    assert page.read_text() == text


def test_evaluations_are_kept_beside_the_page_and_one_measured_anew_takes_its_place(outputs, tmp_path):
    page = tmp_path / "docs" / "README.md"
    page.parent.mkdir()
    page.write_text(PAGE + "<!-- reached -->\n<!-- end -->\n")
    with pytest.raises(InputError, match="no evaluation is kept here"):
        rebuild(page, [], WEIGHTS)
    (outputs[0] / "runs/evaluate@rollouts").mkdir()  # still running
    rebuild(page, outputs[:1], WEIGHTS)
    assert "-->\nOne seed, ± standard error:\n\n| model | kept |" in page.read_text()
    assert "| M2M-Self | 0.800 ± 0.010 |" in page.read_text() and "**A curve**" in page.read_text()
    kept = page.parent / "outputs"
    rebuild(page, [kept / "0", outputs[1]], WEIGHTS)  # seed 1, measured where seed 0's outputs are not
    text = page.read_text()
    assert "| 0.850 ± 0.071 | 2 | yes |" in text
    for folder in outputs:
        shutil.rmtree(folder)
    rebuild(page, [], WEIGHTS)
    assert page.read_text() == text
    for seed, lacking in enumerate(([], ["M2M-Self.png is missing"])):  # pictures are the first seed's
        folder = kept / str(seed) / "evaluate/preceding_images"
        manifest = read_manifest(folder)
        assert manifest and faults(folder, manifest) == lacking


@pytest.mark.parametrize("place", ["<!-- tabel x: y -->\n<!-- end -->", "<!-- table x: y -->\n", "<!-- end -->"])
def test_a_place_that_is_none_is_refused(outputs, tmp_path, place):
    (tmp_path / "page.md").write_text(place)
    with pytest.raises(InputError, match=r"kind 'tabel'|no kind or no end"):
        rebuild(tmp_path / "page.md", outputs, WEIGHTS)
    assert not (tmp_path / "outputs").exists() and (tmp_path / "page.md").read_text() == place


def test_a_claim_has_its_mean_and_spread_over_seeds_and_holds_by_its_mean(outputs):
    found = {(row["what"], row["model"]): row for row in reached(outputs, WEIGHTS)}
    (kept,) = (row for row in found.values() if row["what"].startswith("kept after") and row["model"] == "M2M-Self")
    assert kept["found"] == "0.850 ± 0.071" and kept["holds"] and kept["seeds"] == 2
    (alone,) = (row for row in reached(outputs[:1], WEIGHTS) if row["what"].startswith("that, less") and row["seeds"])
    assert alone["found"] == "0.600" and alone["holds"] and alone["seeds"] == 1
    (off,) = (row for row in found.values() if row["what"].startswith("furthest") and row["seeds"])
    assert off["found"] == "0.100 ± 0.000" and off["holds"]
    views = [row for row in found.values() if row["what"].startswith("new views")]
    assert len(views) == 2 and all(row["found"] is None and row["holds"] is None for row in views)


def test_the_best_guidance_is_where_most_is_kept():
    assert best_guidance({"rows": _rows(0.8)}, "M2M-Self") == 4.0


def test_a_table_shows_errors_behind_their_values():
    rows = [{"a": 1, "b": 0.5, "b ±": 0.125}, {"a": 2, "b": None, "b ±": None}]
    assert markdown(rows).splitlines()[2:] == ["| 1 | 0.500 ± 0.125 |", "| 2 | – |"]
    assert markdown([]) == ""


def test_a_page_or_outputs_that_are_not_there_are_named(outputs, tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    with pytest.raises(InputError, match=r"missing\.md: no such file"):
        rebuild(tmp_path / "missing.md", outputs, WEIGHTS)
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        rebuild(tmp_path / "page.md", [tmp_path / "nowhere"], WEIGHTS)
