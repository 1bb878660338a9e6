"""`python -m m2m shards`: lists, verifies byte by byte, shows."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2m.cli import main
from m2m.data.sets import LATENTS, SetsIndex, SetTable, write_index
from m2m.data.shards import ShardPaths, ShardWriter, npy_bytes
from m2m.generation.image_sets import encode_picture


@pytest.fixture
def project(tmp_path) -> Path:
    import torch

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.yaml").write_text("{}")
    out = tmp_path / "outputs" / "small" / "generate-sets"
    for number in (0, 1):
        with ShardWriter(out, number, "f") as writer:
            said = json.dumps({"id": number, "caption": f"caption {number}", "split": "train"}).encode()
            picture = encode_picture(torch.full((3, 8, 8), 100 * number, dtype=torch.uint8), "png", 90)
            latents = npy_bytes(np.zeros((2, 4, 1, 1), np.float16))
            writer.add(f"{number:09d}", {LATENTS: latents, "json": said, "00.png": picture, "01.png": picture})
    SetTable.write(out, [(number, [number], ["train"]) for number in (0, 1)])
    shape = {"images_per_set": 2, "image_size": 8, "latent_shape": (4, 1, 1), "pictures": "png"}
    write_index(out, SetsIndex(shards=2, sets_per_shard=1, splits={"train": 2}, **shape))
    return tmp_path


def shards(project: Path, *argv: str) -> int:
    return main(["shards", *argv, "--config", str(project / "configs" / "small.yaml")])


def test_list_and_verify(project, capsys):
    assert shards(project, "list") == 0
    said = capsys.readouterr().out
    assert "2 shards, 2 sets" in said and "00001  1 sets" in said
    assert shards(project, "verify", "--shards", "0") == 0
    tar = ShardPaths(project / "outputs" / "small" / "generate-sets", 1).tar
    content = bytearray(tar.read_bytes())
    content[900] ^= 1
    tar.write_bytes(content)
    assert shards(project, "verify") == 1
    said = capsys.readouterr().out
    assert "00000  whole" in said and "00001.tar has other content" in said and "1 of 2 shards are damaged" in said


def test_show_writes_a_picture(project, tmp_path, capsys):
    output = tmp_path / "seen.png"
    assert shards(project, "show", "--shards", "1", "--output", str(output)) == 0
    with Image.open(output) as sheet:
        assert sheet.convert("RGB").getpixel((30, 50)) == (100, 100, 100)
    assert "1 sets, 2 images each" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, why",
    [
        (["list", "cache-features"], "no shards yet; make them with: python -m m2m cache-features"),
        (["list", "--shards", "x"], "--shards"),
        (["show", "cache-features"], "no shards yet"),
    ],
)
def test_mistakes_end_with_one_line(project, capsys, argv, why):
    assert shards(project, *argv) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1
