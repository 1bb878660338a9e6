"""Any of diffusers' samplers for the noise schedule of training, started anew for every image; others are refused."""

import inspect
from typing import Any

import diffusers
import pytest
import torch

from m2m.errors import InputError
from m2m.pipelines.schedulers import named_scheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # some schedulers use NumPy as of version 1
SAMPLERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]


@pytest.mark.parametrize("name", SAMPLERS)
@torch.no_grad()
def test_a_sampler_is_diffusers_own_loop_for_every_image(make_pipeline, pictures, name):
    pipeline = make_pipeline("self")
    kind: Any = getattr(diffusers, name)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    config = pipeline.scheduler.config
    start = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    seen: list[int] = []
    found = pipeline(
        pictures(),
        2,
        latents=start,
        generator=torch.Generator().manual_seed(7),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
        callback_on_step_end=lambda _, step, *given: seen.append(step) or {},
    ).images
    unet, generator = pipeline.unet, torch.Generator().manual_seed(7)
    read = pipeline.encode(pictures()[0])[None]
    steps = 0
    for number in range(2):
        scheduler = kind.from_config(config)
        scheduler.set_timesteps(4)
        steps += len(scheduler.timesteps)
        own = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        z, context = start[:, number] * scheduler.init_noise_sigma, unet.encode_context(read)
        for t in scheduler.timesteps:
            noisy = scheduler.scale_model_input(z, t)
            null, given = unet.denoise(noisy, t), unet.denoise(noisy, t, context)
            z = scheduler.step(null + 3.0 * (given - null), t, z, **own).prev_sample
        scale = max(1.0, z.abs().max().item())
        torch.testing.assert_close(found[:, number] / scale, z / scale, atol=5e-5, rtol=1e-4)
        read = torch.cat([read, found[:, number : number + 1]], dim=1)
    assert seen == list(range(steps))  # Heun, KDPM2 and PNDM evaluate more often than they are asked to step


def test_a_set_s_noise_is_its_own_where_the_sampler_draws_some(make_pipeline, pictures):
    pipeline = make_pipeline("dino")
    pipeline.scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    sets = [pictures()[0, :count] for count in (2, 1)]

    def sample(images, *seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(images, 2, generator=generators, num_inference_steps=3, output_type="latent").images

    together = sample(sets, 8, 9)
    for number, seed in enumerate((8, 9)):
        torch.testing.assert_close(together[number], sample(sets[number : number + 1], seed)[0], atol=5e-5, rtol=1e-4)
    assert (together[0] - sample(sets[:1], 9)[0]).abs().max() > 1e-2


def test_named_samplers_follow_what_the_model_was_trained_with(make_pipeline):
    trained = make_pipeline("self").scheduler
    assert named_scheduler("ddim", trained) is trained
    sampler = named_scheduler("sde-dpmsolver++", trained)
    assert sampler.config.prediction_type == trained.config.prediction_type
    assert torch.equal(sampler.alphas_cumprod, trained.alphas_cumprod)
    sampler.set_timesteps(10)
    assert sampler.timesteps[0] == trained.config.num_train_timesteps - 1


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.EDMEulerScheduler(),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        diffusers.RePaintScheduler(),
    ],
)
def test_samplers_of_another_process_are_refused(make_pipeline, scheduler):
    pipeline = make_pipeline("self")
    pipeline.scheduler = scheduler
    with pytest.raises(InputError, match=f"{type(scheduler).__name__} .*DDIM, Euler, Heun"):
        pipeline(num_inference_steps=2)
