"""What the measures promise, against formulas written out here."""

import functools
import math
import operator

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2m.errors import InputError
from m2m.evaluation import measures


def _gaussian(n: int, mean: torch.Tensor, root: torch.Tensor, seed: int) -> torch.Tensor:
    """Samples whose mean and covariance are exactly `mean` and `root @ root.T`."""
    drawn = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn -= drawn.mean(0)
    white = drawn @ torch.linalg.inv(torch.linalg.cholesky(drawn.T @ drawn / (n - 1))).T
    return white @ root.T + mean


def test_fid_of_gaussians_is_the_closed_form():
    # independent axes: |m1 - m2|^2 + sum of (s1 - s2)^2
    m1, m2 = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([0.5, 1.0, 1.0]).double()
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([1.5, 0.5, 0.5]).double()
    found = measures.frechet_distance(_gaussian(50, m1, s1.diag(), 0), _gaussian(70, m2, s2.diag(), 1))
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    assert found == pytest.approx(expected.item(), abs=1e-9)


def test_fid_of_correlated_gaussians_agrees_with_scipy():
    torch.manual_seed(0)
    a, b = torch.randn(2, 8, 8, dtype=torch.float64)
    found = measures.frechet_distance(
        _gaussian(100, torch.zeros(8).double(), a, 0), _gaussian(100, torch.ones(8).double(), b, 1)
    )
    first, second = (a @ a.T).numpy(), (b @ b.T).numpy()
    root = np.real(scipy.linalg.sqrtm(first @ second))
    assert found == pytest.approx(8 + np.trace(first + second - 2 * root), rel=1e-6)


def test_fid_of_a_thing_with_itself_is_zero_although_its_covariance_is_nearly_singular():
    drawn = np.random.default_rng(0)
    scales = torch.from_numpy(np.geomspace(1e-6, 30, 64))
    x = torch.from_numpy(drawn.normal(size=(200, 64))) * scales + 1
    assert measures.frechet_distance(x, x) <= 1e-6
    assert measures.frechet_distance(x, x.flip(0)) <= 1e-6


def test_fid_of_features_agrees_with_an_independent_reference():
    # Heusel et al.'s formula with NumPy's covariance and SciPy's matrix square root
    drawn = np.random.default_rng(1)
    x = drawn.normal(size=(400, 24)) @ drawn.normal(size=(24, 24)) + drawn.normal(size=24)
    y = np.abs(drawn.normal(size=(300, 24)))
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    apart = np.square(x.mean(0) - y.mean(0)).sum()
    expected = apart + np.trace(s1 + s2 - 2 * np.real(scipy.linalg.sqrtm(s1 @ s2)))
    found = measures.frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.lists(st.integers(1, 99), max_size=6))
def test_fid_is_invariant_to_order_batches_and_processes(seed, cuts):
    drawn = np.random.default_rng(seed)
    x, y = torch.from_numpy(drawn.normal(size=(100, 8))), torch.from_numpy(drawn.normal(1, 2, size=(90, 8)))
    whole = measures.frechet_distance(x, y)
    shuffled = x[torch.from_numpy(drawn.permutation(100))]
    parts = torch.tensor_split(shuffled, sorted(cuts))
    moments = [measures.Moments.of(part) for part in parts if len(part)]
    # as processes would: some parts first, their sums then
    total = functools.reduce(
        operator.add, [functools.reduce(operator.add, moments[i::2]) for i in (0, 1) if moments[i::2]]
    )
    assert total.count == 100
    assert measures.frechet_distance(total, y) == pytest.approx(whole, rel=1e-9)


def test_inception_score_is_the_formula_in_any_order():
    logits = np.random.default_rng(2).normal(0, 3, size=(200, 17))
    p = scipy.special.softmax(logits, 1)
    expected = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    shuffled = torch.from_numpy(np.random.default_rng(3).permutation(logits))
    assert measures.inception_score(torch.from_numpy(logits)) == pytest.approx(expected, rel=1e-6)
    assert measures.inception_score(shuffled) == pytest.approx(
        measures.inception_score(torch.from_numpy(logits)), rel=1e-9
    )


@pytest.mark.parametrize("score", ["frechet_distance", "clip_scores"])
def test_features_that_are_not_finite_are_refused(score):
    good = torch.randn(40, 8)
    bad = good.clone()
    bad[7, 3] = float("nan")
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(InputError, match=r"1 of 40 pictures .* not finite \(the first: 7\)"):
            getattr(measures, score)(*pair)
    with pytest.raises(InputError, match="logits that are not finite"):
        measures.inception_score(bad)


def test_features_of_different_backbones_are_not_compared():
    with pytest.raises(InputError, match="8 and of 6 features"):
        measures.frechet_distance(torch.randn(40, 8), torch.randn(40, 6))


def test_fid_asks_for_more_samples_than_features():
    with pytest.raises(InputError, match="32 samples, 32 features"):
        measures.frechet_distance(torch.randn(32, 32), torch.randn(40, 32))


def test_inception_score_counts_equally_frequent_certain_classes():
    logits = torch.full((30, 5), -100.0)
    logits[torch.arange(30), torch.arange(30) % 5] = 100.0
    assert measures.inception_score(logits) == pytest.approx(5, rel=1e-6)
    assert measures.inception_score(torch.zeros(30, 5)) == pytest.approx(1)


def test_inception_score_is_the_same_on_each_call_and_leaves_the_generator_alone():
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = measures.inception_score(logits, splits=4, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert measures.inception_score(logits, splits=4, seed=3) == first


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16))
def test_clip_scores_are_a_hundred_times_the_cosine(seed):
    a, b = np.random.default_rng(seed).normal(size=(2, 5, 7))
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b)]
    found = measures.clip_scores(torch.from_numpy(a), torch.from_numpy(b))
    assert found.tolist() == pytest.approx([100 * cosine for cosine in cosines], abs=1e-10)


def test_psnr_and_ssim_of_known_pictures():
    truth = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    off = truth + 51  # a fifth of the range
    assert measures.psnr(off, truth).tolist() == pytest.approx([20 * math.log10(5)] * 2, rel=1e-4)
    assert measures.psnr(truth, truth).tolist() == [100, 100]
    assert measures.ssim(truth, truth).tolist() == pytest.approx([1, 1])
    assert measures.rmse(off, truth).tolist() == pytest.approx([0.2, 0.2])


def test_style_does_not_see_where_things_are():
    torch.manual_seed(0)
    tokens = torch.randn(1, 16, 6)
    moved = tokens[:, torch.randperm(16)]
    other = torch.randn(1, 16, 6)
    style = measures.style_distance
    assert style(measures.gram(tokens), measures.gram(moved)).item() == pytest.approx(0, abs=1e-10)
    assert style(measures.gram(tokens), measures.gram(other)).item() > 1e-3


def test_blur_is_less_sharp_grey_is_less_saturated_and_fog_has_less_contrast():
    picture = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(picture.float(), 3, 1, 1).to(torch.uint8)
    grey = picture.float().mean(1, keepdim=True).expand_as(picture).to(torch.uint8)
    fog = (picture // 2) + 64
    plain = measures.appearance(picture)
    assert measures.appearance(blurred)["sharpness"] < 0.6 * plain["sharpness"]
    assert measures.appearance(grey)["saturation"].item() == pytest.approx(0, abs=0.02)
    assert measures.appearance(fog)["contrast"].item() == pytest.approx(plain["contrast"].item() / 2, rel=0.05)


def test_mean_and_deviation_are_numpys():
    assert measures.mean_and_deviation([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
    assert measures.mean_and_deviation([3.0]) == (3.0, 0.0)
