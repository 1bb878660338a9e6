# pyright: reportIndexIssue=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# (diffusers types the parts of its blocks loosely)
"""The autoencoder: an `AutoencoderKL` that shrinks 64x64 pictures eightfold to 8x8 latents of 16 channels.

Belongs here: its configuration and its training. Not here: the pipeline folder it is shipped in (m2m.tiny.export).
"""

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from m2m.tiny.classifier import Classifier, load_training
from m2m.tiny.training import Bank, bank, load_checkpoint, train

NAME = "autoencoder"


def build_autoencoder() -> AutoencoderKL:
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        norm_num_groups=1,  # more groups than this take the absolute colours out of so few channels
        latent_channels=16,
        sample_size=64,
    )
    # Begin with a narrow posterior: at its default width of one, noise drowns the latents, and training stalls in grey.
    nn.init.constant_(model.quant_conv.bias[16:], -6.0)
    return start_with_mean_colours(model)


@torch.no_grad()
def start_with_mean_colours(model: AutoencoderKL) -> AutoencoderKL:
    """Initialise so that the first reconstructions are 8x8 mosaics of mean colours; from noise, colours come last.

    Six channels of both residual streams carry red, green, blue and their negatives untouched, because
    `SiLU(x) - SiLU(-x) = x` takes colours through the nonlinearity before each half's last convolution.
    """
    carried = 6

    def pass_on(conv: nn.Module, kernel: Tensor) -> None:
        conv.weight[:carried], conv.bias[:carried] = 0, 0
        for channel in range(carried):
            conv.weight[channel, channel] = kernel

    def write(conv: nn.Module, negatives: bool, scale: float) -> None:
        rows = carried if negatives else 3
        conv.weight[:rows], conv.bias[:rows] = 0, 0
        middle = conv.weight.shape[-1] // 2
        for colour in range(3):
            conv.weight[colour, colour, middle, middle] = scale
            if negatives:
                conv.weight[colour + 3, colour, middle, middle] = -scale

    def leave_alone(block: nn.Module) -> None:
        for layer in block.modules():
            if isinstance(layer, ResnetBlock2D):
                layer.conv2.weight[:carried], layer.conv2.bias[:carried] = 0, 0
                if layer.conv_shortcut is not None:
                    pass_on(layer.conv_shortcut, torch.ones(1, 1))
            elif isinstance(layer, Attention):
                layer.to_out[0].weight[:carried], layer.to_out[0].bias[:carried] = 0, 0

    average, centre = torch.zeros(3, 3), torch.zeros(3, 3)
    average[:2, :2], centre[1, 1] = 0.25, 1.0
    for half, kernel in ((model.encoder, average), (model.decoder, centre)):
        write(half.conv_in, negatives=True, scale=1.0)
        leave_alone(half)
        for layer in half.modules():
            if isinstance(layer, Downsample2D | Upsample2D):
                pass_on(layer.conv, kernel)
        write(half.conv_out, negatives=False, scale=0.5)
        for colour in range(3):
            half.conv_out.weight[colour, colour + 3, 1, 1] = -0.5
    for conv in (model.quant_conv, model.post_quant_conv):
        write(conv, negatives=False, scale=1.0)
    return model


def train_autoencoder(steps: int = 1200, resume: bool = True, seed: int = 0) -> AutoencoderKL:
    """L1 and squared error on pixels, L1 on their differences between neighbours, and a small KL term.

    The differences make edges count: outlines and stripes are few pixels, and plain L1 lets them blur first. So does
    the perceptual term: how far the classifier's activations at three depths move between a picture and its copy.
    """
    torch.manual_seed(seed)
    model, pictures = build_autoencoder(), bank()
    judge, _ = load_training()
    judge.requires_grad_(False)

    def loss_of_step(step: int, rng: np.random.Generator, noise: torch.Generator) -> dict[str, Tensor]:
        images = pictures.batch(rng.integers(len(pictures), size=16)) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encode(images).latent_dist
            decoded = model.decode(latents.sample(noise)).sample.float()
            perceptual = _perceptual(judge, decoded, images)
        pixels = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
        edges = sum((F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3)), torch.zeros(()))
        kl = latents.kl().float().mean()
        loss = pixels + 0.5 * edges + 0.5 * perceptual + 1e-6 * kl
        parts = {"pixels": pixels, "edges": edges, "perceptual": perceptual, "kl": kl}
        return {"loss": loss, **parts}

    train(NAME, {"model": model}, loss_of_step, steps=steps, rate=2e-3, resume=resume, average=0.995, seed=seed)
    return model


def load_autoencoder() -> tuple[AutoencoderKL, dict[str, float]]:
    """The newest checkpoint, with `scaling_factor` set so that the bank's latents have unit standard deviation."""
    model = build_autoencoder()
    said = load_checkpoint(NAME, {"model": model})
    spread = encode(model, bank(), np.arange(2048)).std().item()
    model.register_to_config(scaling_factor=round(1 / spread, 6))
    return model, said


@torch.no_grad()
def encode(model: AutoencoderKL, pictures: Bank, index: np.ndarray, batch: int = 128) -> Tensor:
    """Means of the posterior, unscaled: (n, 16, 8, 8)."""
    parts = [pictures.batch(part) * 2 - 1 for part in np.array_split(index, max(1, len(index) // batch))]
    return torch.cat([model.encode(part).latent_dist.mean for part in parts])


def _perceptual(judge: Classifier, decoded: Tensor, images: Tensor) -> Tensor:
    """How far the classifier's activations at three depths move between a picture and its copy (squared error)."""
    both, perceptual = torch.cat([decoded, images]), torch.zeros(())
    for place, layer in enumerate(judge.body):
        both = layer(both)
        if place in (5, 8, 11):
            perceptual = perceptual + F.mse_loss(*both.float().chunk(2)) / 3
    return perceptual
