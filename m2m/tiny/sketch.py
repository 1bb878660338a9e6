"""A second renderer of the picture world: the same attributes, drawn as no training has seen them.

Belongs here: sketches, and the choice between renderers. Not here: the world's own drawing (`m2m.tiny.world`).

To see whether what a model learned of sets carries over to pictures that look different (the paper's zero-shot claim).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from m2m.tiny.world import SIZE, Scene, arrange, draw, paint

Renderer = Literal["world", "sketch"]
_TURN = 0.5  # radians to either side; the world's own shapes turn by 0.2
_WOBBLE = 1.1  # pixels that a line strays by
_GRAIN = 0.035  # deviation of the paper's grain, of the full range
_LIGHT = 0.14  # by how much a picture is lighter on one side than in its middle
_INK = 0.75  # how dark contours are


def sketch(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One picture of `scene`, (64, 64, 3) uint8: wobbly shapes with ink contours on grainy paper, lit from one side."""
    layout = arrange(scene, rng)
    layout = replace(layout, angles=rng.uniform(-_TURN, _TURN, len(layout.angles)).astype(np.float32))
    picture = paint(scene, layout).astype(np.float32) / 255
    there = np.abs(picture - layout.ground).max(-1) > 0.1
    edge = np.zeros_like(there)
    for axis in (0, 1):
        edge |= there != np.roll(there, 1, axis)
    edge[0] = edge[:, 0] = False  # rolling joins opposite borders
    picture[edge] *= 1 - _INK
    picture = _strayed(picture, rng)
    across, down = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE))
    towards = rng.uniform(0, 2 * np.pi)
    light = _LIGHT * (across * np.cos(towards) + down * np.sin(towards))
    grain = rng.normal(0, _GRAIN, (SIZE, SIZE))
    return np.rint(np.clip(picture + (light + grain)[..., None], 0, 1) * 255).astype(np.uint8)


RENDERERS: dict[Renderer, Callable[[Scene, np.random.Generator], NDArray[np.uint8]]] = {"world": draw, "sketch": sketch}


def _strayed(picture: NDArray, rng: np.random.Generator) -> NDArray:
    """Each pixel from a little beside its place, smoothly: lines wobble."""
    at = np.arange(SIZE)
    waves = [rng.uniform(0.5, 1.0) * _WOBBLE * np.sin(at * rng.uniform(0.25, 0.6) + rng.uniform(0, 6)) for _ in "xy"]
    down = np.clip(np.rint(at[:, None] + waves[0][None, :]), 0, SIZE - 1).astype(int)
    across = np.clip(np.rint(at[None, :] + waves[1][:, None]), 0, SIZE - 1).astype(int)
    return picture[down, across]
