"""Photographs in sets that share a category: folders, MSCOCO, and one photograph as a square."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m2m.data.coco import CocoSets
from m2m.data.photo_sets import PhotoSets, load_image
from m2m.errors import InputError

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "photo_sets"
TINY = Path(__file__).parents[2] / "m2m" / "tiny" / "data" / "photo_sets"


def photo(path: Path, size=(8, 6), colour=(200, 100, 0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
def test_real_photographs():
    sets = PhotoSets(REAL)
    found = [sets[i] for i in range(len(sets))]
    assert [s.category for s in found] == ["backpack", "boot", "candle", "dog", "plushie", "sneaker", "toy"]
    assert sum(len(s.paths) for s in found) == 67 and sets.set_aside == []
    assert load_image(found[3].paths[0], 64).shape == (3, 64, 64)


def test_the_tiny_photographs():
    sets = PhotoSets(TINY)
    assert len(sets) > 1 and all(sets[i].paths for i in range(len(sets)))


def test_bad_photographs_cost_themselves(tmp_path):
    good = photo(tmp_path / "cat" / "tom" / "00.jpg")
    (tmp_path / "cat" / "tom" / "01.jpg").write_bytes(b"no picture")
    (tmp_path / "cat" / "tom" / "notes.txt").write_text("not looked at")
    (tmp_path / "dog" / "rex").mkdir(parents=True)
    sets = PhotoSets(tmp_path)
    assert [(sets[i].category, sets[i].paths) for i in range(len(sets))] == [("cat", [good])]
    assert [str(aside) for aside in sets.set_aside] == ["cat/tom/01.jpg: not a picture"]
    good.unlink()
    with pytest.raises(InputError, match=r"no photograph .*01\.jpg: not a picture"):
        PhotoSets(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        PhotoSets(tmp_path / "nowhere")


def test_an_image_is_its_upright_central_square(tmp_path):
    pixels = np.zeros((6, 12, 3), np.uint8)
    pixels[:, 3:9] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (load_image(tmp_path / "wide.png", 3) == 255).all()
    turned = Image.fromarray(np.array([[[9, 0, 0], [0, 9, 0]]] * 2, np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png", 2)[:, 0, 0].tolist() == [0, 9, 0]
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    clear = load_image(tmp_path / "clear.png", 4)
    assert (clear == 255).all() and clear.dtype == torch.uint8
    with pytest.raises(InputError, match=r"nowhere\.png"):
        load_image(tmp_path / "nowhere.png", 4)


def instances(**changes) -> dict:
    return {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (1, 2, 3, 4)],
        "annotations": [
            {"image_id": image, "category_id": category}
            for image, category in [(2, 18), (1, 18), (1, 18), (1, 44), (3, 44), (4, 44), (9, 44)]
        ],
        "categories": [{"id": 44, "name": "bottle"}, {"id": 18, "name": "dog"}, {"id": 90, "name": "toothbrush"}],
    } | changes


@pytest.fixture
def coco(tmp_path) -> tuple[Path, Path]:
    for image in (1, 2, 3):
        photo(tmp_path / "val2017" / f"{image:012d}.jpg")
    (tmp_path / "instances.json").write_text(json.dumps(instances()))
    return tmp_path / "instances.json", tmp_path / "val2017"


def test_images_are_grouped_by_category(coco):
    sets = CocoSets(*coco)
    found = {sets[i].category: [int(path.stem) for path in sets[i].paths] for i in range(len(sets))}
    assert found == {"dog": [1, 2], "bottle": [1, 3]}
    assert {aside.path: aside.reason for aside in sets.set_aside} == {
        "000000000004.jpg": "no such file",
        "image 9": "annotated, but not listed under images",
    }


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps(instances(images=[{"id": 1}]))])
def test_instances_that_are_none(coco, content):
    coco[0].write_text(content)
    with pytest.raises(InputError, match=r"instances\.json"):
        CocoSets(*coco)


def test_coco_without_images(coco, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        CocoSets(coco[0], tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no image of MSCOCO .*000000000001.jpg: no such file"):
        CocoSets(coco[0], tmp_path / "empty")
