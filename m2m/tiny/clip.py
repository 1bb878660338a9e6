"""The small CLIP: an image and a text tower that meet in 64 dimensions; text-to-image reads its text tower.

Belongs here: its configuration, the real CLIP tokenizer, its training. Not here: scores made from it.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast  # type: ignore

from m2m.tiny import WEIGHTS
from m2m.tiny.classifier import load_training
from m2m.tiny.training import bank, load_checkpoint, train
from m2m.tiny.world import ATTRIBUTES, SIZE, Scene, describe

NAME = "clip"
TOKENIZER = WEIGHTS / "clip"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Real CLIP counts 77; the world's captions have at most 12 tokens, and a causal tower never looks at the padding.
_TRAINED_TOKENS = 16


def build_clip() -> CLIPModel:
    text = {
        "vocab_size": 49408,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }
    vision = {
        "image_size": SIZE,
        "patch_size": 8,
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def load_tokenizer(folder: Path = TOKENIZER) -> CLIPTokenizerFast:
    return CLIPTokenizerFast.from_pretrained(folder)


def name_some(scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """The attributes that a training caption of this scene names: each two times in three, at least one."""
    while True:
        named = {name: getattr(scene, name) for name in ATTRIBUTES if rng.random() < 2 / 3}
        if named:
            return named


def normalised(images: Tensor) -> Tensor:
    """Floats in [0, 1], (B, 3, H, W), as the image tower wants them."""
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def build_heads() -> nn.ModuleDict:
    """What only training uses: linear readers of attributes in the shared space and of each patch's activations."""
    heads: dict[str, nn.Module] = {name: nn.Linear(64, len(values)) for name, values in ATTRIBUTES.items()}
    return nn.ModuleDict({**heads, "places": nn.Linear(96, 128)})


def train_clip(steps: int = 1500, resume: bool = True, seed: int = 0) -> CLIPModel:
    """Contrastive, with a target that is spread over all pictures of the batch that a caption is true of.

    In a world of 2,160 scenes most captions are true of several pictures in a batch; pushing those away, as the plain
    loss does, would teach the text tower to tell equal things apart. Contrast alone is slow to find shapes, and the
    text tower then says "star" and "heart" almost alike. So linear heads, thrown away afterwards, read the attributes
    off both towers, and each patch is to give the classifier's activations at its place, as in `m2m.tiny.dino`.
    """
    torch.manual_seed(seed)
    model, heads, pictures, tokenizer = build_clip(), build_heads(), bank(), load_tokenizer()
    teacher, _ = load_training()
    labels = torch.from_numpy(pictures.labels)

    def loss_of_step(step: int, rng: np.random.Generator, noise: torch.Generator) -> dict[str, Tensor]:
        index = rng.integers(len(pictures), size=128)
        named = [name_some(pictures.scene(place), rng) for place in index]
        tokens = tokenizer([describe(some) for some in named], padding="max_length", max_length=_TRAINED_TOKENS)
        # -1 where a caption leaves an attribute open.
        asked = np.array([[v.index(some[n]) if n in some else -1 for n, v in ATTRIBUTES.items()] for some in named])
        true_of = ((asked[:, None] == pictures.labels[index][None]) | (asked[:, None] == -1)).all(-1)
        target = torch.from_numpy(true_of).float()
        images = pictures.batch(index)
        noisy = normalised(images + 0.03 * torch.randn(images.shape, generator=noise))
        with torch.autocast("cpu", torch.bfloat16):
            seen = model(input_ids=torch.tensor(tokens["input_ids"]), pixel_values=noisy)
            patches = heads["places"](seen.vision_model_output.last_hidden_state[:, 1:])
            with torch.no_grad():
                told = teacher.body[:12](images * 2 - 1).flatten(2).transpose(1, 2)
        places = F.mse_loss(patches.float(), told.float())
        scores = seen.logits_per_text.float()
        to_images = F.cross_entropy(scores, target / target.sum(1, keepdim=True))
        to_texts = F.cross_entropy(scores.T, target.T / target.T.sum(1, keepdim=True))
        contrast, read_text, read_image = (to_images + to_texts) / 2, torch.zeros(()), torch.zeros(())
        texts, shown = seen.text_embeds.float(), seen.image_embeds.float()
        for place, name in enumerate(ATTRIBUTES):
            wanted = torch.from_numpy(asked[:, place])
            read_text = read_text + F.cross_entropy(heads[name](10 * texts), wanted, ignore_index=-1)
            read_image = read_image + F.cross_entropy(heads[name](10 * shown), labels[index, place])
        parts = {"contrast": contrast, "read_text": read_text, "read_image": read_image, "places": places}
        return {"loss": contrast + read_text + read_image + 5 * places, **parts}

    modules = {"model": model, "heads": heads}
    train(NAME, modules, loss_of_step, steps=steps, rate=1e-3, resume=resume, average=0.99, seed=seed)
    return model


def load_clip() -> tuple[CLIPModel, dict[str, float]]:
    """The newest checkpoint of `train_clip`."""
    model = build_clip()
    return model, load_checkpoint(NAME, {"model": model, "heads": build_heads()})
