"""`python -m m2m generate`: images from images, with a trained model.

Belongs here: arguments, files. Not here: sampling (`many_to_many`).
"""

import argparse
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image

from m2m.config import Compute
from m2m.errors import InputError
from m2m.models.saved import read_json
from m2m.pipelines.many_to_many import load_pipeline
from m2m.pipelines.schedulers import SchedulerName, named_scheduler


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=Path,
        help='a trained model\'s folder, outputs/tiny/pretrain/self; or "tiny", "tiny-self": embedded',
    )
    parser.add_argument("images", type=Path, nargs="*", help="preceding images, in order; none at all is allowed")
    parser.add_argument(
        "--out", type=Path, default=Path("generated"), help="folder for the images (default: generated)"
    )
    parser.add_argument("--num-images", type=int, default=1, help="how many to generate, one after another")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of an image (default: 50)")
    parser.add_argument(
        "--scheduler",
        choices=get_args(SchedulerName),
        default="ddim",
        help="ddim as in the paper (default), or one that adds noise on the way: better without guidance",
    )
    parser.add_argument("--guidance-scale", type=float, default=7.5, help="s of Eq. 6, s_I of Eq. 7 (default: 7.5)")
    parser.add_argument("--condition-guidance-scale", type=float, help="s_C of Eq. 7; the guidance scale by default")
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("START", "STOP"),
        help="shares of the steps between which there is guidance, 0 to 1 (default: all); the others cost half",
    )
    parser.add_argument(
        "--conditions",
        type=Path,
        help='JSON for a fine-tuned model: {"preceding": [[...], ...], "target": [[...], ...]}, a row for each image: '
        "12 numbers of a relative 3x4 pose, or one step index",
    )
    parser.add_argument("--context-window", type=int, help="read at most so many preceding images (W)")
    parser.add_argument("--context-sink", type=int, default=0, help="how many of them are always the first")
    parser.add_argument("--int8-context", action="store_true", help="halve the memory that preceding images hold")
    parser.add_argument(
        "--context-noise", type=int, default=0, help="read preceding images with the noise of this timestep (M2M-Self)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")


def main(args: argparse.Namespace) -> None:
    """Write `01.png`, `02.png`, ... into the folder and say where.

    Raises:
        M2MError: the model, an image or a setting is not usable.
    """
    pictures = [_open(path) for path in args.images]
    conditions = _conditions(args.conditions)
    pipeline = load_pipeline(
        args.model, compute=Compute(device=args.device, dtype=args.dtype, threads=max(args.threads, 1))
    )
    pipeline.scheduler = named_scheduler(args.scheduler, pipeline.scheduler)
    made = pipeline(
        [pictures],
        num_images=args.num_images,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        condition_guidance_scale=args.condition_guidance_scale,
        guidance_interval=tuple(args.guidance_interval) if args.guidance_interval else None,
        context_window=args.context_window,
        context_sink=args.context_sink,
        int8_context=args.int8_context,
        context_noise=args.context_noise,
        generator=torch.Generator("cpu").manual_seed(args.seed),
        **conditions,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(made.images[0], 1):
        path = args.out / f"{number:02d}.png"
        picture.save(path)  # type: ignore[union-attr]
        print(path)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise InputError(f"{path}: not an image that can be read: {error}") from None


def _conditions(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    content = read_json(path)
    if unknown := sorted(content.keys() - {"preceding", "target"}):
        raise InputError(f"{path}: {unknown[0]} is not known; expected preceding and target")
    found: dict[str, Any] = {}
    for key, argument in (("preceding", "condition"), ("target", "target_condition")):
        try:
            if content.get(key):
                found[argument] = torch.tensor([content[key]], dtype=torch.float32)
        except (TypeError, ValueError):
            raise InputError(f"{path}: {key} must be a list of rows with equally many numbers") from None
    return found
