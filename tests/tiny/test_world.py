"""The picture world: captions and their inverse, drawings, and the inputs written from them."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from m2m.tiny import DATA
from m2m.tiny.inputs import write_inputs
from m2m.tiny.world import ATTRIBUTES, Scene, describe, draw, read_caption, sample_caption, sample_scene


def test_every_caption_is_read_back():
    captions = set()
    for values in itertools.product(*((None, *values) for values in ATTRIBUTES.values())):
        named = {name: value for name, value in zip(ATTRIBUTES, values) if value is not None}
        captions.add(describe(named))
        assert read_caption(describe(named)) == named
    assert len(captions) == 7 * 7 * 4 * 6 * 5  # no two say the same


def test_a_sampled_caption_names_attributes_of_one_scene():
    rng = np.random.default_rng(0)
    captions = [sample_caption(rng) for _ in range(300)]
    assert all(describe(read_caption(caption)) == caption for caption in captions)
    assert np.mean(["shape" in read_caption(caption) for caption in captions]) > 0.9


def test_a_scene_keeps_what_is_fixed_and_varies_the_rest():
    rng = np.random.default_rng(0)
    fixed = {"shape": "star", "texture": "striped"}
    scenes = [sample_scene(rng, fixed) for _ in range(100)]
    assert {(scene.shape, scene.texture) for scene in scenes} == {("star", "striped")}
    assert {scene.colour for scene in scenes} == set(ATTRIBUTES["colour"])


def test_unknown_values_are_named():
    with pytest.raises(ValueError, match="'hexagon' is not a shape"):
        describe({"shape": "hexagon"})
    with pytest.raises(ValueError, match="'size' is not an attribute"):
        sample_scene(np.random.default_rng(0), {"size": "large"})


def test_a_drawing_depends_on_its_scene_and_generator_alone():
    scene = Scene("heart", "red", "three", "white", "two-tone")
    first, again, other = (draw(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert (first == again).all()
    assert (first != other).any()


def test_shapes_stay_inside_the_picture():
    rng = np.random.default_rng(0)
    for _ in range(200):
        picture = draw(sample_scene(rng), rng).astype(int)
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (border == picture[0, 0]).all()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def _files(folder):
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_inputs_are_the_same_bytes_each_time(written, tmp_path):
    write_inputs(tmp_path)
    first, second = _files(written), _files(tmp_path)
    assert first.keys() == second.keys()
    assert all(first[name].read_bytes() == second[name].read_bytes() for name in first)


def test_the_shipped_inputs_are_what_the_command_writes(written):
    ours, shipped = _files(written), _files(DATA)
    assert ours.keys() == shipped.keys()
    for name, path in ours.items():
        if name.endswith(".png"):
            # Pixels, not bytes: other builds of zlib pack differently, and other CPUs may round the last bit.
            pair = [np.asarray(Image.open(file)).astype(int) for file in (path, shipped[name])]
            assert np.abs(pair[0] - pair[1]).max() <= 1
        elif name.endswith(".npy"):
            np.testing.assert_allclose(np.load(path), np.load(shipped[name]), atol=1e-12)
        else:
            assert path.read_bytes() == shipped[name].read_bytes()
    assert sum(path.stat().st_size for path in shipped.values()) < 3_000_000


def test_captions_carry_rows_for_the_filter_to_reject():
    rows = (DATA / "captions.tsv").read_text(encoding="utf-8").splitlines()
    captions = [row.split("\t")[1] if "\t" in row else None for row in rows]
    assert len(rows) == 403
    assert captions.count(None) == captions.count("") == 1
    assert sum(caption is not None and len(caption.split()) > 75 for caption in captions) == 1


def test_objects_have_zero123s_layout_and_axes():
    names = json.loads((DATA / "objaverse" / "valid_paths.json").read_text())
    assert len(names) == 24
    for name in names:
        for view in range(12):
            pose = np.load(DATA / "objaverse" / name / f"{view:03d}.npy")
            picture = np.asarray(Image.open(DATA / "objaverse" / name / f"{view:03d}.png"))
            assert pose.dtype == np.float64 and pose.shape == (3, 4)
            rotation, shift = pose[:, :3], pose[:, 3]
            np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
            assert np.linalg.det(rotation) > 0 and shift[2] < 0
            assert picture.shape == (64, 64, 4)
            # The camera looks at the origin, which lies inside the body, and nothing reaches the border.
            assert picture[32, 32, 3] == 255
            assert picture[0, :, 3].max() == picture[-1, :, 3].max() == picture[:, 0, 3].max() == 0


def test_procedures_have_vgsis_layout():
    articles = [json.loads(line) for line in (DATA / "vgsi" / "WikihowText_data.json").open()]
    assert len(articles) == 60
    for article in articles:
        (method,) = article["methods"]
        assert 4 <= len(method["steps"]) <= 6
        for place, step in enumerate(method["steps"]):
            assert step["step_id"] == f"{article['file_id']}_0_{place}"
            images = [DATA / "vgsi/wiki_images" / part / f"{step['step_id']}.png" for part in ("train", "test")]
            assert sum(image.exists() for image in images) == 1


def test_photo_sets_are_folders_of_categories():
    sets = {path.name: sorted(path.glob("*/*.png")) for path in (DATA / "photo_sets").iterdir()}
    assert set(sets) == set(ATTRIBUTES["shape"])
    assert {len(files) for files in sets.values()} == {8}
