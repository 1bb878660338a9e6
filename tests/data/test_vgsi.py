"""Illustrated procedures: wikiHow's layout, splits by where pictures lie, bad lines that cost themselves."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from m2m.data.vgsi import Procedures
from m2m.errors import ConfigError, InputError

TINY = Path(__file__).parents[2] / "m2m" / "tiny" / "data" / "vgsi"


def article(number: int, methods: int = 1, steps: int = 3) -> dict:
    told = [
        {"name": f"Way {m}", "steps": [{"headline": f"Do {s}", "step_id": f"{number}_{m}_{s}"} for s in range(steps)]}
        for m in range(methods)
    ]
    return {"file_id": number, "goal": f"How to {number}", "methods": told}


def picture(root: Path, split: str, step_id: str, colour: int = 90, size=(8, 8)) -> None:
    (root / "wiki_images" / split).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(root / "wiki_images" / split / f"{step_id}.png")


@pytest.fixture
def root(tmp_path) -> Path:
    for step in ("10_0_0", "10_0_1", "10_0_2", "10_1_0", "10_1_2"):
        picture(tmp_path, "train", step, colour=int(step[-1]) * 10)
    picture(tmp_path, "test", "11_0_0")
    lines = [json.dumps(article(10, methods=2)), json.dumps(article(11)), json.dumps(article(12))]
    (tmp_path / "WikihowText_data.json").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_procedures_are_those_with_pictures_in_the_split(root):
    train, test = Procedures(root, "train"), Procedures(root, "test")
    assert [(p.goal, p.method, p.step_ids) for p in (train[i] for i in range(len(train)))] == [
        ("How to 10", "Way 0", ["10_0_0", "10_0_1", "10_0_2"]),
        ("How to 10", "Way 1", ["10_1_0", "10_1_2"]),
    ]
    assert train[1].headlines == ["Do 0", "Do 2"]
    assert [test[i].step_ids for i in range(len(test))] == [["11_0_0"]]
    images = train.images(0, 4)
    assert images.shape == (3, 3, 4, 4) and images.dtype == torch.uint8 and images[:, 0, 0, 0].tolist() == [0, 10, 20]


def test_the_tiny_procedures():
    train, test = Procedures(TINY, "train"), Procedures(TINY, "test")
    assert len(train) > len(test) > 1 and not train.set_aside and not test.set_aside
    assert train.images(0, 64).shape == (len(train[0].step_ids), 3, 64, 64)


@pytest.mark.parametrize(
    "line", ["{broken", "[]", "null", '{"goal": "g"}', '{"goal": "g", "methods": [{"steps": [{"step_id": 5}]}]}']
)
def test_a_malformed_line_costs_one_article(root, line):
    path = root / "WikihowText_data.json"
    path.write_text(line + "\n\n" + path.read_text())
    found = Procedures(root, "train")
    assert len(found) == 2
    assert [aside.path for aside in found.set_aside] == ["WikihowText_data.json:1"]
    assert "not an article" in found.set_aside[0].reason


def test_a_bad_picture_costs_one_step(root):
    folder = root / "wiki_images" / "train"
    (folder / "10_0_1.png").write_bytes(b"no picture")
    found = Procedures(root, "train")
    assert found[0].step_ids == ["10_0_0", "10_0_2"] and found[0].headlines == ["Do 0", "Do 2"]
    picture(root, "train", "10_0_2", size=(300, 200))
    cut = (folder / "10_0_2.png").read_bytes()
    (folder / "10_0_2.png").write_bytes(cut[: len(cut) // 2])
    assert len(found.images(0, 4)) == 1 and found[0].step_ids == ["10_0_0"]
    assert [aside.path[-10:] for aside in found.set_aside] == ["10_0_1.png", "10_0_2.png"]


def test_what_is_missing_is_said(root, tmp_path):
    with pytest.raises(ConfigError, match="'val' was asked for"):
        Procedures(root, "val")
    with pytest.raises(InputError, match="wiki_images/train: no such folder"):
        Procedures(tmp_path / "nowhere")
    for path in (root / "wiki_images" / "test").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"no illustrated procedure of the test split .*11_0_0.png: not a picture"):
        Procedures(root, "test")
    (root / "WikihowText_data.json").unlink()
    with pytest.raises(InputError, match=r"WikihowText_data\.json: can't be read"):
        Procedures(root, "train")
