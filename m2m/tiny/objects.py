"""Solid objects seen from posed cameras, in the layout of zero123's Objaverse renders.

Belongs here: objects, cameras, a flat-shading renderer, and the files. Not here: reading them (m2m.data.objaverse).

Layout: `valid_paths.json` beside `<object>/NNN.png` (RGBA; alpha 0 is background) and `<object>/NNN.npy` (float64, 3x4,
`[R, T]` from world to camera in Blender's axes: the camera looks along its own -z, y is up, so T_z < 0).
"""

import colorsys
import itertools
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VIEWS = 12
_FIELD_OF_VIEW = 0.8569  # radians: Blender's 35 mm lens on its 32 mm film, zero123's setting
_LIGHT = np.array([0.35, -0.5, 0.79])


def sample_object(rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """A body with a smaller part on top and another at one side, so that no two views look alike.

    Returns:
        Triangles (n, 3, 3), anticlockwise seen from outside, within about 0.6 of the origin; their colours (n, 3).
    """
    hue = rng.random()
    kinds = rng.choice(4, size=3)
    body = rng.uniform(0.2, 0.27, 3)
    top, side = rng.uniform(0.14, 0.19, 3), rng.uniform(0.12, 0.18, 3)
    low = -0.8 * top[2]
    places = [
        (kinds[0], body, (0.0, 0.0, low)),
        (kinds[1], top, (rng.uniform(-0.06, 0.06), rng.uniform(-0.06, 0.06), low + body[2] + top[2] * 0.9)),
        (kinds[2], side, (body[0] + side[0] * 0.8, rng.uniform(-0.08, 0.08), low + rng.uniform(-0.08, 0.08))),
    ]
    triangles, colours = [], []
    for place, (kind, half, centre) in enumerate(places):
        part = _solid(int(kind)) * half + np.array(centre)
        triangles.append(part)
        colour = colorsys.hsv_to_rgb((hue + place * 0.37) % 1, 0.75, 0.9)
        colours.append(np.broadcast_to(colour, (len(part), 3)))
    return np.concatenate(triangles), np.concatenate(colours)


def sample_cameras(rng: np.random.Generator, count: int = VIEWS) -> NDArray[np.float64]:
    """`count` cameras all around the object at different heights, each looking at the origin: (count, 3, 4)."""
    azimuth = 2 * np.pi * (np.arange(count) + rng.uniform(-0.3, 0.3, count)) / count
    elevation = np.radians(rng.uniform(-5, 50, count))
    distance = rng.uniform(1.7, 2.1, count)
    return np.stack([look_at_origin(*pose) for pose in zip(azimuth, elevation, distance)])


def look_at_origin(azimuth: float, elevation: float, distance: float) -> NDArray[np.float64]:
    """World-to-camera `[R, T]`, (3, 4), of a camera at these spherical coordinates (radians; z is up)."""
    flat = np.cos(elevation)
    backward = np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)])
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(backward, right), backward])
    return np.concatenate([rotation, -rotation @ (backward * distance)[:, None]], axis=1)


def render(triangles: NDArray, colours: NDArray, camera: NDArray, size: int = 64) -> NDArray[np.uint8]:
    """The object seen by `camera`, flat-shaded: (size, size, 4) RGBA, uint8. Edges are smooth: drawn double, halved."""
    wide = 2 * size
    points = triangles @ camera[:, :3].T + camera[:, 3]
    focal = wide / 2 / np.tan(_FIELD_OF_VIEW / 2)
    # The camera looks along -z, and rows count downwards.
    column = wide / 2 + focal * points[..., 0] / -points[..., 2]
    row = wide / 2 - focal * points[..., 1] / -points[..., 2]
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    bright = 0.4 + 0.6 * np.clip(normals @ (_LIGHT / np.linalg.norm(_LIGHT)), 0, 1)
    depth = np.full((wide, wide), -np.inf)
    picture = np.zeros((wide, wide, 4))
    pixels = [centres + 0.5 for centres in np.ogrid[:wide, :wide]]
    for place in range(len(triangles)):
        (x0, x1, x2), (y0, y1, y2) = column[place], row[place]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if area >= 0:  # seen from behind (or edge-on): rows count downwards, so the front is the negative side
            continue
        box = tuple(slice(max(0, int(min(ends))), max(0, int(max(ends)) + 1)) for ends in (row[place], column[place]))
        y, x = pixels[0][box[0]], pixels[1][:, box[1]]
        first = ((x1 - x) * (y2 - y) - (x2 - x) * (y1 - y)) / area
        second = ((x2 - x) * (y0 - y) - (x0 - x) * (y2 - y)) / area
        third = 1 - first - second
        # 1/z, not z, is linear across the screen; it falls without bound as points come nearer.
        near = -(first / points[place, 0, 2] + second / points[place, 1, 2] + third / points[place, 2, 2])
        seen = (first >= 0) & (second >= 0) & (third >= 0) & (near > depth[box])
        depth[box][seen] = near[seen]
        picture[box][seen] = [*(colours[place] * bright[place]), 1.0]
    parts = picture.reshape(size, 2, size, 2, 4).mean(axis=(1, 3))
    parts[..., :3] /= np.maximum(parts[..., 3:], 1e-6)  # colours are not darkened where alpha is partial
    return np.rint(parts * 255).astype(np.uint8)


def write_objects(folder: Path, count: int, seed: int) -> None:
    """`count` objects of twelve views each, in zero123's layout."""
    names = [f"object_{place:05d}" for place in range(count)]
    for place, name in enumerate(names):
        rng = np.random.default_rng([seed, place])
        triangles, colours = sample_object(rng)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for view, camera in enumerate(sample_cameras(rng)):
            Image.fromarray(render(triangles, colours, camera)).save(folder / name / f"{view:03d}.png")
            np.save(folder / name / f"{view:03d}.npy", camera)
    (folder / "valid_paths.json").write_text(json.dumps(names, indent=0) + "\n")


def _solid(kind: int) -> NDArray:
    """A box, a pyramid, a ball or a round column in the cube from -1 to 1, as triangles (n, 3, 3)."""
    if kind == 0:
        return _lathe([(1.4142, -1), (1.4142, 1)], sides=4)
    if kind == 1:
        return _lathe([(1.4142, -1), (0, 1)], sides=4)
    if kind == 2:
        turns = np.linspace(-np.pi / 2, np.pi / 2, 6)
        return _lathe([(np.cos(turn), np.sin(turn)) for turn in turns], sides=10)
    return _lathe([(0.9, -1), (0.9, 1)], sides=10)


def _lathe(profile: list[tuple[float, float]], sides: int) -> NDArray:
    """The solid of a profile (radius, height), given from bottom to top, turned about z and closed at both ends."""
    profile = [(0.0, profile[0][1]), *profile, (0.0, profile[-1][1])]
    angles = 2 * np.pi * (np.arange(sides + 1) + 0.5) / sides
    rings = np.array([[(r * np.cos(a), r * np.sin(a), z) for a in angles] for r, z in profile])
    triangles = []
    for lower, upper in itertools.pairwise(rings):
        for left in range(sides):
            a, b, c, d = lower[left], lower[left + 1], upper[left + 1], upper[left]
            triangles += [(a, b, c), (a, c, d)]
    found = np.array(triangles)
    size = np.linalg.norm(np.cross(found[:, 1] - found[:, 0], found[:, 2] - found[:, 0]), axis=1)
    return found[size > 1e-9]  # those at the axis are empty
