"""M2M-Self with each preceding image encoded once, against encoding all in every step: is it the same noise?

Belongs here: exactness of the context cache. Not here: what it saves (`step_time`).
"""

import sys

import torch
from diffusers import DDIMScheduler

from benchmarks.measuring import Machine, Report, relative
from benchmarks.models import joint_denoise, small_images, small_unet

_STEPS = 50


@torch.no_grad()
def main() -> int:
    machine = Machine.asked_for(__doc__)
    report = Report("cached_context", machine)
    unet, clean = small_unet("self", machine), small_images("self", machine, sets=1, images=4)
    start = machine.random(1, 4, 16, 16)
    context = unet.encode_context(clean)
    ends, first = [], []
    for cached in (True, False):
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
        scheduler.set_timesteps(_STEPS)
        latents = start
        for number, t in enumerate(scheduler.timesteps):
            noise = unet.denoise(latents, t, context) if cached else joint_denoise(unet, latents, t, clean)
            if number == 0:
                first.append(noise)
            latents = scheduler.step(noise, int(t), latents).prev_sample  # type: ignore[union-attr]
        ends.append(latents)
    report.at_most("one step, relative difference", relative(*first), 5e-6, judged=machine.exact)
    report.at_most(f"after {_STEPS} DDIM steps", relative(*ends), 1e-4, judged=machine.exact)
    nothing = unet.denoise(start, scheduler.timesteps[0])
    report.figure("(what the context changes of a step)", relative(nothing, first[1]))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
