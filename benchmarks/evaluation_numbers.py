"""FID, IS and CLIP scores against independent references: SciPy, the Gaussians' closed form, torchmetrics.

Run `python -m benchmarks.evaluation_numbers`; the last line is one JSON object.
"""

import functools
import json
import operator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import scipy.special
import torch

from m2m.config import Compute
from m2m.evaluation.encoders import Clip
from m2m.evaluation.measures import Moments, clip_scores, frechet_distance, inception_score

_ROOT = Path(__file__).resolve().parents[1]
_CLIP = "m2m/tiny/weights/clip"
REACH = {
    "fid_against_scipy": 1e-6,
    "fid_against_closed_form": 1e-6,
    "fid_of_itself": 1e-6,
    "fid_by_parts": 1e-9,
    "is_against_scipy": 1e-6,
    "is_by_order": 1e-9,
    "clip_against_torchmetrics": 1e-5,
}
"""Relative but for `fid_of_itself`; CLIP scores in torchmetrics' unit of cosines."""


def main() -> None:
    drawn = np.random.default_rng(0)
    figures: dict[str, float] = {}
    x = drawn.normal(size=(1500, 256)) @ drawn.normal(size=(256, 256)) * 0.1
    y = np.abs(drawn.normal(size=(1200, 256)))
    found = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    figures["fid_against_scipy"] = _off(found, _fid_by_scipy(x, y))
    figures["fid_against_closed_form"] = _closed_form(drawn)
    figures["fid_of_itself"] = abs(frechet_distance(torch.from_numpy(x), torch.from_numpy(x)))
    parts = [Moments.of(torch.from_numpy(part)) for part in np.array_split(drawn.permutation(x), 37)]
    halves = [functools.reduce(operator.add, parts[i::4]) for i in range(4)]
    together = functools.reduce(operator.add, halves)
    figures["fid_by_parts"] = _off(frechet_distance(together, torch.from_numpy(y)), found)
    logits = drawn.normal(0, 3, (5000, 100))
    p = scipy.special.softmax(logits, 1)
    expected = float(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    score = inception_score(torch.from_numpy(logits))
    figures["is_against_scipy"] = _off(score, expected)
    figures["is_by_order"] = _off(inception_score(torch.from_numpy(drawn.permutation(logits))), score)
    figures["clip_against_torchmetrics"] = _clip()
    for name, value in figures.items():
        print(f"{name:28} {value:.2e}  (at most {REACH[name]:.0e})")
    ok = all(value <= REACH[name] for name, value in figures.items())
    print(json.dumps({"name": "evaluation_numbers", "figures": figures, "reach": REACH, "ok": ok}))


def _fid_by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(np.asarray(scipy.linalg.sqrtm(s1 @ s2)))
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s1 + s2 - 2 * root))


def _closed_form(drawn: np.random.Generator) -> float:
    """Samples with exactly these moments; covariances that commute, so that the distance is known."""
    basis = np.linalg.qr(drawn.normal(size=(64, 64)))[0]
    first, second = np.geomspace(1e-4, 10, 64), np.geomspace(5, 1e-3, 64)
    means = drawn.normal(size=(2, 64))
    samples = []
    for deviations, mean, count in zip((first, second), means, (400, 500)):
        white = drawn.normal(size=(count, 64))
        white -= white.mean(0)
        white = white @ np.linalg.inv(np.linalg.cholesky(white.T @ white / (count - 1))).T
        samples.append(torch.from_numpy(white * deviations @ basis.T + mean))
    expected = np.square(means[0] - means[1]).sum() + np.square(first - second).sum()
    return _off(frechet_distance(*samples), float(expected))


def _clip() -> float:
    """torchmetrics with the model in its hands, against encoding once and scoring later."""
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPModel, CLIPTokenizer

    model: Any = CLIPModel.from_pretrained(_ROOT / _CLIP).eval()
    tokenizer = CLIPTokenizer.from_pretrained(_ROOT / _CLIP)
    clip = Clip(_CLIP, _ROOT, Compute(threads=1))
    size = model.config.vision_config.image_size

    class Model:
        config = model.config

        def to(self, _: Any) -> "Model":
            return self

        def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
            return model.get_image_features(pixel_values=pixels).pooler_output

        def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return model.get_text_features(ids, mask).pooler_output

    def processor(images: Any = None, text: Any = None, **_: Any) -> Any:
        if text is not None:
            return tokenizer(text, return_tensors="pt", padding=True)
        pixels = torch.stack(list(images)).float() / 255
        return {"pixel_values": (pixels - clip._mean) / clip._std}

    pictures = torch.randint(0, 256, (16, 3, size, size), dtype=torch.uint8)
    captions = [
        f"{count} {colour} stars" for count in ("two", "three") for colour in ("red", "green", "blue", "cyan")
    ] * 2
    metric = CLIPScore(lambda: (Model(), processor))  # type: ignore[arg-type,return-value]
    with torch.inference_mode():
        metric.update(list(pictures), captions)
    ours = clip_scores(clip.pictures(pictures), clip.texts(captions)).mean().item()
    return abs(max(ours, 0.0) - metric.compute().item()) / 100


def _off(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


if __name__ == "__main__":
    main()
