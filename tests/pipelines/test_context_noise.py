"""Context noise in sampling: what training with it has shown, for given and made images; nothing by default."""

from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from m2m.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Euler's scheduler uses NumPy as of version 1
STEPS, TIMESTEP = 3, 120
EXACT: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}


def noise(*shape: int, seed: int = 6) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(pipeline, seed: int, pictures=None, **given) -> torch.Tensor:
    given.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipeline(pictures, num_inference_steps=STEPS, output_type="latent", **given).images


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_given_and_made_images_are_read_noised_and_the_clean_stream_is_told(make_pipeline, pictures, sampler):
    """By hand: the scheduler's own noising, one draw for each image in its life, the noise's timestep told."""
    pipeline = make_pipeline("self")
    unet, schedule = pipeline.unet, pipeline.scheduler
    if sampler == "euler":  # whose own noising is on another scale
        pipeline.scheduler = EulerDiscreteScheduler.from_config(schedule.config)
    start, generator = noise(1, 3, 4, 8, 8), torch.Generator().manual_seed(7)
    found = sample(pipeline, 7, pictures(), num_images=3, latents=start, context_noise=TIMESTEP)

    def read(clean):
        drawn = torch.randn(clean.shape, generator=generator)
        noised = schedule.add_noise(clean, drawn, torch.tensor([TIMESTEP]))
        return unet.encode_context(noised, clean_timestep=TIMESTEP)

    context = read(pipeline.encode(pictures()[0])[None])
    for number in range(3):
        scheduler: Any = pipeline.scheduler
        scheduler.set_timesteps(STEPS)
        z = start[:, number] * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            noisy = scheduler.scale_model_input(z, t)
            null, given = unet.denoise(noisy, t), unet.denoise(noisy, t, context)
            z = scheduler.step(null + 7.5 * (given - null), t, z).prev_sample
        torch.testing.assert_close(found[:, number], z, **EXACT)
        if number < 2:
            context = context.append(read(found[:, number : number + 1]))


@torch.no_grad()
def test_sampling_reads_what_training_showed(make_pipeline):
    """One training pass over noised clean images, told their timesteps, against the context that sampling keeps."""
    unet = make_pipeline("self").unet
    noisy, clean, times = noise(2, 3, 4, 8, 8), noise(2, 2, 4, 8, 8, seed=1), torch.full((2, 3), 400)
    trained = unet(noisy, times, clean=clean, clean_timesteps=torch.full((2, 2), TIMESTEP))
    sampled = unet.denoise(noisy[:, 2], 400, unet.encode_context(clean, clean_timestep=TIMESTEP))
    torch.testing.assert_close(trained[:, 2], sampled, **EXACT)
    assert (sampled - unet.denoise(noisy[:, 2], 400, unet.encode_context(clean))).abs().max() > 1e-4


def test_a_set_s_noise_is_its_own(make_pipeline, pictures):
    pipeline = make_pipeline("self")
    sets = [pictures()[0, :count] for count in (2, 1)]

    def rollout(images, *seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(pipeline, 0, images, num_images=2, generator=generators, context_noise=TIMESTEP)

    together = rollout(sets, 8, 9)
    for number, seed in enumerate((8, 9)):
        torch.testing.assert_close(together[number], rollout(sets[number : number + 1], seed)[0], **EXACT)


def test_noise_is_drawn_once_also_where_nothing_is_kept(make_pipeline, pictures):
    given = {"num_images": 3, "context_noise": TIMESTEP}
    kept, anew = (sample(make_pipeline("self"), 4, pictures(), cache_context=keep, **given) for keep in (True, False))
    torch.testing.assert_close(kept, anew, **EXACT)


def test_none_is_none_and_draws_nothing(make_pipeline, pictures):
    pipeline, start = make_pipeline("self"), noise(1, 2, 4, 8, 8)
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    given = {"num_images": 2, "latents": start, "generator": generator}
    found = sample(pipeline, 0, pictures(), context_noise=0, **given)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(found, sample(pipeline, 0, pictures(), **given))
    assert (sample(pipeline, 0, pictures(), context_noise=TIMESTEP, **given) - found).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("variant", "own", "timestep", "match"),
    [
        ("dino", {}, 10, "DINO features have no timestep"),
        ("self", {"clean_timestep": None}, 10, "share the timestep of the noisy ones"),
        ("self", {}, 1000, "context_noise=1000: the noise schedule has timesteps 0 to 999"),
        ("self", {}, -1, "timesteps 0 to 999"),
    ],
)
def test_what_does_not_fit_is_refused(make_pipeline, pictures, variant, own, timestep, match):
    with pytest.raises(InputError, match=match):
        sample(make_pipeline(variant, **own), 0, pictures(), context_noise=timestep)
