"""The shipped tiny models by name: `ManyToManyPipeline.from_pretrained("tiny")` needs no folder and no training.

Belongs here: putting the shipped parts together. Not here: the parts (`m2m/tiny/weights`), what trains them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from m2m.models.text_to_image import load_ddim, load_dino, load_vae
from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.pipelines.model_card import CardFacts
from m2m.tiny import EMBEDDED, WEIGHTS
from m2m.training.starting import continued_unet


@contextmanager
def saved(name: str) -> Iterator[Path]:
    """A folder of the pipeline of this name in `EMBEDDED`, for as long as the context is open."""
    variant = EMBEDDED[name]
    text_to_image, many_to_many = WEIGHTS / "stable-diffusion", WEIGHTS / f"m2m-{variant}"
    dino = load_dino(WEIGHTS / "dinov2") if variant == "dino" else None
    unet = continued_unet(many_to_many, variant, None if dino is None else dino.config.hidden_size, {})
    pipeline = ManyToManyPipeline(load_vae(text_to_image), unet, load_ddim(many_to_many), dino)
    pipeline.card = CardFacts(many_to_many.name, label="tiny", licence="mit")
    with TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        yield Path(folder)
