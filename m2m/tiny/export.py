"""Ship checkpoints: fp16 safetensors folders that the ordinary classes load, each with its training log beside it.

Belongs here: the folders' layout. Not here: training, measuring.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from m2m.errors import ArtifactError
from m2m.models.unet import ManyToManyUNet
from m2m.pipelines.model_card import read_facts
from m2m.tiny import autoencoder, classifier, clip, dino, many_to_many, text_to_image
from m2m.tiny.training import OUTPUTS
from m2m.tiny.world import SIZE
from m2m.training.finetune import CONDITIONS
from m2m.training.log import LOG
from m2m.training.starting import MADE_BY

_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "LICENSE")


def export(name: str, out: Path) -> Path:
    """Write the newest checkpoint of training `name` into its folder under `out`; M2M's are `m2m-self`, `m2m-dino-1`.

    Or, where `name` is a folder that `finetune` made, its U-Net. The autoencoder and the text-to-image U-Net are in
    one folder, so either export rewrites it with whatever both have by then.
    """
    if name == "classifier":
        model, _ = classifier.load_training()
        model.save_pretrained(out / name)
        return _with_log(out / name, name)
    if name == "clip":
        model, _ = clip.load_clip()
        model.half().save_pretrained(out / name)
        _preprocessor(out / name, "CLIPImageProcessor", clip.MEAN, clip.STD)
        if out / name != clip.TOKENIZER:
            _copy_tokenizer(out / name)
        _load_as_float32(out / name)
        return _with_log(out / name, name)
    if name == "dino":
        model, _ = dino.load_dino()
        model.half().save_pretrained(out / "dinov2")
        _preprocessor(out / "dinov2", "BitImageProcessor", dino.MEAN, dino.STD)
        _load_as_float32(out / "dinov2")
        return _with_log(out / "dinov2", name)
    if name.startswith("m2m-"):
        return many_to_many.ship_newest(name, out)
    if (Path(name) / "unet").is_dir():
        return _export_fine_tuned(Path(name), out / Path(name).name)
    return _export_stable_diffusion(out / "stable-diffusion")


def _export_fine_tuned(folder: Path, out: Path) -> Path:
    unet = ManyToManyUNet.from_pretrained(folder / "unet")
    task = {condition: name for name, condition in CONDITIONS.items()}.get(unet.config["condition"])
    if task is None:
        raise ArtifactError(f"{folder}: not what finetune made: its U-Net has no condition")
    unet.half().save_pretrained(out / "unet")
    shutil.copytree(folder / "scheduler", out / "scheduler", dirs_exist_ok=True)
    shutil.copyfile(folder / LOG, out / LOG)
    command = f"python -m m2m finetune --variant {task} steps={len((out / LOG).read_text().splitlines())}"
    started = f" (initialised from: {read_facts(folder).initialised_from})"
    (out / MADE_BY).write_text(json.dumps({"command": command + started}) + "\n")
    return out


def _export_stable_diffusion(folder: Path) -> Path:
    vae, _ = autoencoder.load_autoencoder()
    trained = (OUTPUTS / text_to_image.NAME / "checkpoint.pt").exists()
    unet = text_to_image.load_unet()[0] if trained else text_to_image.build_unet()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_to_image.text_encoder(),
        tokenizer=clip.load_tokenizer(),
        unet=unet,
        scheduler=text_to_image.build_scheduler(),  # type: ignore
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    _load_as_float32(folder / "text_encoder")
    # One form of the tokenizer and not two: transformers also writes tokenizer.json, 3.6 MB that say the same.
    shutil.rmtree(folder / "tokenizer")
    _copy_tokenizer(folder / "tokenizer")
    settings = folder / "tokenizer" / "tokenizer_config.json"
    padded = {**json.loads(settings.read_text()), "model_max_length": text_to_image.TOKENS}
    settings.write_text(json.dumps(padded, indent=2) + "\n")
    _with_log(folder / "vae", autoencoder.NAME)
    return _with_log(folder / "unet", text_to_image.NAME) if trained else folder


def _copy_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in _TOKENIZER_FILES:
        shutil.copyfile(clip.TOKENIZER / file, folder / file)


def _load_as_float32(folder: Path) -> None:
    """Stored in half precision, loaded in full, as diffusers does: transformers would keep what the config records."""
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if "dtype" in part:
            part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _preprocessor(folder: Path, kind: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    settings = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "resample": 3,
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _with_log(folder: Path, name: str) -> Path:
    shutil.copyfile(OUTPUTS / name / "log.jsonl", folder / "training_log.jsonl")
    return folder
