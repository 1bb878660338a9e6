"""How good the shipped models are: read-back through the autoencoder and of samples, linear probes, retrieval.

Belongs here: the figures in `weights/measured.json`. Not here: the project's evaluation (m2m.evaluation).
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, Dinov2Model

from m2m.evaluation.measures import psnr
from m2m.tiny import clip, dino
from m2m.tiny.classifier import Classifier
from m2m.tiny.training import HELD_OUT_SEED, Bank, bank
from m2m.tiny.world import ATTRIBUTES, describe, read_caption, sample_caption


@torch.no_grad()
def measure(weights: Path, pictures: int = 2000, samples: int = 500, grid: Path | None = None) -> dict[str, object]:
    """Measure everything, print it and write `weights/measured.json`."""
    held_out = bank(pictures, seed=HELD_OUT_SEED)
    judge = Classifier.from_pretrained(weights / "classifier")
    pipeline = StableDiffusionPipeline.from_pretrained(weights / "stable-diffusion", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    images = held_out.batch(np.arange(len(held_out)))
    reconstructions = reconstruct(pipeline, images)

    found: dict[str, object] = {
        "command": f"python -m m2m.tiny measure --pictures {pictures} --samples {samples}",
        "pictures": pictures,
        "samples": samples,
        "originals_read": _rates(judge.predict(images), held_out),
        "reconstructions_read": _rates(judge.predict(reconstructions), held_out),
        "reconstructions_psnr": round(float(psnr(_bytes(reconstructions), _bytes(images)).mean()), 2),
        "latents_std": round(_latents_std(pipeline, images[:512]), 4),
    }
    captions, drawn = sample_images(pipeline, samples)
    found["samples_read"] = asked_and_read(judge, captions, drawn)
    found["dino_linear_probe"] = _probe(_dino_features(weights / "dinov2", images), held_out)
    found["clip"] = _retrieval(weights / "clip", held_out, captions, drawn)
    if grid:
        rows = [
            torch.cat(list(drawn[start : start + 12]), dim=2) for start in range(0, min(samples, 96) // 12 * 12, 12)
        ]
        Image.fromarray(_bytes(torch.cat(rows, dim=1)).permute(1, 2, 0).numpy()).save(grid)
    text = json.dumps(found, indent=2)
    print(text)
    (weights / "measured.json").write_text(text + "\n")
    return found


@torch.no_grad()
def reconstruct(pipeline: StableDiffusionPipeline, images: Tensor, batch: int = 100) -> Tensor:
    """Through the autoencoder and back; pictures (B, 3, 64, 64) in [0, 1]."""
    vae = pipeline.vae
    parts = [vae.decode(vae.encode(part * 2 - 1).latent_dist.mean).sample for part in images.split(batch)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def sample_images(
    pipeline: StableDiffusionPipeline, count: int, seed: int = 0, batch: int = 50
) -> tuple[list[str], Tensor]:
    """`count` captions of the world and a picture for each: Euler, 25 steps, guidance 7.5. (B, 3, 64, 64) in [0, 1]."""
    rng = np.random.default_rng([HELD_OUT_SEED, seed])
    captions = [sample_caption(rng) for _ in range(count)]
    drawn = []
    for start in range(0, count, batch):
        made = pipeline(
            captions[start : start + batch],
            num_inference_steps=25,
            guidance_scale=7.5,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(1000 * seed + start),
            output_type="pt",
        )
        drawn.append(made.images)  # pyright: ignore[reportAttributeAccessIssue]
    return captions, torch.cat(drawn).float()


def asked_and_read(judge: Classifier, captions: list[str], images: Tensor) -> dict[str, float]:
    """How often an attribute that a caption names is read back from its picture; `mean` is over all that were named."""
    read = judge.predict(images)
    hits: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for caption, row in zip(captions, read):
        for name, value in read_caption(caption).items():
            hits[name].append(ATTRIBUTES[name][row[list(ATTRIBUTES).index(name)]] == value)
    every = [hit for some in hits.values() for hit in some]
    return {
        **{name: round(float(np.mean(some)), 4) for name, some in hits.items()},
        "mean": round(float(np.mean(every)), 4),
    }


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().byte()


def _rates(read: np.ndarray, pictures: Bank) -> dict[str, float]:
    return {name: round(float(rate), 4) for name, rate in zip(ATTRIBUTES, (read == pictures.labels).mean(0))}


def _latents_std(pipeline: StableDiffusionPipeline, images: Tensor) -> float:
    mean = pipeline.vae.encode(images * 2 - 1).latent_dist.mean
    return float(mean.std()) * pipeline.vae.config["scaling_factor"]


def _dino_features(folder: Path, images: Tensor) -> Tensor:
    model = Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
    parts = [model(pixel_values=dino.normalised(part)).last_hidden_state.mean(1) for part in images.split(100)]
    return torch.cat(parts)


def _probe(features: Tensor, pictures: Bank, ridge: float = 1.0) -> dict[str, float]:
    """Ridge regression onto one-hot labels, fitted on the first half of the held-out pictures, tested on the second."""
    half = len(features) // 2
    scaled = (features - features[:half].mean(0)) / features[:half].std(0)
    design = torch.cat([scaled, torch.ones(len(scaled), 1)], 1).double()
    gram = design[:half].T @ design[:half] + ridge * torch.eye(design.shape[1])
    rates = {}
    for place, (name, values) in enumerate(ATTRIBUTES.items()):
        labels = torch.from_numpy(pictures.labels[:, place])
        solved = torch.linalg.solve(gram, design[:half].T @ F.one_hot(labels[:half], len(values)).double())
        rates[name] = round(((design[half:] @ solved).argmax(1) == labels[half:]).double().mean().item(), 4)
    return rates


def _retrieval(folder: Path, pictures: Bank, captions: list[str], drawn: Tensor) -> dict[str, float]:
    """Full captions against held-out pictures, and captions against the pictures sampled for them.

    `attribute_accuracy` is CLIP without training as a classifier: which one-word caption fits best.
    `caption_of_100`: of the full captions of 100 pictures, how often the best one is true of the picture.
    """
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = clip.load_tokenizer(folder)

    def texts(some: list[str]) -> Tensor:
        tokens = tokenizer(some, padding=True, return_tensors="pt")
        states = model.text_model(**tokens).pooler_output
        return F.normalize(model.text_projection(states), dim=-1)

    def looks(images: Tensor) -> Tensor:
        parts = [model.vision_model(pixel_values=clip.normalised(part)).pooler_output for part in images.split(100)]
        return F.normalize(model.visual_projection(torch.cat(parts)), dim=-1)

    seen = looks(pictures.batch(np.arange(len(pictures))))
    rates = []
    for place, (name, values) in enumerate(ATTRIBUTES.items()):
        best = (seen @ texts([describe({name: value}) for value in values]).T).argmax(1).numpy()
        rates.append((best == pictures.labels[:, place]).mean())
    hits = []
    for start in range(0, len(pictures) - 99, 100):
        labels = pictures.labels[start : start + 100]
        scenes = [pictures.scene(start + place) for place in range(100)]
        full = [describe({name: getattr(scene, name) for name in ATTRIBUTES}) for scene in scenes]
        best = (seen[start : start + 100] @ texts(full).T).argmax(1).numpy()
        hits.append((labels[best] == labels).all(1).mean())
    asked, made = texts(captions), looks(drawn)
    own = (asked * made).sum(1).mean().item()
    other = (asked.roll(1, 0) * made).sum(1).mean().item()
    return {
        "attribute_accuracy": round(float(np.mean(rates)), 4),
        "caption_of_100": round(float(np.mean(hits)), 4),
        "similarity_of_samples": round(own, 4),
        "similarity_of_samples_to_others_captions": round(other, 4),
    }
