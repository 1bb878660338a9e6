"""The picture world: 64x64 pictures drawn from five named attributes, and the captions that name them.

Belongs here: attributes, drawing, captions and their inverse. Not here: files (m2m.tiny.inputs) and models.

A picture shows one to three equal shapes. What a caption does not name varies freely within its image set, and so do
position, size, rotation and the exact hue always. Everything is drawn large and coarse, because an autoencoder that
shrinks pictures eightfold loses shapes and textures of a few pixels.
"""

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

SIZE = 64
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "star", "heart", "cross"),
    "colour": ("red", "yellow", "green", "cyan", "blue", "purple"),
    "count": ("one", "two", "three"),
    "background": ("white", "black", "grey", "beige", "brown"),
    "texture": ("solid", "striped", "outlined", "two-tone"),
}

_NOTHING: Mapping[str, str] = MappingProxyType({})
_HUES = {"red": 0.0, "yellow": 56.0, "green": 122.0, "cyan": 182.0, "blue": 230.0, "purple": 290.0}
_HUE_SPREAD = 8.0  # degrees to either side: nearest neighbours stay 32 degrees apart
_BACKGROUNDS = {
    "white": (0.96, 0.96, 0.96),
    "black": (0.05, 0.05, 0.06),
    "grey": (0.55, 0.56, 0.58),
    "beige": (0.90, 0.80, 0.62),
    "brown": (0.38, 0.24, 0.14),
}
_RADII = {1: (18.0, 24.0), 2: (13.0, 15.5), 3: (11.0, 12.5)}
_Y, _X = (axis.astype(np.float32) + 0.5 for axis in np.mgrid[:SIZE, :SIZE])


@dataclass(frozen=True)
class Scene:
    """One value for each attribute: all that a full caption says about a picture."""

    shape: str
    colour: str
    count: str
    background: str
    texture: str

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name))

    def labels(self) -> tuple[int, ...]:
        """Index of each value in `ATTRIBUTES`, in its order."""
        return tuple(values.index(getattr(self, name)) for name, values in ATTRIBUTES.items())


@dataclass(frozen=True)
class Layout:
    """What varies between pictures of one scene: places, sizes, turns and the exact paints (RGB in 0..1)."""

    centres: NDArray[np.float32]  # (count, 2), x and y in pixels
    radii: NDArray[np.float32]  # (count,)
    angles: NDArray[np.float32]  # (count,), radians
    paint: NDArray[np.float32]  # (3,)
    ground: NDArray[np.float32]  # (3,)


def sample_scene(rng: np.random.Generator, fixed: Mapping[str, str] = _NOTHING) -> Scene:
    """A scene with the values in `fixed`, the others uniform. Draws all five in any case, so streams stay aligned."""
    for name, value in fixed.items():
        _check(name, value)
    drawn = {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}
    return Scene(**{**drawn, **fixed})


def arrange(scene: Scene, rng: np.random.Generator) -> Layout:
    """Place the scene's shapes without overlap and choose its paints."""
    count = ATTRIBUTES["count"].index(scene.count) + 1
    low, high = _RADII[count]
    radii = rng.uniform(low, high, count)
    margin = radii.max() + 1.5
    while True:
        # Tries come in blocks: a three-shape layout fits about one time in ten.
        tries = rng.uniform(margin, SIZE - margin, (32, count, 2))
        apart = np.linalg.norm(tries[:, :, None] - tries[:, None, :], axis=-1)
        apart += np.eye(count) * SIZE * 2
        fits = (apart >= radii[:, None] + radii[None, :] + 1.0).all(axis=(1, 2))
        if fits.any():
            break
    hue = _HUES[scene.colour] + rng.uniform(-_HUE_SPREAD, _HUE_SPREAD)
    paint = colorsys.hsv_to_rgb(hue / 360 % 1, rng.uniform(0.82, 0.95), rng.uniform(0.8, 0.95))
    ground = np.clip(np.array(_BACKGROUNDS[scene.background]) + rng.uniform(-0.03, 0.03, 3), 0, 1)
    return Layout(
        centres=tries[fits.argmax()].astype(np.float32),
        radii=radii.astype(np.float32),
        angles=rng.uniform(-0.2, 0.2, count).astype(np.float32),
        paint=np.array(paint, np.float32),
        ground=ground.astype(np.float32),
    )


def paint(scene: Scene, layout: Layout, shapes: int | None = None) -> NDArray[np.uint8]:
    """The picture of `scene` as arranged in `layout`; with `shapes`, only the first so many of them.

    Returns:
        uint8, (64, 64, 3).
    """
    picture = np.broadcast_to(layout.ground, (SIZE, SIZE, 3)).copy()
    for (x, y), radius, angle in list(zip(layout.centres, layout.radii, layout.angles, strict=True))[:shapes]:
        cos, sin = np.cos(angle), np.sin(angle)
        u, v = (_X - x) * cos - (_Y - y) * sin, (_X - x) * sin + (_Y - y) * cos
        distance = _distance(scene.shape, u, v, radius)
        cover, colour = _texture(scene.texture, distance, u, v, radius, layout.paint)
        picture += cover[..., None] * (colour - picture)
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def draw(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One picture of `scene`, (64, 64, 3) uint8; everything a scene leaves open is drawn from `rng`."""
    return paint(scene, arrange(scene, rng))


def describe(named: Mapping[str, str]) -> str:
    """A caption that names these attributes and no others: "three striped red stars on a black background".

    Without a count the shapes stand in the plural with no number before them ("red stars").
    """
    for name, value in named.items():
        _check(name, value)
    noun = named.get("shape", "shape")
    if named.get("count") != "one":
        noun = "crosses" if noun == "cross" else noun + "s"
    words = [named[name] for name in ("count", "texture", "colour") if name in named] + [noun]
    ground = f" on a {named['background']} background" if "background" in named else ""
    return " ".join(words) + ground


def read_caption(caption: str) -> dict[str, str]:
    """The attributes that a caption of `describe` names, in the order of `ATTRIBUTES`; other words are passed over."""
    words = set(caption.lower().split())
    singular = words | {word.removesuffix("s") for word in words} | {word.removesuffix("es") for word in words}
    found = {}
    for name, values in ATTRIBUTES.items():
        for value in values:
            if value in (singular if name == "shape" else words):
                found[name] = value
    return found


def sample_caption(rng: np.random.Generator) -> str:
    """A caption that names a random subset of a random scene: the shape nearly always, others two times in three."""
    scene = sample_scene(rng)
    chances = {"shape": 0.97}
    named = {name: getattr(scene, name) for name in ATTRIBUTES if rng.random() < chances.get(name, 2 / 3)}
    return describe(named)


def _check(name: str, value: str) -> None:
    if name not in ATTRIBUTES:
        raise ValueError(f"{name!r} is not an attribute of the world; it has {', '.join(ATTRIBUTES)}")
    if value not in ATTRIBUTES[name]:
        raise ValueError(f"{value!r} is not a {name} of the world; it has {', '.join(ATTRIBUTES[name])}")


def _distance(shape: str, x: NDArray, y: NDArray, r: float) -> NDArray:
    """Signed distance in pixels, exact near the edge and negative inside, of a shape within radius r. y points down."""
    if shape == "circle":
        return np.hypot(x, y) - r * 0.95
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - r * 0.78
    if shape == "triangle":
        return np.maximum(np.abs(x) * 0.866 - (y - r * 0.12) * 0.5, y - r * 0.12) - r * 0.52
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        arm = r * 0.33
        return np.minimum(np.maximum(x - arm, y - r * 0.95), np.maximum(y - arm, x - r * 0.95))
    if shape == "heart":
        # A square standing on its corner, with a disc on each of its two upper sides.
        half, y = r * 0.58, y - r * 0.16
        block = np.maximum(np.abs(x + y), np.abs(x - y)) * 0.7071 - half
        disc = np.hypot(np.abs(x) - half * 0.7071, y + half * 0.7071) - half
        return np.minimum(block, disc)
    # A star: fold the plane onto one half of one of five points, whose edge is a straight line.
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    inner = 0.45 * r
    edge = np.array([inner * np.cos(np.pi / 5) - r, inner * np.sin(np.pi / 5)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (along - r) * normal[0] + across * normal[1]


def _texture(
    texture: str, distance: NDArray, x: NDArray, y: NDArray, r: float, colour: NDArray
) -> tuple[NDArray, NDArray]:
    """How much each pixel is covered (64, 64) and with which colour (3,) or (64, 64, 3)."""
    cover = np.clip(0.5 - distance, 0, 1)
    if texture == "outlined":
        width = 0.2 * r + 1.0
        return np.clip(0.5 - (np.abs(distance + width / 2) - width / 2), 0, 1), colour
    if texture == "striped":
        # Slanted bands with a light one through the middle; the smallest shapes still show three of them.
        width = max(7.0, r * 0.42)
        band = np.abs(((x + y) * 0.7071 + width) % (2 * width) - width)
        light = np.clip(0.5 + width / 2 - band, 0, 1)[..., None]
        return cover, colour + light * 0.65 * (1 - colour)
    if texture == "two-tone":
        dark = np.clip(0.5 + y, 0, 1)[..., None]
        return cover, colour - dark * 0.65 * colour
    return cover, colour
