"""What a training step computes: floating-point operations of the model, counted and not estimated.

Belongs here: counting. Not here: how long it took (`run_log`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from m2m.models.saved import config_keys
from m2m.models.unet import ManyToManyUNet


def training_flops(unet: ManyToManyUNet, shapes: Mapping[str, Sequence[int]]) -> int:
    """Operations of the U-Net's forward and backward pass over one set, a multiplication and an addition being two.

    What gradient checkpointing computes a second time does not count, nor what encodes pictures: so divided by the
    device's peak it is the model's utilisation (MFU; PaLM, arXiv:2204.02311, appendix B). Run on the meta device: no
    memory, no arithmetic.

    Args:
        shapes: of one set: `latents` (N, C, h, w), and `features` (N - 1, S, D), `condition` (N, P) where there are.
    """
    settings = {key: value for key, value in unet.config.items() if key in config_keys(type(unet))}
    frozen = {name.replace(".base_layer", "") for name, weight in unet.named_parameters() if not weight.requires_grad}
    with torch.device("meta"):
        model = type(unet)(**settings)
        for name, weight in model.named_parameters():
            weight.requires_grad_(name not in frozen)
        given = {name: torch.empty(1, *shape) for name, shape in shapes.items()}
        noisy = given.pop("latents").requires_grad_()  # through the whole network, also where its weights are frozen
        times = torch.zeros(1, noisy.shape[1], dtype=torch.long)
        clean = noisy.detach() if unet.variant == "self" else None
        with FlopCounterMode(display=False) as counter:
            model.training_forward(noisy, times, clean=clean, **given).sum().backward()
    return counter.get_total_flops()
