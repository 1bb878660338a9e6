"""Contexts kept in int8 against half precision: memory, and how much a prediction changes.

Belongs here: memory and error of the int8 cache. Not here: the cache (`m2m.models.int8_context`).
"""

import sys

import torch

from benchmarks.measuring import Machine, Report, relative
from benchmarks.models import small_images, small_unet
from m2m.models.int8_context import Int8Context
from m2m.models.unet import VARIANTS

_SCALE = 7.5


@torch.no_grad()
def main() -> int:
    machine = Machine.asked_for(__doc__)
    report = Report("int8_context", machine)
    noisy = machine.random(2, 4, 16, 16)
    for variant in ("self", "dino"):
        unet = small_unet(variant, machine)
        context = unet.encode_context(small_images(variant, machine, 2, 4))
        rounded = Int8Context.of(context)
        numbers = sum(tensor.numel() for tensor in context.keys + context.values)
        name = VARIANTS[variant]
        report.at_most(f"{name}: memory over float16, scales included", rounded.bytes / (2 * numbers), 0.55)
        worst = {"prediction": 0.0, "guided": 0.0}
        for timestep in (20, 260, 500, 740, 980):
            null, exact, found = (unet.denoise(noisy, timestep, read).float() for read in (None, context, rounded))
            worst["prediction"] = max(worst["prediction"], relative(found, exact))
            guided = [null + _SCALE * (given - null) for given in (found, exact)]
            worst["guided"] = max(worst["guided"], relative(*guided))
        report.at_most(f"{name}: change of a prediction, worst of 5 timesteps", worst["prediction"], 1e-2)
        report.figure(f"{name}: the same with guidance {_SCALE}", worst["guided"])
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
