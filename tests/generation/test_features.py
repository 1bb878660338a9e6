"""Features: of the right images, from pictures or from latents, the same however they are asked for."""

from pathlib import Path

import pytest
import torch
from transformers import BitImageProcessor, Dinov2Model

from m2m.artifacts import read_summary
from m2m.config import Compute, load_profile
from m2m.data.sets import ImageSets, TrainingSets
from m2m.data.verified import shard_faults
from m2m.errors import CheckFailed, ConfigError, InputError
from m2m.generation.features import IMAGENET_MEAN, IMAGENET_STD, CacheFeatures, DinoEncoder, SetEncoder, dino_preprocess
from m2m.progress import Progress
from m2m.stage_run import run_stage
from m2m.stages import STAGES

QUIET = Progress(quiet=True)
ONE_THREAD = Compute(threads=1)


def run(profile_path: Path, **kwargs):
    profile = load_profile(profile_path)
    for key in ("filter-captions", "generate-sets"):
        run_stage(STAGES[key], profile, progress=QUIET)
    return run_stage(STAGES["cache-features"], profile, progress=QUIET, **kwargs)


def pictures(size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_preprocessing_is_that_of_the_whole_picture():
    drawn = pictures() // 2 + 64  # PIL cuts overshoots off between its two passes: none here
    settings = {"size": {"height": 14, "width": 14}, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    processor = BitImageProcessor(do_center_crop=False, resample=3, **settings)
    expected = processor(list(drawn.numpy()), return_tensors="pt")["pixel_values"]
    made = dino_preprocess(drawn, 14)
    assert made.shape == (3, 3, 14, 14)
    assert (made - expected).abs().max() < 0.04  # PIL rounds to whole levels after each pass
    assert torch.allclose(made, dino_preprocess(drawn / 255, 14), atol=1e-5)
    borders = drawn.clone()
    borders[:, :, 0] = 255 - borders[:, :, 0]
    assert not torch.equal(dino_preprocess(borders, 14), made)


def test_the_encoder_gives_all_last_hidden_states(dinov2):
    encoder = DinoEncoder(dinov2, ONE_THREAD)
    model = Dinov2Model.from_pretrained(dinov2).eval()
    assert (encoder.tokens, encoder.width) == (5, 8)
    with torch.no_grad():
        expected = model(pixel_values=dino_preprocess(pictures(), 14)).last_hidden_state
    assert torch.allclose(encoder.encode(pictures()), expected, atol=1e-6)
    larger = DinoEncoder(model, ONE_THREAD, feature_size=28)
    assert larger.encode(pictures()).shape == (3, larger.tokens, 8) == (3, 17, 8)


def test_features_are_those_of_the_first_chosen_images(make_profile, dinov2):
    path = make_profile(store_images="png", features={"choice_seed": 5, "splits": ["train", "test"]})
    outcome = run(path)
    assert outcome.manifest and outcome.manifest.counts["failed"] == 0
    assert all(shard_faults(outcome.folder, number) == [] for number in (0, 1))
    folder = load_profile(path).outputs / "generate-sets"
    encoder = DinoEncoder(dinov2, ONE_THREAD)
    for split in ("train", "test"):
        found, sets = TrainingSets(folder, split, 3, 5, outcome.folder), ImageSets(folder, split)
        assert len(found) == len(sets) >= 1
        for sample in range(len(found)):
            expected = encoder.encode(sets.pictures(sample, found.images(sample)[:-1]))
            assert torch.allclose(found[sample]["features"], expected, atol=2e-3)


def test_latents_are_decoded_where_there_are_no_pictures(make_profile, tmp_path, monkeypatch):
    with_pictures = run(make_profile(store_images="png"))
    one = TrainingSets(with_pictures.folder.parent / "generate-sets", "train", 3, 0, with_pictures.folder)
    monkeypatch.setenv("M2M_OUTPUTS", str(tmp_path / "latents"))
    without = run(make_profile())
    other = TrainingSets(without.folder.parent / "generate-sets", "train", 3, 0, without.folder)
    assert len(one) == len(other)
    for sample in range(len(one)):
        assert torch.allclose(one[sample]["features"], other[sample]["features"], atol=2e-3)
    with pytest.raises(InputError, match="give cache-features text_to_image"):
        run(make_profile(features={"text_to_image": None}))


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_shards_are_made_one_by_one_and_alike(make_profile, tmp_path, monkeypatch):
    path = make_profile(store_images="png", features={"storage": "int8"})
    whole = tree(run(path).folder)
    monkeypatch.setenv("M2M_OUTPUTS", str(tmp_path / "again"))
    assert run(path, shards=[1]).manifest is None
    finished = run(path, shards=[0]).folder
    assert tree(finished) == whole
    # at most half a step of 1/127 of a token's largest value, which is no more than 3 times their root mean square here
    assert 0 < read_summary(finished).figures["int8_relative_error"] < 3 / 127 / 2  # type: ignore[operator]


def test_sets_that_failed_are_tried_again_in_the_same_batches(make_profile, tmp_path, monkeypatch):
    captions = [f"caption {i}" for i in range(8)]
    path = make_profile(captions, sets_per_shard=4, features={"sets_per_batch": 2, "max_failed": 0})
    whole = tree(run(path).folder)
    monkeypatch.setenv("M2M_OUTPUTS", str(tmp_path / "again"))
    encode, batches = SetEncoder.encode, []

    def stumbling(self, shard, positions):
        batches.append((shard, tuple(positions)))
        if len(batches) == 1:
            raise RuntimeError("no kernel image\nfor this")
        ids, features = encode(self, shard, positions)
        if len(batches) == 3:
            features[0] = float("nan")
        return ids, features

    monkeypatch.setattr(SetEncoder, "encode", stumbling)
    with pytest.raises(CheckFailed, match=r"3 of \d sets failed, for example \d+: RuntimeError: no kernel image for"):
        run(path)
    made = len(batches)
    assert tree(run(path).folder) == whole
    assert batches[made:] == [batches[0], batches[2]]

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SetEncoder, "encode", full)
    monkeypatch.setenv("M2M_OUTPUTS", str(tmp_path / "full"))
    with pytest.raises(ConfigError, match=r"2 sets do not fit the device's memory.*sets_per_batch"):
        run(path)


def test_features_of_the_first_training_sets_alone(make_profile):
    captions = ["a", "b", "c", "d", "e", "f"]
    outcome = run(make_profile(captions, shards=3, store_images="png", features={"sets": 2}))
    sets = ImageSets(outcome.folder.parent / "generate-sets", "train")
    found = TrainingSets(outcome.folder.parent / "generate-sets", "train", 3, 0, outcome.folder)
    assert len(sets) > len(found) == 2
    assert [found[i]["latents"].tolist() for i in (0, 1)] == [sets.latents(i, found.images(i)).tolist() for i in (0, 1)]


def test_what_does_not_fit_is_refused(make_profile, tmp_path):
    with pytest.raises(InputError, match=r"images_per_set is 4; sets hold 3 images"):
        run(make_profile(features={"images_per_set": 4}))


def test_the_preview_says_the_sizes(make_profile, tmp_path):
    config = load_profile(make_profile()).stage_config(CacheFeatures, "cache-features")
    assert "5 tokens of width 8: 0 kB a set" in config.preview(tmp_path, None)[0]
    lost = load_profile(make_profile(features={"dino": "./nowhere"})).stage_config(CacheFeatures, "cache-features")
    with pytest.raises(InputError, match="nowhere"):
        lost.preview(tmp_path, None)
