"""Category sets that stand for real photographs: `<category>/<subject>/NN.png`.

Belongs here: a rendering style that no model has seen (light falling from one side, soft focus, grain) and the files.
Not here: reading folders of photographs (m2m.data).
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m2m.tiny.world import ATTRIBUTES, SIZE, Scene, draw, sample_scene


def photograph(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture of `scene` as a camera might see it, (64, 64, 3) uint8."""
    picture = draw(scene, rng).astype(np.float64) / 255
    blurred = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    blurred = (blurred[:-2] + 2 * blurred[1:-1] + blurred[2:]) / 4
    blurred = (blurred[:, :-2] + 2 * blurred[:, 1:-1] + blurred[:, 2:]) / 4
    angle, (y, x) = rng.uniform(0, 2 * np.pi), (np.mgrid[:SIZE, :SIZE] - SIZE / 2) / SIZE
    light = 0.88 + 0.24 * (x * np.cos(angle) + y * np.sin(angle))
    tint = rng.uniform(0.95, 1.0, 3)
    noisy = blurred * light[..., None] * tint + rng.normal(0, 0.015, picture.shape)
    return np.rint(np.clip(noisy, 0, 1) * 255).astype(np.uint8)


def write_photo_sets(folder: Path, count: int, seed: int) -> None:
    """For each shape of the world a category of `count` photographs of two subjects, unlike in colour and texture."""
    for place, shape in enumerate(ATTRIBUTES["shape"]):
        rng = np.random.default_rng([seed, place])
        colours = rng.choice(ATTRIBUTES["colour"], 2, replace=False)
        textures = rng.choice(ATTRIBUTES["texture"], 2, replace=False)
        for subject, (colour, texture) in enumerate(zip(colours, textures)):
            where = folder / shape / f"{texture}_{colour}_{shape}"
            where.mkdir(parents=True, exist_ok=True)
            for number in range(count // 2 + (subject < count % 2)):
                fixed = {"shape": shape, "colour": str(colour), "texture": str(texture)}
                Image.fromarray(photograph(sample_scene(rng, fixed), rng)).save(where / f"{number:02d}.png")
