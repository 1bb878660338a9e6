"""The models that look at pictures for the evaluations: CLIP, DINOv2, Inception (or what stands for it), the reader.

Belongs here: opening them and turning pictures into features. Not here: what is made of the features
(`m2m.evaluation.measures`), caching DINO features for training (`m2m.generation.features`).
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from m2m.config import Compute
from m2m.errors import ConfigError, InputError
from m2m.evaluation.measures import require_finite
from m2m.evaluation.released_weights import require_weights
from m2m.models.saved import realigned
from m2m.models.text_to_image import model_folder, start_compute
from m2m.tiny.world import ATTRIBUTES

_INCEPTION, _INCEPTION_SHA256 = "pt_inception-2015-12-05-6726825d.pth", "6726825d"
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """A `CLIPModel` with its tokenizer: embeddings of pictures and of texts in one space, of length 1."""

    def __init__(self, source: str, root: Path, compute: Compute) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        folder, device = model_folder(source, root), start_compute(compute)
        try:
            loaded: Any = CLIPModel.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            model, told = loaded
            # transformers fills what a folder of another model lacks with random weights, and only warns
            if told["missing_keys"]:
                raise ValueError(f"{len(told['missing_keys'])} of its weights are not there")
            realigned(model)
            self._model = model.to(device).eval()
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{source}: not a CLIP model with its tokenizer: {_first_line(error)}") from None
        self._size = self._model.config.vision_config.image_size
        self._longest = self._model.config.text_config.max_position_embeddings
        mean, std = _normalisation(folder)
        self._mean, self._std = mean.to(device), std.to(device)
        self._device = device

    @torch.inference_mode()
    def pictures(self, pictures: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) -> (n, D) on the CPU."""
        pixels = _resized(pictures.to(self._device), self._size, "bicubic")
        pixels = (pixels - self._mean) / self._std
        # transformers v5 answers with an object, v4 with the tensor itself
        found: Any = self._model.get_image_features(pixel_values=pixels)
        embedded = found if isinstance(found, Tensor) else found.pooler_output
        require_finite(embedded, "CLIP embeddings")
        return F.normalize(embedded, dim=-1).float().cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Captions -> (n, D) on the CPU; what is longer than the model reads is cut off."""
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        ).to(self._device)
        found: Any = self._model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
        return F.normalize(found if isinstance(found, Tensor) else found.pooler_output, dim=-1).float().cpu()


class Dino:
    """A `Dinov2Model`: one descriptor for a picture, or its patches."""

    def __init__(self, source: str, root: Path, compute: Compute, pooling: str) -> None:
        from m2m.generation.features import DinoEncoder

        self._encoder = DinoEncoder(model_folder(source, root), compute)
        self._pooling = pooling

    @torch.inference_mode()
    def tokens(self, pictures: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) -> last hidden states (n, S, D) on the CPU, the class token first."""
        tokens = self._encoder.encode(pictures)
        require_finite(tokens, "DINOv2 features")
        return tokens.float().cpu()

    def pool(self, tokens: Tensor) -> Tensor:
        """(..., S, D) -> (..., D): the class token, or the mean over all."""
        return tokens[..., 0, :] if self._pooling == "cls" else tokens.mean(-2)

    def pictures(self, pictures: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) -> descriptors (n, D) on the CPU."""
        return self.pool(self.tokens(pictures))


class Reader:
    """The tiny world's classifier: which value of each attribute a picture shows."""

    attributes: dict[str, tuple[str, ...]] = ATTRIBUTES

    def __init__(self, source: str, root: Path, compute: Compute) -> None:
        self._model = _load_classifier(source, root, compute)
        self._device = compute.device

    @torch.inference_mode()
    def read(self, pictures: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) -> index of each attribute's likeliest value, int64 (n, attributes)."""
        logits = self._model.logits(pictures.to(self._device))
        return torch.stack([logits[name].argmax(-1) for name in self.attributes], -1).cpu()


class ClassifierBackbone:
    """The tiny world's classifier where Inception stands: 32 features; shape and colour together are its classes."""

    name = "classifier"

    def __init__(self, source: str, root: Path, compute: Compute) -> None:
        self._model = _load_classifier(source, root, compute)
        self._device = compute.device

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (n, 3, H, W) -> features (n, D) and logits (n, classes) on the CPU."""
        pictures = pictures.to(self._device)
        logits = self._model.logits(pictures)
        # the heads are independent given the picture, so the joint distribution is their product
        shape, colour = (logits[name].log_softmax(-1) for name in ("shape", "colour"))
        return self._model.features(pictures).cpu(), (shape[:, :, None] + colour[:, None, :]).flatten(1).cpu()


class InceptionBackbone:
    """Inception v3 with the weights of the FID paper, as torch-fidelity has it (what torchmetrics uses, too)."""

    name = "inception-v3"

    def __init__(self, weights: Path | None, features: int, compute: Compute) -> None:
        """
        Args:
            weights: `pt_inception-2015-12-05-6726825d.pth`; downloaded where none is given.
            features: the layer that is looked at: 64, 192, 768 or 2048.

        Raises:
            ConfigError: torch-fidelity is not installed.
            InputError: other weights, or no way to get them.
        """
        try:
            inception = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError:
            raise ConfigError(
                "backbone inception-v3 needs torch-fidelity with torchvision: pip install torch-fidelity "
                "(or set backbone to classifier, for the tiny world)"
            ) from None
        self._model = inception.FeatureExtractorInceptionV3(
            "inception-v3-compat",
            [str(features), "logits_unbiased"],
            feature_extractor_weights_path=str(inception_weights(weights, inception.URL_INCEPTION_V3)),
        ).to(start_compute(compute))
        self._model.eval()  # torch-fidelity leaves that to its caller; else a batch changes its pictures' features
        self._device = compute.device

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (n, 3, H, W) -> features (n, D) and logits (n, 1008) on the CPU; resized without antialiasing."""
        features, logits = self._model(pictures.to(self._device))
        return features.cpu(), logits.cpu()


def inception_weights(given: Path | None, url: str) -> Path:
    """The file of Inception's weights, known by its hash: torch-fidelity unpickles it, which can run code.

    Raises:
        InputError: the file is missing, can't be downloaded, or has another hash.
    """
    path = given or Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION
    if given is None and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), _INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{url}: {_first_line(error)}. Put the file at {path}, or set inception to it") from None
    require_weights("inception", path, _INCEPTION, _INCEPTION_SHA256)
    return path


def _load_classifier(source: str, root: Path, compute: Compute):
    from m2m.tiny.classifier import Classifier

    try:
        loaded = Classifier.from_pretrained(model_folder(source, root))
        realigned(loaded)
        return loaded.to(start_compute(compute)).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{source}: not a classifier of the tiny world: {_first_line(error)}") from None


def _normalisation(folder: Path) -> tuple[Tensor, Tensor]:
    said = folder / "preprocessor_config.json"
    values = json.loads(said.read_text()) if said.is_file() else {}
    mean, std = values.get("image_mean", _CLIP_MEAN), values.get("image_std", _CLIP_STD)
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


def _resized(pictures: Tensor, size: int, mode: str) -> Tensor:
    """uint8 pictures as floats in [0, 1], the shorter side brought to `size`, the middle cut out."""
    pixels = pictures.float() / 255
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels
    scale = size / min(height, width)
    scaled = (round(height * scale), round(width * scale))
    pixels = F.interpolate(pixels, scaled, mode=mode, align_corners=False, antialias=True).clamp(0, 1)
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return pixels[..., top : top + size, left : left + size]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
