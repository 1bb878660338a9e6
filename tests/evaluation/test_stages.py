"""Every evaluation on very small real models: what is compared, counted, kept, and the same on every run."""

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from m2m.artifacts import Manifest
from m2m.config import source_digest
from m2m.errors import ArtifactError, ConfigError, InputError
from m2m.evaluation import protocol
from m2m.evaluation.page import cell
from m2m.evaluation.per_set import PER_SET, read_per_set
from m2m.evaluation.sampler import Sampler
from m2m.evaluation.table import Table1
from tests.evaluation.conftest import TEST

SETTINGS = {
    "table_1": {"preceding": 4, "num_images": 3, "backbone": "classifier", "inception": "classifier"},
    "preceding_images": {"trials": 3, "preceding": [1, 3]},
    "consistency": {"sets": 5, "preceding": 3, "num_images": 2},
    "real_images": {"photo_sets": "photo_sets", "sets_per_category": 2, "num_images": 2},
    "novel_views": {"objaverse": "objaverse", "min_validation": 2, "preceding": [1, 2], "targets": 2},
    "procedures": {"vgsi": "vgsi", "preceding": 2, "num_images": 2, "distractors": 2},
    "rollouts": {"sets": 3, "num_images": 3, "preceding": 2},
}

_ALONE = [("both", {}), ("alone", {"models": ["dino"]})]


@pytest.mark.parametrize("name", SETTINGS)
def test_an_evaluation_leaves_pictures_tables_and_finite_metrics(evaluate, name):
    run = evaluate(name, **SETTINGS[name])
    assert run.summary["checks"] == {"metrics_finite": ""}
    assert run.summary["tables"] and run.counts["generated_images"] > 0
    for path in run.summary["pictures"].values():
        with Image.open(run.out / path) as picture:
            assert min(picture.size) > 64
    assert _numbers(json.loads((run.out / "metrics.json").read_text()))
    assert not list(run.out.glob(".*")), "what was kept for a restart is dropped"
    assert all(np.isfinite(metric.values).all() for metric in read_per_set(run.out / PER_SET).values())


@pytest.mark.parametrize("name", ["table_1", "novel_views", "procedures"])
def test_the_same_settings_give_the_same_bytes_in_any_batch(evaluate, name):
    first = evaluate(name, "first", **SETTINGS[name])
    second = evaluate(name, "second", **SETTINGS[name])
    other = evaluate(name, "other", **SETTINGS[name], batch=1)
    files = sorted(path.name for path in first.out.iterdir())
    for file in files:
        assert (first.out / file).read_bytes() == (second.out / file).read_bytes()
    ours, theirs = (_numbers(json.loads((run.out / "metrics.json").read_text())) for run in (first, other))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["table_1", "preceding_images", "consistency", "real_images", "rollouts"])
def test_one_model_alone_gives_its_own_values(evaluate, name):
    both, alone = (read_per_set(evaluate(name, out, **SETTINGS[name], **more).out / PER_SET) for out, more in _ALONE)
    assert not [metric for metric in alone if "M2M-Self" in metric]
    theirs = [metric for metric in both if "M2M-DINO" in metric]
    assert theirs and all(np.allclose(both[metric].values, alone[metric].values, rtol=1e-3) for metric in theirs)


def test_noise_between_steps_is_an_image_s_own_in_any_batch(evaluate):
    asked = {"num_inference_steps": 3, "guidance_scale": 2.0, "scheduler": "sde-dpmsolver++"}
    settings = {
        "first": {"sampling": asked},
        "other": {"sampling": asked, "batch": 1},
        "ddim": {"sampling": asked | {"scheduler": "ddim"}},
    }
    runs = [evaluate("procedures", out, **SETTINGS["procedures"], **more) for out, more in settings.items()]
    first, other, ddim = (_numbers(json.loads((run.out / "metrics.json").read_text())) for run in runs)
    assert first == pytest.approx(other, rel=1e-3, abs=1e-3)
    assert first != pytest.approx(ddim, rel=1e-3, abs=1e-3)


def test_a_killed_evaluation_goes_on_with_the_batch_it_was_at(evaluate, monkeypatch, tmp_path):
    whole = evaluate("rollouts", "whole", **SETTINGS["rollouts"], batch=1)
    calls = []
    sample = Sampler.continue_sets

    def counted(self, *args, **kwargs):
        if len(calls) == 4:
            calls.append("killed")
            raise KeyboardInterrupt
        calls.append(args[1])
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(Sampler, "continue_sets", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("rollouts", "killed", **SETTINGS["rollouts"], batch=1)
    # a half-written batch is no batch
    newest = max((tmp_path / "killed" / ".parts").rglob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:100])
    resumed = evaluate("rollouts", "killed", **SETTINGS["rollouts"], batch=1)
    assert len(calls) == 1 + 6 + 1  # six batches, the damaged one twice
    for file in ("metrics.json", "M2M-Self.png", "M2M-DINO.png"):
        assert (whole.out / file).read_bytes() == (resumed.out / file).read_bytes()


@pytest.mark.parametrize(("name", "settings"), [("novel_views", {"planted_objects": 3}), ("procedures", {})])
def test_planted_models_are_measured_beside_views_and_steps(evaluate, name, settings):
    run = evaluate(name, **SETTINGS[name], **settings)
    (table,) = (rows for title, rows in run.summary["tables"].items() if title.startswith("Do the measures tell"))
    assert all(row["oracle"] and row["holds"] for row in table)
    assert "planted" in json.loads((run.out / "metrics.json").read_text())
    without = evaluate(name, "without", **SETTINGS[name], **{f"planted_{'objects' if settings else 'procedures'}": 0})
    assert not any(title.startswith("Do the measures") for title in without.summary["tables"])


def test_table_1_scores_each_nth_image_and_names_its_samples(evaluate):
    run = evaluate("table_1", **SETTINGS["table_1"])
    metrics = json.loads((run.out / "metrics.json").read_text())
    assert run.summary["figures"]["fid_samples"] == TEST and run.summary["figures"]["fid_features"] == 4
    assert set(metrics["scores"]) == {"M2M-Self", "M2M-DINO", "the sets' own images"}
    for scores in metrics["scores"].values():
        for score in scores.values():
            assert len(score["by_image"]) == 3
            assert score["mean"] == pytest.approx(sum(score["by_image"]) / 3)
    methods = [row["method"] for row in run.summary["tables"]["Table 1"]]
    assert methods[-2:] == ["paper: M2M-Self (9M)", "paper: M2M-DINO (6M)"]
    assert "not comparable" in run.summary["figures"]["note"]


def test_table_1_refuses_fewer_sets_than_features(evaluate):
    with pytest.raises(InputError, match="takes 4; FID of 4 features needs 5 or more"):
        evaluate("table_1", **SETTINGS["table_1"], sets=4)


def test_inception_without_torch_fidelity_says_what_to_install(evaluate):
    with pytest.raises(ConfigError, match="pip install torch-fidelity"):
        evaluate("table_1", backbone="inception-v3")


def test_inception_with_few_sets_is_refused_by_a_dry_run(small_world):
    given = {"sets": 128, "preceding": 4, "num_images": 3}
    with pytest.raises(ConfigError, match="2048 features needs 2049 or more"):
        Table1.model_validate({**small_world.settings, **given}).preview(small_world.root, "table_1")
    said = Table1.model_validate({**small_world.settings, **given, "inception_features": 64})
    assert "128 sets, 3 images after 4, two models: 768 images" in said.preview(small_world.root, "table_1")


def test_without_a_reader_preceding_images_come_from_test_sets(evaluate):
    run = evaluate("preceding_images", **SETTINGS["preceding_images"], reader=None)
    (rows,) = run.summary["tables"].values()
    assert len(rows) == 2 * 2 * 2  # models, guidances, numbers of preceding images
    assert all("agreement" not in row and 0 <= row["CLIP to all preceding"] <= 100 for row in rows)


def test_preceding_images_in_detail_without_context_over_guidances_and_of_sketches(evaluate):
    settings = {"trials": 6, "preceding": [0, 2], "guidances": [3], "in_detail": True, "sketches": True}
    run = evaluate("preceding_images", **settings, shared_rate=0.7)
    tables = run.summary["tables"]
    rows = [row for row in tables["By number of preceding images"] if row["model"].startswith("M2M-Self")]
    assert [(row["model"], row["guidance"], row["preceding images"]) for row in rows] == [
        *[("M2M-Self", guidance, count) for guidance in (1.0, 3.0, 7.5) for count in (0, 2)],
        *[("M2M-Self, of sketches", 7.5, count) for count in (0, 2)],
    ]
    # nothing is read, so that there is nothing to guide to
    assert len({row["CLIP to all preceding"] for row in rows[:-2] if not row["preceding images"]}) == 1
    by_attribute = [row for row in tables["Kept where shared, by attribute"] if row["model"] == "M2M-Self"]
    for row, kept in zip(by_attribute, rows):
        read = [row[name] for name in ("shape", "colour", "count", "background", "texture") if name in row]
        assert row["mean"] == pytest.approx(kept["kept where shared"]) == pytest.approx(sum(read) / len(read))
    near = tables["Distance to the nearest preceding image"]
    assert all(row["preceding images"] == 2 and row["nearest: RMSE"] >= 0 for row in near)
    assert {row["model"]: row["over the same in true sets"] for row in near}["planted: oracle"] == 1
    assert {row["model"]: row["nearest: RMSE"] for row in near}["planted: copier"] == 0
    curve = run.summary["curves"]["Kept where shared, by guidance scale"]
    assert curve["guidance scale"] == [1.0, 3.0, 7.5] and "M2M-Self, of sketches" not in curve
    plain = evaluate("preceding_images", "plain", **SETTINGS["preceding_images"])
    assert set(plain.summary["tables"]) == {
        "By number of preceding images",
        "The attributes",
        *(title for title in plain.summary["tables"] if title.startswith("Do the measures tell")),
    }


def test_a_wrong_pose_is_another_targets_and_needs_one(evaluate):
    run = evaluate("novel_views", **SETTINGS["novel_views"], wrong_pose=True)
    plain = evaluate("novel_views", "plain", **SETTINGS["novel_views"])
    rows, without = (of.summary["tables"]["New views against the true ones"] for of in (run, plain))
    wrong = [row for row in rows if "another target's pose" in row["views"]]
    right = [row for row in rows if row["views"] == "M2M-DINO"]
    assert [row["preceding views"] for row in wrong] == [1, 2]
    assert [row["PSNR, dB"] for row in wrong] != [row["PSNR, dB"] for row in right]
    assert [row for row in rows if row not in wrong] == without
    with pytest.raises(ValidationError, match="targets to 2"):
        evaluate("novel_views", "one", **{**SETTINGS["novel_views"], "targets": 1}, wrong_pose=True)


def test_remedies_roll_the_same_sets_from_the_same_noise(evaluate):
    remedies = {"a wide window": {"context_window": 9}, "window of 1": {"context_window": 1}}
    remedies["noise"] = {"context_noise": 100}
    run = evaluate("rollouts", **SETTINGS["rollouts"], remedies=remedies)
    found = json.loads((run.out / "metrics.json").read_text())
    ways = {(model, name) for model in ("M2M-Self", "M2M-DINO") for name in remedies} - {("M2M-DINO", "noise")}
    assert set(found) == {"M2M-Self", "M2M-DINO", *(f"{model}, {name}" for model, name in ways)}
    for model in ("M2M-Self", "M2M-DINO"):
        assert found[model] == found[f"{model}, a wide window"]  # as wide as all that precedes
        assert found[model] != found[f"{model}, window of 1"]
    plain = evaluate("rollouts", "plain", **SETTINGS["rollouts"])
    alone = json.loads((plain.out / "metrics.json").read_text())
    assert alone == {name: found[name] for name in ("M2M-Self", "M2M-DINO")}


def test_sampling_speed_times_both_models_and_the_text_to_image_model(evaluate, monkeypatch):
    run = evaluate(
        "sampling_speed", text_to_image="text-to-image", preceding=[1, 2], num_images=[1], joint=[2], repeats=1
    )
    (rows,) = run.summary["tables"].values()
    models = ["text-to-image model", *["M2M-Self"] * 2, "M2M-Self, joint", *["M2M-DINO"] * 2, "M2M-DINO, joint"]
    assert [row["model"] for row in rows] == models
    assert all(row["seconds an image"] > 0 for row in rows)


def test_sets_without_stored_pictures_are_decoded(small_world, evaluate, tmp_path):
    bare = tmp_path / "sets"
    shutil.copytree(small_world.root / "sets", bare)
    index = json.loads((bare / "index.json").read_text())
    (bare / "index.json").write_text(json.dumps(index | {"pictures": None}))
    run = evaluate("rollouts", inputs={"sets": bare}, **SETTINGS["rollouts"])
    assert run.summary["checks"] == {"metrics_finite": ""}


def test_photographs_must_be_named_and_enough(evaluate):
    with pytest.raises(ConfigError, match="photo_sets, or coco_instances"):
        evaluate("real_images")
    with pytest.raises(InputError, match="0 categories have the 9 photographs"):
        evaluate("real_images", photo_sets="photo_sets", preceding=9)


def test_objects_need_enough_views(evaluate):
    with pytest.raises(InputError, match="none of 2 held-out objects has the 10 views"):
        evaluate("novel_views", objaverse="objaverse", min_validation=2, preceding=[1, 8], targets=2)


def test_table_1s_values_by_set_have_its_means(evaluate):
    run = evaluate("table_1", **SETTINGS["table_1"], error_blocks=6)
    found, scores = read_per_set(run.out / PER_SET), json.loads((run.out / "metrics.json").read_text())["scores"]
    for name, told in scores.items():
        assert found[f"{name}: Image-Image CLIP ↑"].mean == pytest.approx(told["image"]["mean"])
        assert found[f"{name}: FID ↓"].mean == pytest.approx(told["fid"]["mean"])
        assert len(found[f"{name}: Text-Image CLIP ↑"].values) == TEST


def test_other_weights_than_the_pinned_are_refused(small_world, evaluate):
    pinned = source_digest("clip", small_world.root)
    with pytest.raises(InputError, match=r"dino dino: not the pinned weights: sha256 .* pins.dino is 00"):
        evaluate("rollouts", **SETTINGS["rollouts"], pins={"clip": pinned, "dino": "00"})
    with pytest.raises(ValidationError, match=r"pins.clap: no such model. There are: .*clip"):
        Table1.model_validate({**small_world.settings, "pins": {"clap": pinned}})


def test_a_corrupt_picture_is_named(small_world, evaluate, tmp_path):
    damaged = tmp_path / "sets"
    shutil.copytree(small_world.root / "sets", damaged)
    (shard,) = damaged.rglob("*.tar")
    shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\0\0\0\0"))
    with pytest.raises(ArtifactError, match=r"pictures \[0, 1\] of set \d can't be read .* shards verify"):
        evaluate("rollouts", inputs={"sets": damaged}, **SETTINGS["rollouts"])


def test_no_table_hides_a_number_that_is_not_finite(evaluate):
    run = evaluate("rollouts", **SETTINGS["rollouts"])
    run.table("A table", [{"x": float("nan")}])
    protocol.conclude(run, {})
    assert run.summary["checks"]["metrics_finite"] == "not finite: tables.A table[0].x"
    assert cell(float("nan")) == "⚠ not a finite number"


def test_what_is_not_finite_is_named():
    metrics = {"a": {"b": [1.0, float("nan")]}, "c": None, "d": "text"}
    assert protocol._not_finite(metrics, "") == ["a.b[1]"]


def test_settings_are_checked_before_anything_runs(small_world):
    from m2m.evaluation.rollouts import Rollouts

    config = Rollouts.model_validate({**small_world.settings, "dino": "missing/folder/of/dino"})
    with pytest.raises(InputError, match="dino missing/folder/of/dino: no such file or folder"):
        config.preview(small_world.root, None)
    assert any(
        line.startswith("clip")
        for line in Rollouts.model_validate(small_world.settings).preview(small_world.root, None)
    )


def _numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in _numbers(value[key])]
    if isinstance(value, list):
        return [number for inner in value for number in _numbers(inner)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        assert math.isfinite(value)
        return [float(value)]
    return []


def test_objects_of_the_training_are_not_evaluated(small_world, evaluate, tmp_path):
    trained = tmp_path / "m2m_nvs"
    shutil.copytree(small_world.root / "m2m_nvs", trained)
    manifest = Manifest(
        stage="finetune@nvs",
        version=1,
        fingerprint="0",
        config={"min_validation": 1},
        inputs={},
        counts={},
        files=[],
    )
    (trained / "manifest.json").write_bytes(manifest.encoded())
    with pytest.raises(ConfigError, match="min_validation is 2, but finetune held out 1"):
        evaluate("novel_views", inputs={"m2m_nvs": trained}, **SETTINGS["novel_views"])
