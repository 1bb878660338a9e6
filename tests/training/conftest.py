"""Very small models of the real classes, and a few image sets, for stages of training to run on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import Dinov2Config, Dinov2Model

from m2m.config import Profile
from m2m.data.sets import LATENTS, SetsIndex, SetTable, write_index
from m2m.data.shards import ShardWriter, npy_bytes
from m2m.generation.noise import keyed_normal
from m2m.progress import Progress
from m2m.stage_run import StageRun
from m2m.stages import STAGES
from tests.training.toy import UNET_CONFIG

SIDE, PER_SET = 16, 6  # pixels, images of a set
SETS = {"train": 8, "validation": 3}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """`text-to-image` (U-Net, autoencoder, scheduler) and `dino`, with random weights."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    UNet2DConditionModel(**UNET_CONFIG).save_pretrained(folder / "text-to-image" / "unet")
    of_two_levels: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vae = AutoencoderKL(**of_two_levels, latent_channels=4, norm_num_groups=2, sample_size=SIDE)
    vae.save_pretrained(folder / "text-to-image" / "vae")
    DDPMScheduler().save_pretrained(folder / "text-to-image" / "scheduler")
    dino = Dinov2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(dino).save_pretrained(folder / "dino")
    (folder / "text-to-image" / "made_by.json").write_text(json.dumps({"command": "make text-to-image"}))
    return folder


@pytest.fixture(scope="session")
def image_sets(tmp_path_factory) -> Path:
    """A generate-sets output of two shards, latents only."""
    folder = tmp_path_factory.mktemp("generate-sets")
    splits = [split for split, count in SETS.items() for _ in range(count)]
    shards = []
    for shard, members in enumerate(np.array_split(np.arange(len(splits)), 2)):
        with ShardWriter(folder, shard, "made by a test") as writer:
            for caption in members.tolist():
                latents = keyed_normal(9, caption, shape=(PER_SET, 4, SIDE // 2, SIDE // 2)).numpy()
                said = {"caption": f"a {caption}", "id": caption, "split": splits[caption]}
                files = {LATENTS: npy_bytes(latents.astype(np.float16)), "json": json.dumps(said).encode()}
                writer.add(f"{caption:09d}", files)
        shards.append((shard, members.tolist(), [splits[caption] for caption in members]))
    SetTable.write(folder, shards)
    index = SetsIndex(
        shards=2,
        sets_per_shard=6,
        splits=SETS,
        images_per_set=PER_SET,
        image_size=SIDE,
        latent_shape=(4, SIDE // 2, SIDE // 2),
        pictures=None,
    )
    write_index(folder, index)
    return folder


@pytest.fixture
def start_run(tmp_path):
    """`start_run("pretrain@self", {"sets": folder})` -> a StageRun that writes below the test's folder."""

    def start(stage: str, inputs: dict[str, Path], name: str = "out") -> StageRun:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        profile = Profile(path=tmp_path / "tests.yaml", sections={}, outputs=tmp_path, root=tmp_path)
        return StageRun(STAGES[stage], profile, out, inputs, "a fingerprint", Progress(quiet=True))

    return start


@pytest.fixture(scope="session")
def quick(models):
    """Settings of a training that takes a second."""
    return {
        "images_per_set": 3,
        "batch": 4,
        "micro_batch": 2,
        "epochs": 2,
        "learning_rate": 1e-3,
        "ema_decay": 0.5,
        "checkpoint_every": 2,
        "validation_sets": 2,
        "sample_sets": 2,
        "num_inference_steps": 2,
        "compute": {"threads": 1},
    }
