"""Objects and their cameras: zero123's layout, its split, poses that don't depend on the world's frame."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from m2m.data.objaverse import ObjaverseViews, relative_poses
from m2m.errors import ConfigError, InputError

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "multiview"
TINY = Path(__file__).parents[2] / "m2m" / "tiny" / "data" / "objaverse"


def pose(seed: int) -> np.ndarray:
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    return np.concatenate([rotation, np.random.default_rng(seed + 1).standard_normal((3, 1))], axis=1)


def write_objects(root: Path, count: int, views: int = 3, listed: bool = True) -> Path:
    names = [f"uid{i:03d}" for i in range(count)]
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for view in range(views):
            pixels = np.full((8, 8, 4), (10 * i, 20 * view, 30, 255), np.uint8)
            pixels[:4, :, 3] = 0
            pixels[4, :, 3] = 51
            Image.fromarray(pixels).save(root / name / f"{view:03d}.png")
            np.save(root / name / f"{view:03d}.npy", pose(100 * i + view))
    if listed:
        (root / "valid_paths.json").write_text(json.dumps(names))
    return root


def test_views_are_on_white_with_their_poses(tmp_path):
    views = ObjaverseViews(write_objects(tmp_path, 3))
    found = views[2]
    assert found.uid == "uid002" and found.images.shape == (3, 3, 8, 8) and found.images.dtype == torch.uint8
    assert (found.images[:, :, :4] == 255).all()
    assert found.images[1, :, 7, 0].tolist() == [20, 20, 30]
    assert found.images[1, :, 4, 0].tolist() == pytest.approx([0.2 * c + 0.8 * 255 for c in (20, 20, 30)], abs=1)
    assert found.poses.dtype == torch.float64
    assert np.array_equal(found.poses[1].numpy(), pose(201))
    assert ObjaverseViews(tmp_path, size=16)[0].images.shape == (3, 3, 16, 16)


@pytest.mark.parametrize("count, held_out", [(3, 1), (100, 1), (101, 2)])
def test_the_last_percent_of_the_list_is_held_out(tmp_path, count, held_out):
    names = [f"uid{i:03d}" for i in range(count)]
    write_objects(tmp_path, 1, views=1)
    for name in names[1:]:
        shutil.copytree(tmp_path / names[0], tmp_path / name)
    (tmp_path / "valid_paths.json").write_text(json.dumps(names[::-1]))
    train, validation = ObjaverseViews(tmp_path, "train"), ObjaverseViews(tmp_path, "validation")
    assert [validation.uid(i) for i in range(len(validation))] == names[::-1][-held_out:]
    assert [train.uid(i) for i in range(len(train))] == names[::-1][:-held_out]
    assert len(ObjaverseViews(tmp_path, "val", min_validation=2)) == max(2, held_out)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
def test_real_renders_without_a_list():
    views = ObjaverseViews(REAL)
    assert len(views) == 12 and views.set_aside == []
    for i in (0, 5):
        found = views[i]
        assert found.images.shape == (12, 3, 256, 256) and found.poses.shape == (12, 3, 4)
        rotations = found.poses[..., :3]
        assert torch.allclose(rotations @ rotations.mT, torch.eye(3, dtype=torch.float64), atol=1e-6)
        assert (found.poses[:, 2, 3] < 0).all()
        assert (found.images[:, :, 0, 0] == 255).all()


def test_the_tiny_objects():
    views = ObjaverseViews(TINY, "train")
    assert len(views) > 1 and views.set_aside == [] and views[0].images.shape[1:] == (3, 64, 64)


def test_bad_views_cost_themselves(tmp_path):
    write_objects(tmp_path, 4)
    (tmp_path / "uid000" / "000.png").write_bytes(b"no picture")
    np.save(tmp_path / "uid000" / "001.npy", np.zeros((4, 4)))
    (tmp_path / "uid001" / "002.npy").unlink()
    np.save(tmp_path / "uid001" / "001.npy", np.full((3, 4), np.nan))
    (tmp_path / "uid001" / "000.npy").write_bytes(b"no array")
    shutil.rmtree(tmp_path / "uid002")
    views = ObjaverseViews(tmp_path)
    assert [views.uid(i) for i in range(len(views))] == ["uid000", "uid003"]
    assert len(views[0].images) == 1
    reasons = {aside.path: aside.reason for aside in views.set_aside}
    assert reasons["uid000/000.png"] == "not a picture" and "not a 3 x 4 pose" in reasons["uid000/001.png"]
    assert "no pose" in reasons["uid001/002.png"] and "NaN" in reasons["uid001/001.png"]
    assert "can't be read" in reasons["uid001/000.png"] and reasons["uid002"] == "no such folder"
    assert reasons["uid001"] == "no readable view"


def test_a_picture_that_is_cut_short_is_found_when_it_is_read(tmp_path):
    content = (write_objects(tmp_path, 1) / "uid000" / "001.png").read_bytes()
    (tmp_path / "uid000" / "001.png").write_bytes(content[: len(content) // 2])
    Image.new("RGB", (4, 4)).save(tmp_path / "uid000" / "002.png")
    views = ObjaverseViews(tmp_path)
    assert [len(views[0].images), len(views[0].images)] == [1, 1]
    assert [aside.path for aside in views.set_aside] == ["uid000/001.png", "uid000/002.png"]


def test_when_nothing_is_left_the_error_says_why(tmp_path):
    write_objects(tmp_path / "a", 1, views=1)
    (tmp_path / "a" / "uid000" / "000.npy").unlink()
    with pytest.raises(InputError, match=r"no object with views .* uid000/000.png: no pose 000.npy"):
        ObjaverseViews(tmp_path / "a")
    with pytest.raises(InputError, match="none left to train"):
        ObjaverseViews(write_objects(tmp_path / "b", 1), "train")
    with pytest.raises(InputError, match="no such folder"):
        ObjaverseViews(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="'test' was asked for"):
        ObjaverseViews(tmp_path / "b", "test")


@pytest.mark.parametrize("content, why", [("{", "not JSON"), ('{"a": 1}', "list of folder"), ('["../x"]', "outside")])
def test_a_list_that_is_none(tmp_path, content, why):
    (tmp_path / "valid_paths.json").write_text(content)
    with pytest.raises(InputError, match=why):
        ObjaverseViews(tmp_path)


@given(seed=st.integers(0, 10_000), views=st.integers(1, 5), reference=st.integers(0, 4))
def test_relative_poses_do_not_depend_on_the_worlds_frame(seed, views, reference):
    reference %= views
    poses = torch.from_numpy(np.stack([pose(seed + 7 * view) for view in range(views)]))
    world = torch.from_numpy(pose(seed + 1000))
    turned = poses[..., :3] @ world[:, :3]
    elsewhere = torch.cat([turned, (poses[..., :3] @ world[:, 3] + poses[..., 3])[..., None]], dim=-1)
    relative = relative_poses(poses, reference)
    assert relative.shape == (views, 12) and torch.allclose(relative, relative_poses(elsewhere, reference), atol=1e-9)
    identity = torch.eye(3, 4, dtype=torch.float64).flatten()
    assert torch.allclose(relative[reference], identity, atol=1e-9)
    # a point seen by the reference camera is seen by another one where its relative pose says
    point = torch.tensor([0.3, -0.2, 1.5], dtype=torch.float64)
    seen = poses[..., :3] @ point + poses[..., 3]
    moved = relative.view(views, 3, 4)
    assert torch.allclose(moved[..., :3] @ seen[reference] + moved[..., 3], seen, atol=1e-9)
