"""`python -m m2m` with the registry's own stages and a little work in each: it reads its inputs, and has a source.

What is tested with it is what is recorded: manifests, runs, the settings' identities are the real ones.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from m2m import artifacts  # noqa: E402
from m2m.config import ModelSource, Profile, SourcePath, StageConfig  # noqa: E402
from m2m.evaluation.curves import CURVES, write_curves  # noqa: E402
from m2m.stage_run import StageRun  # noqa: E402
from m2m.stages import STAGES, Stage  # noqa: E402

if TYPE_CHECKING:
    from orchestration.lineage.recording import Recording

PROFILE = """\
label: toys
filter-captions: {source: captions.tsv}
generate-sets: {value: 2}
cache-features: {value: 3}
pretrain: {source: weights, variants: {self: {value: 4}, dino: {value: 5}}}
finetune: {value: 6}
evaluate: {value: 7}
report: {value: 8}
"""


class Toy(StageConfig):
    """What a toy stage reads."""

    source: SourcePath | None = None
    hub: ModelSource | None = None
    value: int = 1
    seed: int = 0


def toy(config: Toy, run: StageRun) -> None:
    """Write what was read; what a model or an evaluation has beside it, too."""
    read = [path.read_text() for folder in run.inputs.values() for path in sorted(folder.glob("made.txt"))]
    text = f"{run.stage.key} {config.value} from {len(''.join(read))}\n"
    artifacts.write_bytes(run.out / "made.txt", text.encode())
    if run.stage.group == "models":
        _write_model(run.out, config.value)
    if run.stage.command == "evaluate":
        run.figure(fid_self=1.5 * config.value, fid_dino=2.0 * config.value)
    if run.stage.command == "report":
        curve = {"preceding views": [1.0, 2.0], "M2M-DINO": [0.5, 0.1 * config.value]}
        write_curves(
            run.out / CURVES,
            "evaluate-novel_views",
            "Novel views",
            {"DINO likeness by number of preceding views": curve},
        )
    run.count(made=1)
    for check in run.stage.checks:
        run.check(check, True, "")


CARD = """\
---
library_name: diffusers
license: other
license_name: as-of-the-model-it-was-initialised-from
m2m:
  label: toys
  licence: other
---

# A toy (toys)

| | |
|---|---|
| licence | that of the model it was initialised from |

## Use
"""


def _write_model(folder: Path, value: int) -> None:
    """A folder of a pipeline's layout whose one tensor holds `value`; the card is as a pipeline's is saved."""
    import numpy as np
    from safetensors.numpy import save

    (folder / "unet").mkdir(exist_ok=True)
    index = {"_class_name": "ManyToManyPipeline", "unet": ["m2m.models.unet", "ManyToManyUNet"]}
    artifacts.write_json(folder / "model_index.json", index)
    artifacts.write_json(folder / "unet" / "config.json", {"_class_name": "ManyToManyUNet"})
    artifacts.write_bytes(folder / "README.md", CARD.encode())
    weights = save({"weight": np.full(4, value, np.float32)})
    artifacts.write_bytes(folder / "unet" / "diffusion_pytorch_model.safetensors", weights)
    artifacts.write_bytes(folder / "training_log.jsonl", json.dumps({"step": 1, "loss": 1.0}).encode() + b"\n")


def lay_ground(root: Path) -> None:
    """A project folder: a profile, the sources that it names."""
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "tiny.yaml").write_text(PROFILE)
    (root / "captions.tsv").write_text("https://example.org/1\ta red circle\n")
    (root / "weights").mkdir()
    (root / "weights" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Weights\n")
    (root / "weights" / "w.bin").write_bytes(b"w")


def toys() -> dict[str, Stage]:
    """The registry with the toy in every stage."""
    named = {key: {f: getattr(stage, f) for f in Stage.__dataclass_fields__} for key, stage in STAGES.items()}
    return {key: Stage(**{**said, "function": f"{Path(__file__).stem}:toy"}) for key, said in named.items()}


def recording(profile: Profile, key: str, run_id: str = "a-run") -> "Recording":
    """An output that stands, as a recorder is told of it."""
    from orchestration.lineage.recording import Recording  # which brings Dagster: a toy's command does without

    manifest = artifacts.read_manifest(STAGES[key].folder(profile))
    assert manifest is not None
    return Recording(STAGES[key], profile, manifest, run_id)


def git(root: Path, *argv: str) -> str:
    who = ["-c", "user.name=A Tester", "-c", "user.email=tester@example.org"]
    return subprocess.run(["git", *who, *argv], cwd=root, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    STAGES.update(toys())
    from m2m.cli import main

    sys.exit(main())
