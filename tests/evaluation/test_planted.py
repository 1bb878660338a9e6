"""Planted models: every measure ranks them as it should, and the oracle meets the ideal observer's curve."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from m2m.config import Compute
from m2m.data.objaverse import ObjaverseViews
from m2m.data.vgsi import Procedures
from m2m.evaluation.agreement import agreement, draw_trials, reading_accuracy
from m2m.evaluation.encoders import ClassifierBackbone, Clip, Dino, Reader
from m2m.evaluation.instruments import RANKS, Tools, prove
from m2m.evaluation.lpips import Lpips, learnt_heads
from m2m.evaluation.planted import PLANTED, PlantedSampler, WorldSets
from m2m.evaluation.planted_steps import prove_steps
from m2m.evaluation.planted_views import prove_views
from m2m.evaluation.proofs import Proof
from m2m.evaluation.steps import StepMeasures
from m2m.evaluation.views import AMONG, ViewMeasures
from m2m.tiny.world import SIZE

ROOT = Path(__file__).parents[2]
WEIGHTS = "m2m/tiny/weights"
CPU = Compute(device="cpu", dtype="float32", threads=1)
SEEDS = (0, 1, 2)
PRIORS = {"shape": 0.9, "colour": 0.66, "count": 0.66, "background": 0.5, "texture": 0.3}


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(f"{WEIGHTS}/classifier", ROOT, CPU)


@pytest.fixture(scope="module")
def tools(reader) -> Tools:
    return Tools(
        Clip(f"{WEIGHTS}/clip", ROOT, CPU),
        Dino(f"{WEIGHTS}/dinov2", ROOT, CPU, "mean"),
        reader,
        ClassifierBackbone(f"{WEIGHTS}/classifier", ROOT, CPU),
    )


@pytest.fixture(scope="module", params=SEEDS, ids="seed {}".format)
def proof(request, tools) -> Proof:
    seed = request.param
    return prove(WorldSets.drawn(24, seed, 0.5), tools, size=SIZE, preceding=4, num_images=6, seed=seed)


@pytest.mark.parametrize("measure", RANKS)
def test_each_measure_ranks_planted_models_as_it_should(proof, measure):
    assert proof.failures(measure) == []


def test_a_measure_that_ranks_them_the_wrong_way_round_is_told(proof):
    swapped = {**proof.found, "oracle": proof.found["guesser"], "guesser": proof.found["oracle"]}
    told = replace(proof, found=swapped)
    assert any("oracle and guesser" in why for why in told.failures("DINO likeness"))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_measure_of_views_ranks_planted_models_as_it_should(tools, alexnet_weights, seed):
    objects = ObjaverseViews(ROOT / "m2m/tiny/data/objaverse", size=SIZE)
    chosen = np.random.default_rng(seed).permutation(len(objects))[:14]
    measures = ViewMeasures(tools.dino, Lpips(alexnet_weights(seed), learnt_heads(), CPU))
    found = prove_views([objects[int(i)] for i in chosen], measures, 4)
    assert list(found.ranks) == ["PSNR, dB", "SSIM", "LPIPS", "DINO likeness", AMONG, "change of PSNR with n"]
    assert {name: found.failures(name) for name in found.ranks} == {name: [] for name in found.ranks}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_measure_of_steps_ranks_planted_models_and_order_matters_to_the_one_that_follows_it(tools, seed):
    procedures, drawn = Procedures(ROOT / "m2m/tiny/data/vgsi", "train"), np.random.default_rng(seed)
    long = [i for i in range(len(procedures)) if len(procedures[i].step_ids) > 2]
    steps = [procedures.images(i, SIZE) for i in drawn.choice(long, 16, replace=False).tolist()]
    orders = [list(range(min(4, len(one) - 1)))[::-1] for one in steps]
    found = prove_steps(steps, orders, StepMeasures(tools.dino, tools.clip), 5)
    assert {name: found.failures(name) for name in found.ranks} == {name: [] for name in found.ranks}
    lost = found.found["oracle"]["lost out of order: PSNR, dB"]
    assert (lost.values == 0).all()


@pytest.fixture(scope="module", params=SEEDS, ids="seed {}".format)
def trials(request):
    return draw_trials(150, 4, 3 + request.param, SIZE)


@pytest.fixture(scope="module")
def accuracy(trials, reader):
    return reading_accuracy(lambda pictures: pictures, trials, reader)


def _continued(kind, trials, reader, count):
    made = PlantedSampler(kind, trials.sets, SIZE, first=4).continue_sets(trials.pictures[:, :count], trials.keys)
    return reader.read(made[:, 0])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_oracle_meets_the_ideal_observers_curve_within_its_noise(trials, reader, accuracy, count):
    found = agreement(trials, _continued("oracle", trials, reader, count), count, PRIORS, accuracy)
    for kind in ("agreement", "kept", "varying") if count > 1 else ("agreement", "kept"):
        # what is kept everywhere has no noise but the reader's
        assert abs(found[kind].off) < 3 or abs(found[kind].values.mean() - found[kind].reach) < 0.005, kind


@pytest.mark.parametrize("count", [1, 4])
def test_copier_and_guesser_are_off_the_curve_on_opposite_sides(trials, reader, accuracy, count):
    def far(kind):
        return agreement(trials, _continued(kind, trials, reader, count), count, PRIORS, accuracy)["agreement"].off

    assert far("guesser") < -4
    # after four equal images an attribute is nearly certain: only where one image cannot tell is a copy too sure
    assert far("copier") > (4 if count == 1 else 0)


def test_where_nothing_precedes_nobody_can_know(trials, reader, accuracy):
    for kind in PLANTED[:3]:
        found = agreement(trials, _continued(kind, trials, reader, 0), 0, PRIORS, accuracy)
        assert set(found) == {"agreement", "kept"} and abs(found["agreement"].off) < 4, kind
        assert found["kept"].values.mean() < 0.4


def test_what_is_kept_is_the_mean_over_the_attributes(trials, reader, accuracy):
    kept = agreement(trials, _continued("drifter", trials, reader, 2), 2, PRIORS, accuracy)["kept"]
    assert list(kept.by_attribute) == list(PRIORS)
    assert np.mean(list(kept.by_attribute.values())) == pytest.approx(kept.values.mean())


def test_sketches_are_of_the_same_attributes_and_read_as_such(reader):
    drawn, sketched = (draw_trials(60, 2, 0, SIZE, renderer) for renderer in ("world", "sketch"))
    assert drawn.sets is not None and sketched.sets is not None
    assert not torch.equal(drawn.pictures, sketched.pictures)
    # the classifier never saw one: what it misreads is corrected for, and so must be little
    assert min(reading_accuracy(lambda pictures: pictures, sketched, reader).values()) > 0.75
    first, second = (
        PlantedSampler("oracle", sets, SIZE, 2).continue_sets(drawn.pictures, drawn.keys)
        for sets in (drawn.sets, sketched.sets)
    )
    assert not torch.equal(first, second)


def test_planted_pictures_depend_on_key_and_number_alone():
    sets = WorldSets([{"colour": "red"}, {"shape": "star"}, {}], 5)
    before = torch.randint(0, 256, (3, 2, 3, SIZE, SIZE), dtype=torch.uint8)
    for kind in PLANTED:
        whole = PlantedSampler(kind, sets, SIZE).continue_sets(before, [0, 1, 2], 3)
        alone = PlantedSampler(kind, sets, SIZE).continue_sets(before[1:2], [1], 1, first_image=2)
        assert whole.shape == (3, 3, 3, SIZE, SIZE) and whole.dtype == torch.uint8
        assert torch.equal(alone[0, 0], whole[1, 2])
