"""The embedded default: a small picture world, inputs drawn from it, and small models of the paper's classes.

Belongs here: everything the default run needs and cannot download. Not here: anything that works on the paper's models
(those stages take a model folder, and the ones in `m2m/tiny/weights` are just folders).
"""

from pathlib import Path

ROOT = Path(__file__).parent
DATA = ROOT / "data"
WEIGHTS = ROOT / "weights"
EMBEDDED = {"tiny": "dino", "tiny-dino": "dino", "tiny-self": "self"}
"""Names that `ManyToManyPipeline.from_pretrained` knows without a folder, and the variant of each."""
