"""The objective: Eq. 5 against its definition, and draws that depend on (seed, epoch, sample) alone."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from m2m.errors import InputError
from m2m.training.objective import Draws, Objective, SetLoss
from m2m.training.timesteps import TimestepSampling
from tests.training.toy import FEATURES, toy_unet

SHAPE = (3, 4, 8, 8)


@settings(max_examples=20, deadline=None)
@given(samples=st.lists(st.integers(0, 2**40), min_size=1, max_size=6), epoch=st.integers(0, 9))
def test_a_samples_draws_do_not_depend_on_its_batch(samples, epoch):
    objective = Objective(
        seed=1, context_dropout=0.5, condition_dropout=0.5, dropping="image", random_context=True, context_noise=99
    )
    together = objective.draw(samples, epoch, SHAPE)
    for place, sample in enumerate(samples):
        alone = objective.draw([sample], epoch, SHAPE)
        for all_of_it, own in zip(vars(together).values(), vars(alone).values()):
            assert torch.equal(all_of_it[place], own[0])


@pytest.mark.parametrize("change", [{"seed": 2}, {"purpose": "validation"}])
def test_other_seeds_epochs_and_purposes_draw_other_noise(change):
    objective = Objective(**{"seed": 1, **change})
    first = Objective(seed=1).draw([7], 0, SHAPE)
    assert not torch.equal(first.noise, objective.draw([7], 0, SHAPE).noise)
    assert not torch.equal(first.noise, Objective(seed=1).draw([7], 1, SHAPE).noise)


def test_dropout_rates_are_the_settings_and_independent():
    draws = _many(Objective(seed=0, context_dropout=0.1, condition_dropout=0.1))
    context, condition = ~draws.keep_context, ~draws.keep_condition
    assert context.float().mean() == pytest.approx(0.1, abs=0.015)
    assert condition.float().mean() == pytest.approx(0.1, abs=0.015)
    assert (context & condition).float().mean() == pytest.approx(0.01, abs=0.006)


def test_dropped_together_is_one_draw():
    draws = _many(Objective(seed=0, context_dropout=0.1, condition_dropout=0.1, drop_together=True))
    assert torch.equal(draws.keep_context, draws.keep_condition)
    assert (~draws.keep_context).any()


def test_no_dropout_keeps_everything():
    draws = _many(Objective(seed=0, context_dropout=0.0))
    assert draws.keep_context.all() and draws.keep_condition.all()


def test_timesteps_are_uniform_for_each_image_or_one_for_a_set():
    by_image = _many(Objective(seed=0)).timesteps
    assert by_image.min() >= 0 and by_image.max() <= 999
    assert by_image.float().mean() == pytest.approx(499.5, abs=10)
    assert (by_image[:, 0] != by_image[:, 1]).any()
    by_set = _many(Objective(seed=0, timesteps="set")).timesteps
    assert torch.equal(by_set[:, 0], by_set[:, 1])


def test_a_dropout_setting_leaves_the_other_draws_as_they_are():
    some, more = (Objective(seed=0, context_dropout=share).draw(range(20), 0, SHAPE) for share in (0.0, 0.9))
    assert torch.equal(some.timesteps, more.timesteps) and torch.equal(some.noise, more.noise)


@pytest.mark.parametrize(
    ("sampling", "cumulative"),
    [
        (TimestepSampling("shifted", shift=3.0), lambda share: share / (3 - 2 * share)),
        (
            TimestepSampling("logit_normal", mean=1.0, std=0.5),
            lambda share: 0.5 * (1 + math.erf((math.log(share / (1 - share)) - 1.0) / (0.5 * math.sqrt(2)))),
        ),
    ],
    ids=["shifted", "logit_normal"],
)
def test_timesteps_are_skewed_to_high_noise_as_the_formula_says(sampling, cumulative):
    """Against the distribution functions, solved by hand."""
    drawn = _many(Objective(seed=0, sampling=sampling)).timesteps.flatten()
    assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() <= 999
    assert drawn.float().mean() > 600
    for timestep in (200, 500, 800, 900):
        found = float((drawn < timestep).float().mean())
        assert found == pytest.approx(cumulative(timestep / 1000), abs=0.02), timestep


def test_a_switch_leaves_the_other_draws_as_they_are():
    plain = Objective(seed=0).draw(range(5), 0, SHAPE)
    switched = Objective(seed=0, dropping="image", random_context=True, context_noise=99).draw(range(5), 0, SHAPE)
    assert torch.equal(plain.noise, switched.noise) and torch.equal(plain.timesteps, switched.timesteps)
    assert plain.reads is None and plain.clean_noise is None and plain.clean_timesteps is None


def test_contexts_dropped_by_image_are_so_one_by_one():
    keep = _many(Objective(seed=0, context_dropout=0.3, dropping="image")).keep_context
    assert keep.shape == (4000, 2)
    first, second = ~keep[:, 0], ~keep[:, 1]
    assert second.float().mean() == pytest.approx(0.3, abs=0.03)
    assert (first & second).float().mean() == pytest.approx(0.09, abs=0.02)


def test_random_contexts_are_the_nearest_images_and_all_counts_are_as_frequent():
    draws = Objective(seed=0, random_context=True).draw(range(2000), 0, (5, 1, 1, 1))
    assert draws.reads is not None and draws.reads.shape == (2000, 5, 4)
    for image in range(5):
        read = draws.reads[:, image]
        assert not read[:, image:].any(), "no image reads itself or a later one"
        counts = read.sum(1)
        for place in range(image):  # the nearest ones: nothing left out between
            assert torch.equal(read[:, place], counts >= image - place)
        for count in range(1, image + 1):
            assert (counts == count).float().mean() == pytest.approx(1 / image, abs=0.05)


@pytest.mark.parametrize("variant", ["self", "dino"])
@torch.no_grad()
def test_a_random_context_is_what_a_window_of_its_size_shows(variant):
    unet, schedule = toy_unet(variant).eval(), DDPMScheduler()
    latents, features = torch.randn(2, 4, 4, 8, 8), torch.randn(2, 3, 5, FEATURES)
    given = {"features": features} if variant == "dino" else {}
    draws = Objective(seed=3, context_dropout=0.0, random_context=True).draw([0, 1], 0, latents.shape[1:])
    draws = replace(draws, keep_context=torch.tensor([True, False]))
    found = SetLoss(unet, schedule)(latents, draws, **given)
    assert draws.reads is not None
    counts = draws.reads.sum(2)
    assert (counts[0, 1:] < torch.tensor([1, 2, 3])).any(), "a draw that leaves something out"
    read = features if variant == "dino" else latents
    share = schedule.alphas_cumprod[draws.timesteps][..., None, None, None]
    noisy = share.sqrt() * latents + (1 - share).sqrt() * draws.noise
    for place in range(2):
        errors = []
        for image in range(4):
            count = int(counts[place, image]) if draws.keep_context[place] else 0
            context = unet.encode_context(read[place : place + 1, image - count : image]) if count else None
            predicted = unet.denoise(noisy[place, image][None], int(draws.timesteps[place, image]), context)[0]
            errors.append((predicted - draws.noise[place, image]).square().mean())
        assert float(found[place]) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


def test_context_noise_reaches_every_timestep_up_to_its_own():
    draws = Objective(seed=0, context_noise=3).draw(range(2000), 0, (4, 1, 1, 1))
    assert draws.clean_timesteps is not None and draws.clean_noise is not None
    assert draws.clean_noise.shape == (2000, 3, 1, 1, 1) and draws.clean_timesteps.shape == (2000, 3)
    for timestep in range(4):
        assert (draws.clean_timesteps == timestep).float().mean() == pytest.approx(0.25, abs=0.02)


@torch.no_grad()
def test_noised_context_is_read_with_its_own_timestep_and_targets_stay_clean():
    """Against M2M-Self models whose fixed clean timestep is that of the noise."""
    schedule, latents = DDPMScheduler(), torch.randn(1, 2, 4, 8, 8)
    draws = Objective(seed=3, context_dropout=0.0, context_noise=300).draw([5], 0, latents.shape[1:])
    assert draws.clean_timesteps is not None and draws.clean_noise is not None
    timestep = int(draws.clean_timesteps[0, 0])
    assert 0 < timestep <= 300
    found = SetLoss(toy_unet().eval(), schedule)(latents, draws)
    told = toy_unet(clean_timestep=timestep).eval()
    share = schedule.alphas_cumprod[timestep]
    context = share.sqrt() * latents[:, :1] + (1 - share).sqrt() * draws.clean_noise
    plain = replace(draws, clean_noise=None, clean_timesteps=None)
    assert torch.allclose(found, SetLoss(told, schedule)(latents, plain, context=context), rtol=1e-5)
    assert not torch.allclose(found, SetLoss(told, schedule)(latents, plain), rtol=1e-5)
    untouched = replace(draws, clean_timesteps=torch.zeros(1, 1, dtype=torch.long))
    assert torch.equal(*(SetLoss(toy_unet().eval(), schedule)(latents, one) for one in (untouched, plain)))


@pytest.mark.parametrize("variant", ["self", "dino"])
@torch.no_grad()
def test_the_loss_is_equation_5_over_single_autoregressive_predictions(variant):
    unet, schedule = toy_unet(variant).eval(), DDPMScheduler()
    latents = torch.randn(2, *SHAPE)
    features = torch.randn(2, 2, 5, FEATURES) if variant == "dino" else None
    draws = Objective(seed=4, context_dropout=0.0).draw([0, 1], 0, SHAPE)
    draws = Draws(draws.noise, draws.timesteps, torch.tensor([True, False]), draws.keep_condition)
    found = SetLoss(unet, schedule)(latents, draws, features=features)
    alphas = schedule.alphas_cumprod
    for place in range(2):
        errors = []
        for image in range(3):
            t = int(draws.timesteps[place, image])
            noise = draws.noise[place, image]
            noisy = alphas[t].sqrt() * latents[place, image] + (1 - alphas[t]).sqrt() * noise
            context = None
            if image and draws.keep_context[place]:
                read = latents if features is None else features
                context = unet.encode_context(read[place : place + 1, :image])
            errors.append((unet.denoise(noisy[None], t, context)[0] - noise).square().mean())
        assert float(found[place]) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


@torch.no_grad()
def test_velocity_weights_make_the_loss_that_of_the_velocity():
    schedule = DDPMScheduler()
    latents, unet = torch.randn(2, *SHAPE), toy_unet().eval()
    draws = Objective(seed=4).draw([0, 1], 0, SHAPE)
    found = SetLoss(unet, schedule)(latents, draws, weighting="velocity")
    share = schedule.alphas_cumprod[draws.timesteps][..., None, None, None]
    noisy = share.sqrt() * latents + (1 - share).sqrt() * draws.noise
    noise = unet.training_forward(noisy, draws.timesteps, clean=latents[:, :-1], keep_context=draws.keep_context)
    image = (noisy - (1 - share).sqrt() * noise) / share.sqrt()
    predicted, true = (
        share.sqrt() * of_noise - (1 - share).sqrt() * of_image
        for of_noise, of_image in ((noise, image), (draws.noise, latents))
    )
    assert torch.allclose(found, (predicted - true).square().mean((1, 2, 3, 4)), rtol=1e-3)
    steady = Objective(seed=4, weighting="velocity").steady("validation")
    assert steady == Objective(seed=4).steady("validation"), "held-out losses of all trainings compare"


@torch.no_grad()
def test_padding_at_the_end_of_a_set_counts_for_nothing():
    loss = SetLoss(toy_unet().eval(), DDPMScheduler())
    latents = torch.randn(2, *SHAPE)
    draws = Objective(seed=4).draw([0, 1], 0, SHAPE)
    padded = loss(latents, draws, counts=torch.tensor([2, 3]))
    latents[0, 2] = 50.0
    assert torch.allclose(padded, loss(latents, draws, counts=torch.tensor([2, 3])))
    short = replace(draws, noise=draws.noise[:, :2], timesteps=draws.timesteps[:, :2])
    assert torch.allclose(padded[0], loss(latents[:, :2], short)[0], rtol=1e-4)


@pytest.mark.parametrize("weighting", ["noise", "velocity"])
@torch.no_grad()
def test_what_a_model_predicts_changes_nothing_of_what_is_counted(weighting):
    """A model of the velocity that knows what a model of the noise knows has the same loss."""
    unet, latents = toy_unet().eval(), torch.randn(2, *SHAPE)
    draws = Objective(seed=4).draw([0, 1], 0, SHAPE)
    share = DDPMScheduler().alphas_cumprod[draws.timesteps][..., None, None, None]
    of_noise = unet.training_forward

    def of_velocity(noisy, *given, **more):
        noise = of_noise(noisy, *given, **more)
        return share.sqrt() * noise - (1 - share).sqrt() * (noisy - (1 - share).sqrt() * noise) / share.sqrt()

    found = SetLoss(unet, DDPMScheduler())(latents, draws, weighting=weighting)
    unet.training_forward = of_velocity
    schedule = DDPMScheduler(prediction_type="v_prediction")
    assert torch.allclose(SetLoss(unet, schedule)(latents, draws, weighting=weighting), found, rtol=1e-3)


def test_a_model_that_predicts_neither_noise_nor_velocity_is_refused():
    with pytest.raises(InputError, match="prediction_type epsilon or v_prediction"):
        SetLoss(toy_unet(), DDPMScheduler(prediction_type="sample"))


def _many(objective: Objective) -> Draws:
    return objective.draw(range(4000), 0, (2, 1, 1, 1))
