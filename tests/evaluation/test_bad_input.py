"""What is missing, damaged or does not fit: named, and never a number in a table."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from m2m.errors import ArtifactError, InputError

SETTINGS = {"sets": 3, "num_images": 2, "preceding": 2}
VIEWS = {"objaverse": "objaverse", "min_validation": 2, "preceding": [1, 2], "targets": 2}


@pytest.fixture
def copied(small_world, tmp_path):
    """`copied("sets")`: a copy of one of the small world's folders, to damage."""
    return lambda name: shutil.copytree(small_world.root / name, tmp_path / "copies" / name)


def _without_numbers(folder):
    """Weights of the right names and shapes that are no numbers."""
    for path in folder.rglob("*.safetensors"):
        save_file({name: value * float("nan") for name, value in load_file(path).items()}, path, {"format": "pt"})


def test_missing_pictures_of_sets_are_named(evaluate, copied):
    sets = copied("sets")
    index = json.loads((sets / "index.json").read_text())
    (sets / "index.json").write_text(json.dumps(index | {"pictures": "webp"}))
    with pytest.raises(ArtifactError, match=r"00000.tar: set \d+ has no 00.webp"):
        evaluate("rollouts", inputs={"sets": sets}, **SETTINGS)
    (sets / "index.json").write_text(json.dumps(index))
    next(sets.rglob("*.tar")).unlink()
    with pytest.raises(ArtifactError, match=r"00000|shard 0"):
        evaluate("rollouts", "again", inputs={"sets": sets}, **SETTINGS)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rollouts", {**SETTINGS, "preceding": 9}),
        ("preceding_images", {"reader": None, "trials": 3, "preceding": [1, 9]}),
        ("table_1", {"preceding": 9, "backbone": "classifier", "inception": "classifier"}),
    ],
)
def test_sets_with_fewer_images_than_precede_are_refused(evaluate, name, settings):
    with pytest.raises(InputError, match=r"sets of 7 images; (picture 9 was asked for|9 must precede)"):
        evaluate(name, **settings)


def test_sets_of_other_pictures_than_the_models_are_refused(evaluate, copied):
    sets = copied("sets")
    index = json.loads((sets / "index.json").read_text())
    (sets / "index.json").write_text(json.dumps(index | {"image_size": 32}))
    with pytest.raises(InputError, match="sets of 32 pixels; the model makes pictures of 16"):
        evaluate("consistency", inputs={"sets": sets}, sets=3, preceding=2, num_images=2)


def test_a_corrupt_photograph_is_set_aside_until_too_few_are_left(evaluate, copied):
    photos = copied("photo_sets")
    bad = sorted((photos / "cats" / "one").iterdir())
    bad[0].write_bytes(b"no picture")
    run = evaluate("real_images", photo_sets=str(photos), sets_per_category=1, num_images=1)
    assert run.counts["categories"] == 2
    bad[1].write_bytes(b"")
    with pytest.raises(InputError, match="1 categories have the 4 photographs"):
        evaluate("real_images", "again", photo_sets=str(photos), sets_per_category=1, num_images=1)


def test_objects_with_views_set_aside_are_compared_by_what_all_have(evaluate, copied):
    objects = copied("objaverse")
    (objects / "object-1" / "002.png").write_bytes(b"no picture")
    run = evaluate("novel_views", **{**VIEWS, "objaverse": str(objects)})
    assert run.counts["objects"] == 2 and run.counts["objects_left_out"] == 0
    for view in ("001", "004"):
        (objects / "object-1" / f"{view}.npy").write_bytes(b"no pose")
    run = evaluate("novel_views", "again", **{**VIEWS, "objaverse": str(objects)})
    assert run.counts["objects"] == 1 and run.counts["objects_left_out"] == 1


def test_a_corrupt_step_is_no_step(evaluate, copied):
    folder = copied("vgsi")
    (folder / "wiki_images" / "test" / "0_0_4.png").write_bytes(b"no picture")
    settings = {"preceding": 2, "num_images": 2, "distractors": 2}
    run = evaluate("procedures", vgsi=str(folder), **settings)
    assert run.counts["procedures"] == 3
    for path in (folder / "wiki_images" / "test").glob("[12]_*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match="1 held-out procedures have two steps or more"):
        evaluate("procedures", "again", vgsi=str(folder), **settings)


@pytest.mark.parametrize(("model", "said"), [("dino", "DINOv2 features"), ("clip", "CLIP embeddings")])
def test_features_that_are_no_numbers_are_refused_by_name(evaluate, copied, model, said):
    folder = copied(model)
    _without_numbers(folder)
    with pytest.raises(InputError, match=rf"pictures have {said} that are not finite .*weights are damaged"):
        evaluate("rollouts", **SETTINGS, **{model: str(folder)})


def test_a_model_that_makes_no_numbers_is_refused(evaluate, copied):
    model = copied("m2m_self")
    _without_numbers(model / "unet")
    with pytest.raises(ArtifactError, match="picture that is not finite: train it again"):
        evaluate("rollouts", inputs={"m2m_self": model}, **SETTINGS)
