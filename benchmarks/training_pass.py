"""One training pass over the N images of a set against N separate predictions: is it the same noise?

Belongs here: exactness of the training pass. Not here: its time and memory (`training_attention`).
"""

import sys

import torch

from benchmarks.measuring import Machine, Report, relative
from benchmarks.models import small_images, small_unet
from m2m.models.unet import VARIANTS

_IMAGES = 5


@torch.no_grad()
def main() -> int:
    machine = Machine.asked_for(__doc__)
    report = Report("training_pass", machine)
    noisy = machine.random(2, _IMAGES, 4, 16, 16)
    timesteps = torch.randint(0, 1000, (2, _IMAGES), generator=torch.Generator().manual_seed(0)).to(machine.device)
    for variant in ("self", "dino"):
        unet, read = small_unet(variant, machine), small_images(variant, machine, 2, _IMAGES - 1)
        together = unet(noisy, timesteps, **{"clean" if variant == "self" else "features": read})
        alone = []
        for i in range(_IMAGES):
            context = unet.encode_context(read[:, :i]) if i else None
            alone.append(unet.denoise(noisy[:, i], timesteps[:, i], context))
        name = f"{VARIANTS[variant]}, {_IMAGES} images, relative difference"
        report.at_most(name, relative(together, torch.stack(alone, 1)), 5e-6, judged=machine.exact)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
