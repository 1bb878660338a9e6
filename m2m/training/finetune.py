"""Task-specific fine-tuning of M2M-DINO (section 6.2): novel view synthesis and visual procedure generation.

Belongs here: its settings, starting weights, keeping encoded images. Not here: sets of a task (`task_sets`), the loop.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from m2m.artifacts import write_json
from m2m.config import Incidental, Later, ModelSource, SourcePath, resolve
from m2m.data.objaverse import ObjaverseViews
from m2m.data.vgsi import Procedures
from m2m.models.autoencoder import pixels_per_latent
from m2m.models.saved import only_variant
from m2m.models.text_to_image import load_ddim
from m2m.models.unet import VARIANTS, ManyToManyUNet
from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.pipelines.model_card import CardFacts
from m2m.progress import Progress
from m2m.stage_run import StageRun
from m2m.training.course import SamplePicture, Sets, objective_of, start_accelerator, take
from m2m.training.encoding import Encoding
from m2m.training.lora import add_lora, require_peft
from m2m.training.settings import TrainingSettings
from m2m.training.starting import (
    check_start,
    continued_unet,
    feature_width,
    initialised_from,
    local_or_hub_folder,
    origin,
    parameter_count,
    unet_config,
)
from m2m.training.task_sets import NovelViews, Task, TaskSets, VisualProcedures

CONDITIONS = {"nvs": "camera", "vgsi": "position"}


class Finetune(TrainingSettings):
    """Fine-tune M2M-DINO with camera poses (nvs) or positions in a procedure (vgsi) (sections 6.2 and 8.5)."""

    init_from: Annotated[ModelSource | None, Later()] = Field(
        None,
        description="an M2M folder fine-tuned for the same task, whose U-Net (and scheduler, where it has one) is "
        "trained on in place of the base's",
    )
    data: SourcePath = Field(description="nvs: Objaverse renders in zero123's layout; vgsi: the VGSI release")
    min_validation: int = Field(
        1, ge=1, description="nvs: objects held out at least, the last 1 % being fewer; as evaluate@novel_views has it"
    )
    samples: int | None = Field(None, ge=1, description="the first so many objects or procedures; default all")
    condition_dropout: float = Field(
        0.1, ge=0, le=1, description="share of sets trained without cameras or positions (section 6.2); dropped by set"
    )
    drop_together: bool = Field(
        False,
        description="drop images and condition in the same sets, as the paper says; its Eq. 7 also needs images "
        "without condition, which that never trains: hence independently by default",
    )
    cache_in_memory: bool = Field(
        False, description="encode all images once before training and keep latents and features in memory"
    )
    lora_rank: int | None = Field(
        None,
        ge=1,
        description="train adapters of this rank on the attention (LoRA, through peft) and the condition embedders, "
        "not all weights; merged into what is exported, and saved beside it",
    )
    lora_alpha: int | None = Field(None, ge=1, description="the adapters count lora_alpha / lora_rank times; 1 times")
    sample_given: int = Field(1, ge=1, description="images of a held-out set that the sample picture starts from")
    text_to_image: Annotated[str | None, Incidental()] = Field(
        None, description="what the base was made from; only a dry run looks at it, for sizes before there is a base"
    )
    dino: Annotated[str | None, Incidental()] = Field(None, description="the base's image encoder; likewise")

    @model_validator(mode="after")
    def _sample_leaves_something(self) -> "Finetune":
        if self.sample_given >= self.images_per_set:
            raise ValueError(f"sample_given must leave images of the {self.images_per_set} in a set to generate")
        return self

    @model_validator(mode="after")
    def _together_is_by_set(self) -> "Finetune":
        if self.drop_together and self.dropping == "image":
            raise ValueError("drop_together drops images and condition of a set: leave dropping=set")
        return self

    def preview(self, root: Path, variant: str | None) -> list[str]:
        """Open the data and build the U-Net on the meta device."""
        assert variant is not None
        if self.lora_rank is not None:
            require_peft()
        folder = resolve(self.data, root)
        training, held_out = (
            open_task(self, variant, folder, 64, "train"),
            open_task(self, variant, folder, 64, "held out"),
        )
        if self.init_from is not None and resolve(self.init_from, root).is_dir():
            check_start(resolve(self.init_from, root), "dino", CONDITIONS[variant])
        kind = "objects" if variant == "nvs" else "procedures"
        said = [
            f"{len(training):,} {kind} to train on, {len(held_out):,} held out, {len(training.set_aside):,} set aside",
            f"starts from: {self.init_from or 'the base'}",
        ]
        if self.text_to_image is None or self.dino is None:
            return [*said, f"U-Net: the one of pretrain@dino with a {CONDITIONS[variant]} embedder"]
        with torch.device("meta"):
            unet = ManyToManyUNet.from_text_to_image(
                unet_config(self.text_to_image, root),
                "dino",
                feature_width(self.dino, root),
                condition=CONDITIONS[variant],
            )
        millions = parameter_count(unet) / 1e6
        return [*said, f"U-Net: {VARIANTS['dino']} with a {CONDITIONS[variant]} embedder, {millions:,.1f} M parameters"]


def finetune(config: Finetune, run: StageRun) -> None:
    """Write the base's pipeline with a condition embedder, trained on the task, into `run.out`.

    Beside it `training_log.jsonl`, `sample.png` and `set_aside.json`: files left out before training, with the reason
    (in large folders, those found later are told in the log).

    Raises:
        ArtifactError: the base is not M2M-DINO, or is fine-tuned already; `init_from` is not, or for the other task.
        InputError: no data in the expected layout.
        ConfigError: LoRA is asked for, and peft is not installed.
        CheckFailed: a loss is not finite.
    """
    variant, base, root = str(run.stage.variant), run.inputs["base"], run.profile.root
    accelerator = start_accelerator(config, run)
    start = None if config.init_from is None else local_or_hub_folder(config.init_from, root)
    source = (str(base), base) if start is None else (str(config.init_from), start)
    pipeline = conditioned_pipeline(base, CONDITIONS[variant], config.seed, start)
    pipeline.card = CardFacts(initialised_from(*source, root), run.profile.label or None)
    if config.lora_rank is not None:
        add_lora(pipeline.unet, config.lora_rank, config.lora_alpha, config.seed)
    pipeline.to(accelerator.device)
    encoding = Encoding(pipeline, accelerator)
    size = pipeline.unet.config.sample_size * pixels_per_latent(pipeline.vae)
    folder = run.source(config.data)
    tasks = [open_task(config, variant, folder, size, split) for split in ("train", "held out")]
    caches = config.cache_in_memory and config.steps != 0
    kept = encoded_images(tasks[0], encoding, run.progress, config.samples) if caches else None
    training, held_out = (
        TaskSets(task, config.images_per_set, config.seed, limit=limit, kept=known)
        for task, limit, known in zip(tasks, (config.samples, None), (kept, None))
    )
    left_out = sorted({(one.path, one.reason) for task in tasks for one in task.set_aside})
    if accelerator.is_main_process:
        write_json(run.out / "set_aside.json", [{"path": path, "reason": reason} for path, reason in left_out])
    run.count(set_aside=len(left_out))
    objective = objective_of(
        config, pipeline, condition_dropout=config.condition_dropout, drop_together=config.drop_together
    )
    take(
        config,
        pipeline,
        Sets(training, held_out, encoding),
        objective,
        SamplePicture(config.sample_given, config.images_per_set - config.sample_given),
        origin(*source, root),
        accelerator,
        run,
    )
    for task in tasks:
        for one in task.set_aside:
            if (one.path, one.reason) not in left_out:
                run.progress.log(f"{run.stage.key}: left out while training: {one}")


def conditioned_pipeline(base: Path, condition: str, seed: int, init_from: Path | None = None) -> ManyToManyPipeline:
    """The base's pipeline with a fresh condition embedder, or with the fine-tuned U-Net of `init_from`, to train.

    Raises:
        ArtifactError: the base is not M2M-DINO, or is fine-tuned already; `init_from` has not this condition.
    """
    check_start(base, "dino")
    found = ManyToManyPipeline.from_pretrained(base, variant=only_variant(base / "unet"))
    for frozen in (found.vae, found.image_encoder):
        frozen.eval().requires_grad_(False)
    own = {key: value for key, value in found.config.items() if key not in found.components and key[0] != "_"}
    if init_from is None:
        found.unet.float()  # shipped weights may be of half precision
        return ManyToManyPipeline(**found.components | {"unet": found.unet.add_condition(condition, seed)}, **own)
    parts: dict[str, Any] = {"unet": continued_unet(init_from, "dino", found.unet.feature_dim, {}, condition)}
    if (init_from / "scheduler").is_dir():
        parts["scheduler"] = load_ddim(init_from)
    return ManyToManyPipeline(**found.components | parts, **own)


def open_task(config: Finetune, variant: str, folder: Path, size: int, split: Literal["train", "held out"]) -> Task:
    """The task's objects or procedures.

    Args:
        size: pixels along each side of a picture.
    """
    if variant == "nvs":
        name = "train" if split == "train" else "validation"
        return NovelViews(ObjaverseViews(folder, name, config.min_validation, size))
    return VisualProcedures(Procedures(folder, "train" if split == "train" else "test"), size)


def encoded_images(
    task: Task, encoding: Encoding, progress: Progress, limit: int | None = None
) -> list[dict[str, Tensor]]:
    """Latents and features of all images of a task, an object or procedure at a time, on the CPU."""
    kept = []
    count = len(task) if limit is None else min(limit, len(task))
    for sample in progress.each(range(count), unit=f"{task.condition} set", label="encode"):
        pictures, known = task.read(sample)
        on_device = pictures.to(encoding.accelerator.device).float() / 255
        latents, features = encoding.latents(on_device).cpu(), encoding.features(on_device).cpu()
        kept.append({"latents": latents, "features": features, "known": known})
    return kept
