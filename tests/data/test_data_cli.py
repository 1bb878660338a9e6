"""`python -m m2m data`: the report counts what can be used, and says of the rest why not."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2m.cli import main


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


@pytest.fixture
def objects(tmp_path) -> Path:
    root = tmp_path / "views"
    for uid in ("a", "b", "c"):
        for view in range(3):
            picture(root / uid / f"00{view}.png")
            np.save(root / uid / f"00{view}.npy", np.eye(3, 4))
    (root / "b" / "001.png").write_bytes(b"no picture")
    (root / "a" / "002.npy").unlink()
    return root


def test_objects_and_views(objects, capsys):
    assert main(["data", "objaverse", str(objects)]) == 0
    said = capsys.readouterr().out
    assert "3 objects (2 to train, 1 to validation), 7 views" in said and "2 to 3, on average 2.3" in said
    assert "2 set aside" in said and "b/001.png: not a picture" in said and "1 x no pose 002.npy beside it" in said


def test_procedures_and_steps(tmp_path, capsys):
    steps = [{"step_id": f"1_0_{i}", "headline": "do"} for i in range(3)]
    article = {"goal": "g", "methods": [{"name": "m", "steps": steps}]}
    (tmp_path / "WikihowText_data.json").write_text(f"{json.dumps(article)}\n{{broken\n")
    for split, count in (("train", 3), ("test", 1)):
        for i in range(count):
            picture(tmp_path / "wiki_images" / split / f"1_0_{i}.png")
    (tmp_path / "wiki_images" / "train" / "1_0_1.png").write_bytes(b"")
    assert main(["data", "vgsi", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "train: 1 procedures, 2 illustrated steps" in said and "test: 1 procedures, 1 illustrated steps" in said
    assert "2 set aside" in said and "WikihowText_data.json:2: not an article" in said


def test_a_profiles_data_sets_are_found(objects, tmp_path, capsys):
    picture(tmp_path / "photos" / "cat" / "tom" / "00.png")
    (tmp_path / "photos" / "cat" / "tom" / "01.jpg").write_bytes(b"x")
    sections = {
        "finetune": {"variants": {"nvs": {"data": str(objects)}, "vgsi": {"data": "nowhere"}}},
        "evaluate": {"variants": {"novel_views": {"objaverse": str(objects)}, "real_images": {"photo_sets": "photos"}}},
    }
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "p.yaml").write_text(json.dumps(sections))
    assert main(["data", "--config", str(tmp_path / "configs" / "p.yaml")]) == 2
    said = capsys.readouterr().out
    assert said.count("objaverse:") == 1 and "1 categories, 1 photographs" in said and "cat/tom/01.jpg" in said
    assert "vgsi: can't be used: " in said


def test_a_kind_without_its_path(capsys):
    assert main(["data", "coco", "instances.json"]) == 2
    assert "--images" in capsys.readouterr().err
