"""The objective: Eq. 5 against its definition, and draws that depend on (seed, epoch, sample) alone."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from m2m.errors import InputError
from m2m.training.objective import Draws, Objective, SetLoss
from tests.training.toy import FEATURES, toy_unet

SHAPE = (3, 4, 8, 8)


@settings(max_examples=20, deadline=None)
@given(samples=st.lists(st.integers(0, 2**40), min_size=1, max_size=6), epoch=st.integers(0, 9))
def test_a_samples_draws_do_not_depend_on_its_batch(samples, epoch):
    objective = Objective(seed=1, context_dropout=0.5, condition_dropout=0.5)
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
def test_padding_at_the_end_of_a_set_counts_for_nothing():
    loss = SetLoss(toy_unet().eval(), DDPMScheduler())
    latents = torch.randn(2, *SHAPE)
    draws = Objective(seed=4).draw([0, 1], 0, SHAPE)
    padded = loss(latents, draws, counts=torch.tensor([2, 3]))
    latents[0, 2] = 50.0
    assert torch.allclose(padded, loss(latents, draws, counts=torch.tensor([2, 3])))
    short = Draws(*(value[:, :2] if value.ndim > 1 else value for value in vars(draws).values()))
    assert torch.allclose(padded[0], loss(latents[:, :2], short)[0], rtol=1e-4)


def test_a_model_that_does_not_predict_noise_is_refused():
    with pytest.raises(InputError, match="prediction_type epsilon"):
        SetLoss(toy_unet(), DDPMScheduler(prediction_type="v_prediction"))


def _many(objective: Objective) -> Draws:
    return objective.draw(range(4000), 0, (2, 1, 1, 1))
