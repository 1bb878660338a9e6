"""A very small world to evaluate in: random models of the real classes, and every kind of data in its real layout."""

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from m2m import artifacts
from m2m.config import Profile
from m2m.data.sets import LATENTS, SetsIndex, SetTable, picture_name, write_index
from m2m.data.shards import ShardWriter, npy_bytes
from m2m.data.tokens import VOCABULARY
from m2m.generation.noise import keyed_normal
from m2m.models.conditions import ConditionEmbedder
from m2m.models.unet import ManyToManyUNet
from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.progress import Progress
from m2m.stage_run import StageRun
from m2m.stages import STAGES
from m2m.tiny.classifier import Classifier
from m2m.tiny.world import describe, draw, sample_scene

SIDE, PER_SET, TRAINING, TEST = 16, 7, 3, 6
FEATURES = 4  # of the classifier: FID needs more sets than that
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}


VAE: dict[str, Any] = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "sample_size": SIDE,
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class SmallWorld:
    """Folders of models and data, and a way to run an evaluation on them."""

    root: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def profile(self, sections: Mapping[str, Any], outputs: Path) -> Profile:
        return Profile(self.root / "tests.yaml", sections, outputs, root=self.root)

    def stand(self, name: str, key: str, folder: Path) -> None:
        """Copy one of the inputs to where a stage's output would stand, with its manifest."""
        shutil.copytree(self.root / name, folder)
        files = artifacts.record_files(folder)
        made = artifacts.Manifest(
            stage=key, version=1, fingerprint="f", deterministic=True, config={}, inputs={}, counts={}, files=files
        )
        artifacts.write_bytes(folder / artifacts.MANIFEST, made.encoded())

    def run(self, key: str, out: Path, settings: Mapping[str, Any], **inputs: Path) -> StageRun:
        """Run a stage's own function with these settings on top of the common ones."""
        stage = STAGES[key]
        function, config = stage.load()
        profile = self.profile({}, self.root / "outputs")
        folders = {name: inputs.get(name, self.root / name) for name in stage.inputs}
        out.mkdir(parents=True, exist_ok=True)
        run = StageRun(stage, profile, out, folders, "a fingerprint", Progress(quiet=True))
        function(config.model_validate({**self.settings, **settings}), run)
        return run


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> SmallWorld:
    root = tmp_path_factory.mktemp("small-world")
    torch.manual_seed(0)
    _save_models(root)
    _save_sets(root / "sets")
    _save_objects(root / "objaverse")
    _save_procedures(root / "vgsi")
    _save_photographs(root / "photo_sets")
    return SmallWorld(
        root,
        {
            "dino": "dino",
            "clip": "clip",
            "reader": "classifier",
            "sampling": {"num_inference_steps": 1},
            "batch": 4,
            "shown": 2,
            "compute": {"threads": 1},
        },
    )


@pytest.fixture
def evaluate(small_world: SmallWorld, tmp_path: Path) -> Callable[..., StageRun]:
    """`evaluate("rollouts", sets=3)` -> the finished run, its output below the test's folder."""

    def start(name: str, out: str = "out", inputs: Mapping[str, Path] | None = None, **settings: Any) -> StageRun:
        return small_world.run(f"evaluate@{name}", tmp_path / out, settings, **(inputs or {}))

    return start


@pytest.fixture(scope="session")
def alexnet_weights() -> Callable[[int], dict[str, torch.Tensor]]:
    """`alexnet_weights(seed)`: a state dict as torchvision's AlexNet has it, of random weights."""

    def drawn(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
        found = {"classifier.1.weight": torch.zeros(2, 2)}
        for place, (out, into, side) in shapes.items():
            found[f"features.{place}.weight"] = torch.randn(out, into, side, side) / (into * side) ** 0.5 / 3
            found[f"features.{place}.bias"] = torch.randn(out) / 10
        return found

    return drawn


def _save_models(root: Path) -> None:
    vae = AutoencoderKL(**VAE)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    dino = Dinov2Model(Dinov2Config(**sizes, image_size=14, patch_size=7))
    dino.save_pretrained(root / "dino")
    clip = CLIPModel(
        CLIPConfig(
            text_config={**sizes, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406},
            vision_config={**sizes, "image_size": 16, "patch_size": 8},
            projection_dim=6,
        )
    )
    clip.save_pretrained(root / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(VOCABULARY)
    tokenizer.save_pretrained(root / "clip")
    Classifier(width=8, features=FEATURES).save_pretrained(root / "classifier")
    plain = UNet2DConditionModel(**UNET)
    ends: dict[str, Any] = {"eos_token_id": 49407, "bos_token_id": 49406}
    text_encoder = CLIPTextModel(CLIPTextConfig(**{**sizes, "hidden_size": 16}, vocab_size=49408, **ends))
    scheduler: Any = DDIMScheduler(clip_sample=False, steps_offset=1)
    absent: Any = None
    StableDiffusionPipeline(
        vae, text_encoder, tokenizer, plain, scheduler, absent, absent, requires_safety_checker=False
    ).save_pretrained(root / "text-to-image")  # type: ignore[arg-type]
    for name, variant, condition in (
        ("m2m_self", "self", None),
        ("m2m_dino", "dino", None),
        ("m2m_nvs", "dino", "camera"),
        ("m2m_vgsi", "dino", "position"),
    ):
        unet = ManyToManyUNet.from_text_to_image(plain, variant, 8 if variant == "dino" else None, condition)  # type: ignore[arg-type]
        for module in unet.modules():
            if isinstance(module, ConditionEmbedder):  # as if trained: a fresh one says nothing
                for parameter in module.heads.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
        encoder = dino if variant == "dino" else None
        ManyToManyPipeline(vae, unet, scheduler, encoder).save_pretrained(root / name)


def _save_sets(folder: Path) -> None:
    """A generate-sets output: pictures of the world, and latents that have nothing to do with them."""
    drawn = np.random.default_rng(0)
    ids, splits = list(range(TRAINING + TEST)), ["train"] * TRAINING + ["test"] * TEST
    with ShardWriter(folder, 0, "made by a test") as writer:
        for caption, split in zip(ids, splits):
            scene = sample_scene(drawn)
            named = {"shape": scene.shape, "colour": scene.colour}
            pictures = [draw(sample_scene(drawn, named), drawn)[::4, ::4] for _ in range(PER_SET)]
            latents = keyed_normal(9, caption, shape=(PER_SET, 4, 8, 8)).numpy().astype(np.float16)
            said = {"caption": describe(named), "id": caption, "split": split}
            files = {LATENTS: npy_bytes(latents), "json": json.dumps(said).encode()}
            files |= {picture_name(i, "png"): png(picture) for i, picture in enumerate(pictures)}
            writer.add(f"{caption:09d}", files)
    SetTable.write(folder, [(0, ids, splits)])
    write_index(
        folder,
        SetsIndex(
            shards=1,
            sets_per_shard=len(ids),
            splits={"train": TRAINING, "test": TEST},
            images_per_set=PER_SET,
            image_size=SIDE,
            latent_shape=(4, 8, 8),
            pictures="png",
        ),
    )


def _save_objects(folder: Path) -> None:
    """Three objects of six views from a ring of cameras; the last two are held out with `min_validation` 2."""
    drawn = np.random.default_rng(1)
    names = [f"object-{i}" for i in range(3)]
    for name in names:
        (folder / name).mkdir(parents=True)
        for view in range(6):
            angle = view * np.pi / 3
            rotation = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
            np.save(folder / name / f"{view:03d}.npy", np.hstack([rotation, [[0.0], [0.0], [-1.5]]]))
            (folder / name / f"{view:03d}.png").write_bytes(png(_noise(drawn)))
    (folder / "valid_paths.json").write_text(json.dumps(names))


def _save_procedures(folder: Path) -> None:
    drawn = np.random.default_rng(2)
    (folder / "wiki_images" / "test").mkdir(parents=True)
    with (folder / "WikihowText_data.json").open("w") as f:
        for article, count in enumerate((5, 3, 2, 1)):
            steps = [{"headline": f"step {n}", "step_id": f"{article}_0_{n}"} for n in range(count)]
            f.write(json.dumps({"goal": f"goal {article}", "methods": [{"name": "a way", "steps": steps}]}) + "\n")
            for step in steps:
                (folder / "wiki_images" / "test" / f"{step['step_id']}.png").write_bytes(png(_noise(drawn)))


def _save_photographs(folder: Path) -> None:
    drawn = np.random.default_rng(3)
    for category, count in {"cats": 5, "dogs": 5, "too few": 1}.items():
        (folder / category / "one").mkdir(parents=True)
        for n in range(count):
            (folder / category / "one" / f"{n:02d}.png").write_bytes(png(_noise(drawn)))


def _noise(drawn: np.random.Generator) -> np.ndarray:
    return drawn.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()
