"""Every stage of the project: the registry that commands, assets and DVC's stages are all made from.

Belongs here: names, inputs, checks, what Dagster shows. Not here: running one (`m2m.stage_run`) and the work itself,
which is named by import path so that listing the stages needs neither torch nor diffusers.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from m2m.config import Profile, Resources, StageConfig
from m2m.errors import ConfigError

VERSIONS = {
    "filter-captions": 1,
    "generate-sets": 1,
    "cache-features": 1,
    "pretrain": 2,
    "finetune": 2,
    "evaluate": 1,
    "report": 2,
}
"""Counted up by hand when a stage comes to make other bytes of the same settings; read by DVC, too (`dvc.yaml`)."""


@dataclass(frozen=True)
class Stage:
    """One step of the way from captions to the report."""

    command: str
    function: str
    asset: str
    version: int
    description: str
    group: str
    kinds: frozenset[str]
    variant: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)  # input name -> stage key
    checks: tuple[str, ...] = ()
    partitioned: bool = False
    deterministic: bool = True

    @property
    def key(self) -> str:
        """`filter-captions`, `pretrain@self`."""
        return f"{self.command}@{self.variant}" if self.variant else self.command

    @property
    def argv(self) -> list[str]:
        """The arguments of `python -m m2m` that run this stage, less the profile."""
        return [self.command, *(["--variant", self.variant] if self.variant else [])]

    def load(self) -> tuple[Callable[..., None], type[StageConfig]]:
        """Import the stage's function and the config class that its first parameter names."""
        module, _, name = self.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        return function, get_type_hints(function)["config"]

    def configured(self, profile: Profile, overrides: Sequence[str] = ()) -> tuple[Callable[..., None], StageConfig]:
        """The stage's function and its config from the profile.

        Raises:
            ConfigError: a setting that is unknown or not allowed.
        """
        function, config_class = self.load()
        return function, profile.stage_config(config_class, self.command, self.variant, overrides)

    def folder(self, profile: Profile) -> Path:
        return profile.outputs / self.command / (self.variant or "")

    def make_command(self, profile: Profile) -> str:
        return f"python -m m2m {' '.join(self.argv)} --config {profile.path}"


def _stage(command: str, function: str, asset: str, description: str, group: str, kinds: str, **more: Any) -> Stage:
    return Stage(command, function, asset, VERSIONS[command], description, group, frozenset(kinds.split()), **more)


_MODELS = {"m2m_self": "pretrain@self", "m2m_dino": "pretrain@dino"}
_EVALUATIONS = {
    "table_1": ({**_MODELS, "sets": "generate-sets"}, "FID, IS and CLIP scores by n-th generated image (Table 1)."),
    "preceding_images": (
        {**_MODELS, "sets": "generate-sets"},
        "What one to four preceding images tell (Fig. 6).",
    ),
    "consistency": ({**_MODELS, "sets": "generate-sets"}, "Content and style kept, and nothing copied (Fig. 4)."),
    "real_images": (_MODELS, "Sets of real photographs continued (Fig. 5)."),
    "novel_views": ({"m2m_nvs": "finetune@nvs"}, "New views of held-out objects (Fig. 7)."),
    "procedures": ({"m2m_vgsi": "finetune@vgsi"}, "The next steps of held-out procedures (Fig. 8)."),
    "sampling_speed": (_MODELS, "Seconds an image by number of preceding images (Fig. 9)."),
    "rollouts": ({**_MODELS, "sets": "generate-sets"}, "How quality holds over long sequences (section 9)."),
}

_ALL = [
    _stage(
        "filter-captions",
        "m2m.data.captions:filter_captions",
        "filtered_captions",
        "Captions of at most 77 CLIP tokens, with their split; rejected rows with their reason (section 4).",
        "data",
        "parquet",
        checks=("counts_add_up", "captions_kept"),
    ),
    _stage(
        "generate-sets",
        "m2m.generation.image_sets:generate_sets",
        "mis_shards",
        "25 images for each caption from 25 noises (section 4).",
        "data",
        "stablediffusion webdataset",
        inputs={"captions": "filter-captions"},
        checks=("shards_valid", "no_nan"),
        partitioned=True,
    ),
    _stage(
        "cache-features",
        "m2m.generation.features:cache_features",
        "dino_features",
        "DINOv2's last hidden states of the images that training reads (section 5.2).",
        "data",
        "dinov2 webdataset",
        inputs={"sets": "generate-sets"},
        checks=("shards_valid", "no_nan"),
        partitioned=True,
    ),
    *(
        _stage(
            "pretrain",
            "m2m.training.pretrain:pretrain",
            f"m2m_{variant}",
            f"M2M-{'Self' if variant == 'self' else 'DINO'} trained on MIS (sections 5 and 6.1).",
            "models",
            "pytorch diffusers",
            variant=variant,
            inputs={"sets": "generate-sets", **({"features": "cache-features"} if variant == "dino" else {})},
            checks=("loss_finite", "weights_finite"),
        )
        for variant in ("self", "dino")
    ),
    *(
        _stage(
            "finetune",
            "m2m.training.finetune:finetune",
            f"m2m_{variant}",
            {
                "nvs": "M2M-DINO fine-tuned for novel view synthesis with camera poses (sections 6.2, 8.5.1).",
                "vgsi": "M2M-DINO fine-tuned for visual procedures with step positions (sections 6.2, 8.5.2).",
            }[variant],
            "models",
            "pytorch diffusers",
            variant=variant,
            inputs={"base": "pretrain@dino"},
            checks=("loss_finite", "weights_finite"),
        )
        for variant in ("nvs", "vgsi")
    ),
    *(
        _stage(
            "evaluate",
            f"m2m.evaluation.{module}:evaluate_{name}",
            name,
            description,
            "evaluation",
            "pytorch torchmetrics",
            variant=name,
            inputs=inputs,
            checks=("metrics_finite",),
            deterministic=name != "sampling_speed",
        )
        for name, (inputs, description) in _EVALUATIONS.items()
        for module in [{"table_1": "table"}.get(name, name)]
    ),
    _stage(
        "report",
        "m2m.evaluation.report:write_report",
        "evaluation_report",
        "One self-contained HTML page: tables, curves, image grids, and what they were made from.",
        "evaluation",
        "html",
        inputs={
            "captions": "filter-captions",
            "sets": "generate-sets",
            "features": "cache-features",
            **_MODELS,
            "m2m_nvs": "finetune@nvs",
            "m2m_vgsi": "finetune@vgsi",
            **{name: f"evaluate@{name}" for name in _EVALUATIONS},
        },
        checks=("report_complete", "no_regression"),
        deterministic=False,
    ),
]

STAGES: dict[str, Stage] = {stage.key: stage for stage in _ALL}


def commands() -> dict[str, list[str]]:
    """Stage commands and their variants, in the order of the work."""
    found: dict[str, list[str]] = {}
    for stage in STAGES.values():
        found.setdefault(stage.command, []).extend([stage.variant] if stage.variant else [])
    return found


def find_stage(command: str, variant: str | None) -> Stage:
    """Look a stage up.

    Raises:
        ConfigError: an unknown command or variant; names the ones there are.
    """
    variants = commands().get(command)
    if variants is None:
        raise ConfigError(f"{command} is not a stage. There are: {', '.join(commands())}")
    if bool(variants) != bool(variant) or (variant and variant not in variants):
        said = f"--variant {variant}" if variant else "no --variant"
        raise ConfigError(f"{command} has variants {', '.join(variants) or 'none'}; {said} was given")
    return STAGES[f"{command}@{variant}" if variant else command]


def shard_key(shard: int) -> str:
    """A shard's name on disk and as a partition: five digits."""
    return f"{shard:05d}"


def resources(stage: Stage, profile: Profile) -> Resources:
    """What a launch of this stage asks for in this profile."""
    return profile.resources(stage.command, stage.variant)
