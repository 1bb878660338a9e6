"""Sets read back: what was stored, the frozen choice of images, features that belong to it."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from m2m.data import verified
from m2m.data.sets import (
    FEATURES,
    LATENTS,
    SCALES,
    FeaturesIndex,
    ImageSets,
    SetsIndex,
    SetTable,
    TrainingSets,
    chosen_images,
    write_index,
)
from m2m.data.shards import ShardPaths, ShardWriter, npy_bytes
from m2m.data.verified import shard_faults
from m2m.errors import ArtifactError, ConfigError
from m2m.generation.features import stored

IDS = [[3, 5, 8], [13, 21]]  # two shards
SPLIT = {3: "train", 5: "test", 8: "train", 13: "train", 21: "validation"}
IMAGES, TOKENS, WIDTH = 6, 2, 3


def value(caption_id: int, image: int) -> float:
    return caption_id * 10 + image


@pytest.fixture
def sets(tmp_path) -> Path:
    out = tmp_path / "sets"
    for number, ids in enumerate(IDS):
        with ShardWriter(out, number, "f") as writer:
            for i in ids:
                latents = np.stack([np.full((4, 2, 2), value(i, image), np.float16) for image in range(IMAGES)])
                said = json.dumps({"id": i, "caption": f"caption {i}", "split": SPLIT[i]}).encode()
                writer.add(f"{i:09d}", {LATENTS: npy_bytes(latents), "json": said})
    splits = SetTable.write(out, [(n, ids, [SPLIT[i] for i in ids]) for n, ids in enumerate(IDS)])
    shape = {"images_per_set": IMAGES, "image_size": 16, "latent_shape": (4, 2, 2), "pictures": None}
    write_index(out, SetsIndex(shards=2, sets_per_shard=3, splits=splits, **shape))
    return out


@pytest.fixture
def features(tmp_path) -> Path:
    """Of training sets 3 and 13: each token's first number names its caption and image. Set 8 failed."""
    out = tmp_path / "features"
    for number, ids in enumerate([[3], [13]]):
        with ShardWriter(out, number, "f") as writer:
            for i in ids:
                found = [torch.full((TOKENS, WIDTH), value(i, image)) for image in chosen_images(i, 7, IMAGES, 4)[:3]]
                writer.add(f"{i:09d}", stored(torch.stack(found), "fp16"))
    SetTable.write(out, [(0, [3], ["train"]), (1, [13], ["train"])])
    facts = {"images_per_set": 4, "choice_seed": 7, "tokens": TOKENS, "width": WIDTH, "storage": "fp16"}
    write_index(out, FeaturesIndex(shards=2, splits={"train": 2}, **facts))
    return out


def test_sets_are_found_by_split(sets):
    assert [ImageSets(sets, "train").caption_id(i) for i in range(3)] == [3, 8, 13]
    assert ImageSets(sets).caption(4) == "caption 21"
    train = ImageSets(sets, "train")
    assert train.latents(2).shape == (IMAGES, 4, 2, 2) and train.latents(2).dtype == torch.float32
    assert train.latents(1, [4, 0])[:, 0, 0, 0].tolist() == [value(8, 4), value(8, 0)]
    assert train.first_of_shards() == {0: 0, 1: 2}
    assert pickle.loads(pickle.dumps(train)).caption(0) == "caption 3"  # noqa: S301 (as a DataLoader's workers do)


def test_what_is_not_there_is_said(sets, tmp_path):
    with pytest.raises(ArtifactError, match=r"no sets in the dev split\. There are: "):
        ImageSets(sets, "dev")
    with pytest.raises(ArtifactError, match="store_images=png"):
        ImageSets(sets, "train").pictures(0, [0])
    with pytest.raises(ArtifactError, match="no whole generate-sets output"):
        ImageSets(tmp_path)


def test_training_reads_the_frozen_choice(sets):
    found = TrainingSets(sets, "train", 4, seed=7)
    for sample, caption in enumerate([3, 8, 13]):
        read = found[sample]
        assert read["sample"] == sample and "features" not in read
        assert read["latents"][:, 0, 0, 0].tolist() == [value(caption, i) for i in chosen_images(caption, 7, IMAGES, 4)]


def test_a_free_choice_changes_with_the_epoch_alone(sets):
    found = TrainingSets(sets, "train", 4, seed=7, frozen_choice=False)
    choices = []
    for epoch in (0, 1, 2, 0):
        found.set_epoch(epoch)
        choices.append([found.images(i) for i in range(len(found))])
    assert choices[0] == choices[3] and choices[0] != choices[1] != choices[2]


def test_features_are_those_of_the_context_images(sets, features):
    found = TrainingSets(sets, "train", 4, seed=7, features_folder=features)
    assert len(found) == 2  # without the set whose features failed
    for sample, caption in enumerate([3, 13]):
        read = found[sample]
        assert read["features"].shape == (3, TOKENS, WIDTH) and read["features"].dtype == torch.float32
        assert read["features"][:, 0, 0].tolist() == read["latents"][:-1, 0, 0, 0].tolist()
        assert read["latents"][0, 0, 0, 0].item() // 10 == caption
    fewer = TrainingSets(sets, "train", 2, seed=7, features_folder=features)[0]
    assert fewer["features"].shape == (1, TOKENS, WIDTH)
    assert fewer["features"][0, 0, 0] == fewer["latents"][0, 0, 0, 0]


@pytest.mark.parametrize(
    "asked, why",
    [
        ({"seed": 8}, "choice_seed 7 chooses; training asks for 8"),
        ({"images_per_set": 5}, "for 4 images a set; training asks for 5"),
        ({"frozen_choice": False}, "frozen_choice=false"),
    ],
)
def test_features_of_other_images_are_refused(sets, features, asked, why):
    settings = {"images_per_set": 4, "seed": 7} | asked
    with pytest.raises(ConfigError, match=why):
        TrainingSets(sets, "train", features_folder=features, **settings)


def test_features_of_another_split_and_sets_that_are_too_small(sets, features):
    with pytest.raises(ArtifactError, match="no features of the validation split"):
        TrainingSets(sets, "validation", 4, seed=7, features_folder=features)
    with pytest.raises(ConfigError, match="sets hold 6 images"):
        TrainingSets(sets, "train", 7, seed=7)


def test_int8_features_are_close(sets, tmp_path):
    drawn = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[None, :, None]
    files = stored(drawn, "int8")
    with ShardWriter(tmp_path / "int8", 0, "f") as writer:
        writer.add("000000003", files)
    SetTable.write(tmp_path / "int8", [(0, [3], ["train"])])
    facts = {"images_per_set": 4, "choice_seed": 7, "tokens": 5, "width": 64, "storage": "int8"}
    write_index(tmp_path / "int8", FeaturesIndex(shards=1, splits={"train": 1}, **facts))
    read = TrainingSets(sets, "train", 4, seed=7, features_folder=tmp_path / "int8")[0]["features"]
    step = drawn.abs().amax(-1, keepdim=True) / 127
    assert ((read - drawn).abs() <= step * 0.5001).all()
    assert len(files[FEATURES]) + len(files[SCALES]) < 0.6 * len(stored(drawn, "fp16")[FEATURES]) + 200


def test_training_refuses_a_damaged_shard_when_it_is_first_read(sets, monkeypatch):
    looked = []
    monkeypatch.setattr(
        verified, "shard_faults", lambda out, number: looked.append(number) or shard_faults(out, number)
    )
    for _ in range(2):
        found = TrainingSets(sets, "train", 4, seed=7)
        assert [found[i]["sample"] for i in range(3)] == [0, 1, 2]
    assert looked == [0, 1]  # once, whoever opens it
    tar = ShardPaths(sets, 1).tar
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    found = TrainingSets(sets, "train", 4, seed=7)
    assert found[0]["sample"] == 0
    with pytest.raises(ArtifactError, match=r"00001\.tar has other content.*shards repair"):
        found[2]
    assert looked == [0, 1, 1]


def test_a_loader_reads_with_workers(sets, features):
    found = TrainingSets(sets, "train", 4, seed=7, features_folder=features)
    alone = [found[i] for i in range(2)]
    loaded = list(torch.utils.data.DataLoader(found, batch_size=1, num_workers=2))
    for one, other in zip(alone, loaded):
        assert torch.equal(one["latents"], other["latents"][0]) and torch.equal(one["features"], other["features"][0])
