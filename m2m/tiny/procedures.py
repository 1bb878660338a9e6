"""Step-by-step procedures: drawings that are completed in four to six steps, in the layout of VGSI's wikiHow release.

Belongs here: the steps and the files. Not here: reading such files (m2m.data.vgsi).

Layout: `WikihowText_data.json` (JSON Lines, one article a line) and `wiki_images/{train,test}/<step_id>.png`, where a
step's id is `<article>_<method>_<step>`.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m2m.tiny.world import ATTRIBUTES, Scene, arrange, describe, paint, sample_scene

_ORDINALS = ("first", "second", "third")
_TEST_SHARE = 10  # every tenth article


def sample_procedure(rng: np.random.Generator) -> tuple[Scene, list[tuple[str, NDArray[np.uint8]]]]:
    """The scene that is drawn, and each step's headline with the drawing as it stands after it."""
    while True:
        scene = sample_scene(rng)
        layout = arrange(scene, rng)
        count = ATTRIBUTES["count"].index(scene.count) + 1
        bare = replace(scene, texture="outlined")
        steps = [(f"Paint the background {scene.background}.", paint(bare, layout, shapes=0))]
        for done in range(1, count + 1):
            which = "" if count == 1 else _ORDINALS[done - 1] + " "
            headline = f"Draw the outline of the {which}{scene.shape} in {scene.colour}."
            steps.append((headline, paint(bare, layout, shapes=done)))
        if scene.texture != "outlined":
            what = describe({"shape": scene.shape, "count": scene.count}).removeprefix("one ")
            steps.append((f"Fill in the {what}.", paint(replace(scene, texture="solid"), layout)))
            if scene.texture != "solid":
                verb = "Add light stripes to" if scene.texture == "striped" else "Shade the lower half of"
                steps.append((f"{verb} the {what}.", paint(scene, layout)))
        if 4 <= len(steps) <= 6:
            return scene, steps


def write_procedures(folder: Path, count: int, seed: int) -> None:
    """`count` articles of one method each."""
    lines = []
    for place in range(count):
        scene, steps = sample_procedure(np.random.default_rng([seed, place]))
        part = "test" if place % _TEST_SHARE == _TEST_SHARE - 1 else "train"
        images = folder / "wiki_images" / part
        images.mkdir(parents=True, exist_ok=True)
        article = 10_000_000 + place
        told = []
        for step, (headline, picture) in enumerate(steps):
            step_id = f"{article}_0_{step}"
            Image.fromarray(picture).save(images / f"{step_id}.png")
            told.append(
                {
                    "headline": headline,
                    "description": "",
                    "img": f"{step_id}.png",
                    "img_license": "drawn for this project",
                    "step_id": step_id,
                }
            )
        full = describe({name: getattr(scene, name) for name in ATTRIBUTES})
        lines.append(
            {
                "file_id": article,
                "goal": f"How to Draw {full}",
                "goal_description": f"A drawing of {full}, step by step.",
                "category_hierarchy": ["Arts and Entertainment", "Drawing", describe({"shape": scene.shape}).title()],
                "methods": [{"name": "Steps", "steps": told}],
            }
        )
    (folder / "WikihowText_data.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
