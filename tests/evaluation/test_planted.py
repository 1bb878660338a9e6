"""Planted models: every measure ranks them as it should, and the oracle meets the ideal observer's curve."""

from pathlib import Path

import pytest
import torch

from m2m.config import Compute
from m2m.evaluation.encoders import ClassifierBackbone, Clip, Dino, Reader
from m2m.evaluation.instruments import RANKS, Proof, Tools, prove
from m2m.evaluation.planted import PLANTED, PlantedSampler, WorldSets
from m2m.evaluation.preceding_images import PrecedingImages, _draw_trials, _reading_accuracy, agreement
from m2m.tiny.world import SIZE

ROOT = Path(__file__).parents[2]
WEIGHTS = "m2m/tiny/weights"
CPU = Compute(device="cpu", dtype="float32", threads=1)
PRIORS = {"shape": 0.9, "colour": 0.66, "count": 0.66, "background": 0.5, "texture": 0.3}


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(f"{WEIGHTS}/classifier", ROOT, CPU)


@pytest.fixture(scope="module")
def proof(reader) -> Proof:
    tools = Tools(
        Clip(f"{WEIGHTS}/clip", ROOT, CPU),
        Dino(f"{WEIGHTS}/dinov2", ROOT, CPU, "mean"),
        reader,
        ClassifierBackbone(f"{WEIGHTS}/classifier", ROOT, CPU),
    )
    return prove(WorldSets.drawn(16, 0, 0.5), tools, size=SIZE, preceding=4, num_images=6, seed=0)


@pytest.mark.parametrize("measure", RANKS)
def test_each_measure_ranks_planted_models_as_it_should(proof, measure):
    assert proof.failures(measure) == []


def test_a_measure_that_ranks_them_the_wrong_way_round_is_told(proof):
    swapped = {**proof.found, "oracle": proof.found["guesser"], "guesser": proof.found["oracle"]}
    assert any("oracle and guesser" in why for why in Proof(swapped, 16, 6).failures("DINO likeness"))


@pytest.fixture(scope="module")
def trials(small_world):
    config = PrecedingImages.model_validate({**small_world.settings, "trials": 150, "seed": 3})
    return _draw_trials(config, SIZE)


@pytest.fixture(scope="module")
def accuracy(trials, reader):
    return _reading_accuracy(lambda pictures: pictures, trials, reader)


def _continued(kind, trials, reader, count):
    made = PlantedSampler(kind, trials.sets, SIZE, first=4).continue_sets(trials.pictures[:, :count], trials.keys)
    return reader.read(made[:, 0])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_oracle_meets_the_ideal_observers_curve_within_its_noise(trials, reader, accuracy, count):
    found = agreement(trials, _continued("oracle", trials, reader, count), count, PRIORS, accuracy)
    for kind in ("agreement", "kept", "varying") if count > 1 else ("agreement", "kept"):
        values = torch.from_numpy(found[kind].values)
        error = values.std().item() / len(values) ** 0.5
        assert abs(values.mean().item() - found[kind].reach) < 3 * error + 0.005, kind


@pytest.mark.parametrize("count", [1, 4])
def test_copier_and_guesser_are_off_the_curve_on_opposite_sides(trials, reader, accuracy, count):
    def far(kind):
        told = agreement(trials, _continued(kind, trials, reader, count), count, PRIORS, accuracy)["agreement"]
        error = told.values.std(ddof=1) / len(told.values) ** 0.5
        return (told.values.mean() - told.reach) / max(error, 1e-9)

    assert far("guesser") < -4
    # after four equal images an attribute is nearly certain: only where one image cannot tell is a copy too sure
    assert far("copier") > (4 if count == 1 else 0)


def test_planted_pictures_depend_on_key_and_number_alone():
    sets = WorldSets([{"colour": "red"}, {"shape": "star"}, {}], 5)
    before = torch.randint(0, 256, (3, 2, 3, SIZE, SIZE), dtype=torch.uint8)
    for kind in PLANTED:
        whole = PlantedSampler(kind, sets, SIZE).continue_sets(before, [0, 1, 2], 3)
        alone = PlantedSampler(kind, sets, SIZE).continue_sets(before[1:2], [1], 1, first_image=2)
        assert whole.shape == (3, 3, 3, SIZE, SIZE) and whole.dtype == torch.uint8
        assert torch.equal(alone[0, 0], whole[1, 2])
