"""The default run's inputs: captions, objects, procedures and photo sets, small enough to live in git.

Belongs here: the caption file, and one function that writes all four. Not here: how each is drawn.
"""

from pathlib import Path

import numpy as np

from m2m.tiny.objects import write_objects
from m2m.tiny.photo_sets import write_photo_sets
from m2m.tiny.procedures import write_procedures
from m2m.tiny.world import sample_caption


def write_inputs(
    folder: Path, captions: int = 400, objects: int = 24, articles: int = 60, photos: int = 8, seed: int = 0
) -> None:
    """Write all inputs into `folder`; equal arguments give equal bytes. A count of 0 leaves that kind out."""
    folder.mkdir(parents=True, exist_ok=True)
    if captions:
        write_captions(folder / "captions.tsv", captions, seed)
    if objects:
        write_objects(folder / "objaverse", objects, seed)
    if articles:
        write_procedures(folder / "vgsi", articles, seed)
    if photos:
        write_photo_sets(folder / "photo_sets", photos, seed)


def write_captions(path: Path, count: int, seed: int) -> None:
    """CC12M's layout, `url<TAB>caption`: `count` good rows, and among them three that a filter must reject."""
    rng = np.random.default_rng([seed, count])
    rows = [f"https://example.org/{place:08d}.png\t{sample_caption(rng)}" for place in range(count)]
    long = "a very long story about " + " and ".join(sample_caption(rng) for _ in range(12))
    bad = ["https://example.org/no-tab.png", "https://example.org/empty.png\t", f"https://example.org/long.png\t{long}"]
    for place, row in enumerate(bad):
        rows.insert((place + 1) * count // 4, row)
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8", newline="\n")
