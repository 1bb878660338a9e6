"""What the report promises: complete, self-contained, and made of the outputs alone."""

import json
import re

import numpy as np
import pytest

from m2m import artifacts
from m2m.artifacts import Summary
from m2m.config import Profile, load_profile
from m2m.errors import ArtifactError, CheckFailed
from m2m.evaluation.charts import chart
from m2m.evaluation.page import cell, figure_name, missing_from
from m2m.evaluation.per_set import PER_SET, PerSet, read_per_set
from m2m.evaluation.report import PAGE
from m2m.progress import Progress
from m2m.stage_run import run_stage
from m2m.stages import STAGES
from tests.evaluation.outputs_by_hand import FIGURES, ROWS, write_output


@pytest.fixture(scope="module")
def whole_outputs(tmp_path_factory) -> Profile:
    """A profile with an output of every stage that the report shows."""
    root = tmp_path_factory.mktemp("report")
    (root / "configs").mkdir()
    (root / "configs" / "tiny.yaml").write_text("label: made with <tiny> models\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("M2M_OUTPUTS", raising=False)
        profile = load_profile(root / "configs" / "tiny.yaml")
    for key in STAGES["report"].inputs.values():
        summary = Summary(
            figures={**FIGURES.get(key, {}), "a_figure": 0.1234567, "nothing": None},
            tables={"Table 1": ROWS},
            curves={"loss by step": {"step": [1.0, 2.0, 3.0], "M2M-Self": [3.0, 1.0, 0.5]}},
            pictures={f"pictures of {key}": "grids/some.png"},
            checks={"fine": ""},
        )
        per_set = None
        if key == "evaluate@table_1":
            per_set = PerSet()
            per_set.add("M2M-Self: FID ↓", np.linspace(9, 10, 12), "lower")
        write_output(profile, key, summary, {"things": 1234, "sets": 77}, {"seed": 7}, per_set)
    return profile


@pytest.fixture(scope="module")
def page(whole_outputs) -> str:
    outcome = run_stage(STAGES["report"], whole_outputs, progress=Progress(quiet=True))
    return (outcome.folder / PAGE).read_text(encoding="utf-8")


def test_every_input_has_its_section(page):
    for key in STAGES["report"].inputs.values():
        assert f'<section id="{key.replace("@", "-")}">' in page
    assert missing_from(page, ["evaluate-table_1"]) == []


def test_nothing_is_read_from_outside(page):
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "<script" not in page and "@import" not in page and "url(" not in page


def test_the_page_says_what_it_was_made_with(page):
    assert "made with &lt;tiny&gt; models" in page
    assert "a shipped checkpoint" in page and "python -m m2m.tiny m2m" in page
    assert "paper: M2M-Self (9M)" in page and "9.56 ± 1.21" in page
    assert "1,234" in page and "12.5 s" in page


def test_provenance_names_every_manifest(page, whole_outputs):
    for key in STAGES["report"].inputs.values():
        manifest = artifacts.read_manifest(STAGES[key].folder(whole_outputs))
        assert manifest is not None and manifest.digest in page and manifest.fingerprint in page


def test_headline_pictures_and_figures_are_the_reports_own(whole_outputs):
    outcome = run_stage(STAGES["report"], whole_outputs, progress=Progress(quiet=True))
    summary = artifacts.read_summary(outcome.folder)
    assert summary.pictures
    assert all((outcome.folder / path).read_bytes().startswith(b"\x89PNG") for path in summary.pictures.values())
    assert summary.figures["image sets"] == 77
    assert summary.checks == {"report_complete": "", "no_regression": ""}


def test_numbers_lie_beside_the_page_with_what_they_were_made_with(whole_outputs):
    folder = run_stage(STAGES["report"], whole_outputs, progress=Progress(quiet=True)).folder
    told = json.loads((folder / "metrics.json").read_text())
    assert set(told) == set(STAGES["report"].inputs.values())
    table = told["evaluate@table_1"]
    assert table["config"] == {"seed": 7} and table["counts"]["sets"] == 77 and len(table["manifest"]) == 64
    assert table["means"]["M2M-Self: FID ↓"] == {
        "mean": pytest.approx(9.5),
        "error": pytest.approx(np.linspace(9, 10, 12).std(ddof=1) / 12**0.5),
        "sets": 12,
        "better": "lower",
    }
    assert list(read_per_set(folder / PER_SET)) == ["table_1: M2M-Self: FID ↓"]


def test_every_curve_is_a_file_of_rows_beside_the_page(whole_outputs):
    folder = run_stage(STAGES["report"], whole_outputs, progress=Progress(quiet=True)).folder
    curves = {path.name: json.loads(path.read_text()) for path in (folder / "curves").iterdir()}
    assert set(curves) == {f"{key.replace('@', '-')}-loss-by-step.json" for key in STAGES["report"].inputs.values()}
    row = {"curve": "M2M-Self: loss by step", "of": "M2M-Self"}
    points = [{**row, "x": x, "value": value} for x, value in ((1.0, 3.0), (2.0, 1.0), (3.0, 0.5))]
    assert curves["pretrain-self-loss-by-step.json"] == points


def test_a_report_worse_than_the_accepted_one_is_refused(whole_outputs, tmp_path):
    better = PerSet()
    better.add("table_1: M2M-Self: FID ↓", np.arange(1.0, 13.0) / 12, "lower")
    better.write(tmp_path)
    accepted = f"accepted={tmp_path / PER_SET}"
    with pytest.raises(CheckFailed, match=r"no_regression does not hold: table_1: M2M-Self: FID ↓: 9.5, accepted 0.54"):
        run_stage(STAGES["report"], whole_outputs, overrides=[accepted], progress=Progress(quiet=True))
    itself = STAGES["report"].folder(whole_outputs) / PER_SET
    made = run_stage(STAGES["report"], whole_outputs, overrides=[f"accepted={itself}"], progress=Progress(quiet=True))
    said = "1 metrics compared with the accepted report, 0 worse"
    assert said in (made.folder / PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("-2.78e-17 ± 2.5e-17", "0 ± 0"),
        ("1 ± 2.9e-05", "1 ± <0.0001"),
        ("0.00261 ± 0.024", "0.003 ± 0.024"),
        ("66.3 ± 13", "66 ± 13"),
        ("9.56 ± 1.21", "9.56 ± 1.21"),
        ("0.8 ± 0", "0.8 ± 0"),
        ("-0.0004 ± 0.01", "0.00 ± 0.01"),
    ],
)
def test_means_have_the_digits_that_their_errors_leave_them(written, shown):
    assert cell(written) == shown


def test_figures_are_named_in_words():
    named = {"fid_self": "FID, M2M-Self", "dino_within_dino": "DINO within, M2M-DINO", "kept_share": "kept share"}
    assert {name: figure_name(name) for name in named} == named


def test_a_page_without_a_section_or_with_a_link_is_not_complete():
    html = '<section id="a"></section><img src="https://example.org/x.png">'
    assert missing_from(html, ["a", "b"]) == ["no section b", "reads https://example.org/x.png from outside"]


def test_a_picture_that_is_none_is_named(whole_outputs):
    folder = STAGES["evaluate@rollouts"].folder(whole_outputs)
    picture = folder / "grids/some.png"
    good = picture.read_bytes()
    picture.write_bytes(b"x" * len(good))
    try:
        with pytest.raises(ArtifactError, match=r"some\.png: not a picture"):
            run_stage(STAGES["report"], whole_outputs, force=True, progress=Progress(quiet=True))
    finally:
        picture.write_bytes(good)


@pytest.mark.parametrize(
    "columns",
    [
        {"x": [1.0], "y": [2.0]},
        {"x": [1.0, 2.0], "y": [2.0, 2.0]},
        {"x": list(map(float, range(5000))), "y": [10.0 ** -(n / 1000) for n in range(5000)]},
        {"x": [1.0, 2.0, 3.0], "y": [-1.0, float("nan"), 1.0], "z": [1.0]},
        {"x": [], "y": []},
    ],
    ids=["one point", "a flat line", "long and logarithmic", "gaps", "empty"],
)
def test_any_curve_can_be_drawn(columns):
    drawn = chart("a <curve>", columns)
    assert "nan" not in drawn and "<curve>" not in drawn
    for place in re.findall(r'points="([^"]*)"', drawn):
        numbers = [float(number) for pair in place.split() for number in pair.split(",")]
        assert all(-1 <= number <= 481 for number in numbers)
    assert len(drawn) < 20_000
