"""M2M's tiny starting weights: the default run has too few minutes to learn image sets from the text-to-image weights.

Belongs here: image sets drawn by the world, the training's settings. Not here: the training (`m2m.training`, the same
loop and loss as the stage `pretrain`), the stage itself, which goes on from these weights.
"""

import hashlib
import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2m.config import Profile
from m2m.errors import ArtifactError
from m2m.models.text_to_image import load_ddim, load_dino, load_vae
from m2m.models.unet import ManyToManyUNet
from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.progress import Progress
from m2m.tiny import WEIGHTS
from m2m.tiny.training import OUTPUTS
from m2m.tiny.world import ATTRIBUTES, draw, sample_scene
from m2m.training import checkpoints
from m2m.training.acceleration import open_accelerator
from m2m.training.course import objective_of
from m2m.training.log import LOG
from m2m.training.loop import CHECKPOINTS, train
from m2m.training.objective import SetLoss
from m2m.training.pretrain import Pretrain
from m2m.training.rollouts import OwnRollouts
from m2m.training.starting import MADE_BY, feature_width, fresh_unet

Variant = Literal["self", "dino"]
IMAGES_PER_SET = 5
SHARED = 0.7  # how often an attribute is the same in all pictures of a set
_SCHEDULER = "scheduler"


@dataclass(frozen=True)
class DrawnSets:
    """Encoded sets in memory: latents (sets, N, C, h, w) and, for M2M-DINO, features (sets, N - 1, S, D), float16."""

    latents: Tensor
    features: Tensor | None

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        _, sample = key
        item = {"sample": torch.tensor(sample), "latents": self.latents[sample].float()}
        return item if self.features is None else item | {"features": self.features[sample].float()}


def draw_set(rng: np.random.Generator, images: int = IMAGES_PER_SET) -> np.ndarray:
    """Pictures (images, 64, 64, 3) that share each attribute with probability `SHARED`, and are else free in it."""
    scene = sample_scene(rng)
    shared = {name: getattr(scene, name) for name in ATTRIBUTES if rng.random() < SHARED}
    return np.stack([draw(sample_scene(rng, shared), rng) for _ in range(images)])


def drawn_sets(pipeline: ManyToManyPipeline, count: int, seed: int) -> DrawnSets:
    """`count` sets, drawn and encoded as training and sampling will see them; kept in `outputs/tiny-models/sets`."""
    digest = hashlib.sha256()
    for encoder in (pipeline.vae, pipeline.image_encoder):
        for weight in () if encoder is None else encoder.state_dict().values():
            digest.update(weight.numpy().tobytes())
    path = OUTPUTS / "sets" / f"{pipeline.unet.variant}-{count}-{seed}-{digest.hexdigest()[:12]}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in _drawn(pipeline, count, seed).items()}, part)
        part.replace(path)
    found = load_file(path)
    return DrawnSets(found["latents"], found.get("features"))


@torch.no_grad()
def _drawn(pipeline: ManyToManyPipeline, count: int, seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng([seed, 7])
    latents, features = [], []
    for _ in Progress().each(range(count), unit="set", label="drawing and encoding"):
        pictures = torch.from_numpy(draw_set(rng)).permute(0, 3, 1, 2).float() / 255
        posterior = pipeline.vae.encode(pictures * 2 - 1).latent_dist
        latents.append((posterior.mode() * pipeline.vae.config["scaling_factor"]).half())
        if pipeline.image_encoder is not None:
            features.append(pipeline.encode(pictures[:-1]).half())
    found = {"latents": torch.stack(latents)}
    return found if not features else found | {"features": torch.stack(features)}


def train_many_to_many(
    variant: Variant,
    out: Path,
    steps: int = 2000,
    sets: int = 12_000,
    threads: int = 2,
    seed: int = 0,
    name: str = "",
    overrides: Sequence[str] = (),
) -> Path:
    """Train M2M from the tiny text-to-image weights; ship its averaged U-Net to `out/m2m-<variant>[-seed][-name]`.

    Goes on from the newest checkpoint in the folder of that name in `outputs/tiny-models`, also with more steps, or
    with other overrides, than it was begun with.

    Args:
        overrides: settings of `pretrain` as `key=value`, in place of the recipe's.
    """
    called = "-".join(["m2m", variant, *([str(seed)] if seed else []), *([name] if name else [])])
    settings = _settings(variant, steps, threads, seed, overrides)
    source, work = str(WEIGHTS / "stable-diffusion"), OUTPUTS / called
    work.mkdir(parents=True, exist_ok=True)
    command = f"python -m m2m.tiny m2m {variant} --steps {steps} --sets {sets} --seed {seed}"
    command += f" --name {name}" * bool(name) + " --set" * bool(overrides)
    command = " ".join([command, *map(shlex.quote, overrides)])
    (work / MADE_BY).write_text(json.dumps({"command": command, "unet": settings.own_unet_settings()}) + "\n")
    accelerator = open_accelerator(settings.compute)
    dino = load_dino(str(WEIGHTS / "dinov2"), Path.cwd()) if variant == "dino" else None
    width = None if dino is None else dino.config.hidden_size
    unet = fresh_unet(source, Path.cwd(), variant, width, seed, settings.own_unet_settings())
    scheduler = load_ddim(source, Path.cwd(), settings.prediction_type)
    scheduler.save_pretrained(work / _SCHEDULER)
    pipeline = ManyToManyPipeline(load_vae(source, Path.cwd()), unet, scheduler, dino)
    rollouts = None
    if settings.rollout_share:
        rollouts = OwnRollouts(
            pipeline, accelerator, seed, settings.rollout_share, settings.rollout_steps, settings.rollout_guidance
        )
    train(
        settings,
        SetLoss(unet, scheduler),
        objective_of(settings, pipeline, context_noise=settings.context_noise),
        drawn_sets(pipeline, sets, seed),
        work,
        Progress(),
        accelerator,
        belongs_to=f"{variant}-{sets}-{seed}",
        rollouts=rollouts,
        label=called,
    )
    return _ship(unet, work, out / called, command, (work / LOG).read_text())


def _settings(variant: Variant, steps: int, threads: int, seed: int, overrides: Sequence[str]) -> Pretrain:
    recipe = {
        "images_per_set": IMAGES_PER_SET,
        "batch": 12,
        "micro_batch": 12,
        "epochs": 1_000,
        "steps": steps,
        "learning_rate": 5e-4,
        "warmup_steps": 30,
        "ema_decay": max(0.0, min(0.999, 1 - 10 / steps)),  # over about a tenth of the steps
        "checkpoint_every": 100,
        "timestep_sampling": "shifted",
        "seed": seed,
        "compute": {"threads": threads, "dtype": "bfloat16"},
    }
    given = Profile(Path("python -m m2m.tiny m2m"), {"pretrain": recipe}, OUTPUTS, root=Path.cwd())
    return given.stage_config(Pretrain, "pretrain", variant, overrides)


def ship_newest(name: str, weights: Path) -> Path:
    """Ship the averaged weights of the newest checkpoint of a training, also of one that goes on or was stopped.

    Args:
        name: of the training's folder in `outputs/tiny-models`: `m2m-self`, `m2m-dino-1`.

    Raises:
        ArtifactError: it has no whole checkpoint.
    """
    work = OUTPUTS / name
    found = checkpoints.load_newest(work / CHECKPOINTS, None, print)
    if found is None:
        raise ArtifactError(f"{work / CHECKPOINTS}: no whole checkpoint here: `python -m m2m.tiny m2m` leaves them")
    variant, sets, seed = found.belongs_to.split("-")
    told = json.loads((work / MADE_BY).read_text()) if (work / MADE_BY).is_file() else {}
    source, width = str(WEIGHTS / "stable-diffusion"), None
    if variant == "dino":
        width = feature_width(str(WEIGHTS / "dinov2"), Path.cwd())
    unet = fresh_unet(source, Path.cwd(), variant, width, int(seed), told.get("unet", {}))
    unet.load_state_dict(found.tensors["average"])
    command = f"python -m m2m.tiny m2m {variant} --steps {found.step} --sets {sets} --seed {seed}"
    if told:
        command = f"{told['command']} (as after step {found.step})"
    return _ship(unet, work, weights / name, command, found.log)


def _ship(unet: ManyToManyUNet, work: Path, out: Path, command: str, log: str) -> Path:
    unet.half().save_pretrained(out / "unet")
    if (work / _SCHEDULER).is_dir():  # it says what the U-Net predicts
        shutil.copytree(work / _SCHEDULER, out / _SCHEDULER, dirs_exist_ok=True)
    (out / MADE_BY).write_text(json.dumps({"command": command}) + "\n")
    (out / LOG).write_text(log)
    return out
