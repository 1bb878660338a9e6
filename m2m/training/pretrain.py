"""Initial training on MIS (section 6.1): M2M-Self and M2M-DINO from a text-to-image model's weights.

Belongs here: its settings, starting weights, sets. Not here: the loop, the loss, saving (the modules beside it).
"""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from m2m.config import Later, ModelSource, resolve
from m2m.data.sets import FeaturesIndex, SetsIndex, TrainingSets, read_index
from m2m.errors import ConfigError
from m2m.models.sd21 import DINOV2_GIANT, STABLE_DIFFUSION_2_1_BASE
from m2m.models.text_to_image import load_ddim, load_dino, load_vae
from m2m.models.unet import VARIANTS, ManyToManyUNet
from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.pipelines.model_card import CardFacts
from m2m.stage_run import StageRun
from m2m.training.course import SamplePicture, Sets, objective_of, start_accelerator, take
from m2m.training.encoding import Encoding
from m2m.training.settings import TrainingSettings
from m2m.training.starting import (
    check_start,
    continued_unet,
    feature_width,
    fresh_unet,
    initialised_from,
    local_or_hub_folder,
    origin,
    parameter_count,
    unet_config,
)


class Pretrain(TrainingSettings):
    """Train M2M on image sets, from the weights of a text-to-image model (sections 5, 6.1 and 7.1)."""

    text_to_image: ModelSource = Field(
        STABLE_DIFFUSION_2_1_BASE, description="the model whose U-Net, autoencoder and noise schedule M2M takes over"
    )
    init_from: ModelSource | None = Field(
        None,
        description="an M2M folder of the same variant to start from instead of the text-to-image U-Net; its scheduler "
        "is taken over, too, where it has one",
    )
    prediction_type: Annotated[Literal["epsilon", "v_prediction"] | None, Later()] = Field(
        None,
        description="what the U-Net learns to predict: noise (Eq. 5) or velocity (Salimans & Ho 2022), with which a "
        "small U-Net sees much more of the image in high noise; None: what its starting weights predict",
    )
    dino: ModelSource = Field(DINOV2_GIANT, description="M2M-DINO's image encoder; the paper does not say which DINOv2")
    feature_size: int | None = Field(
        None, ge=14, description="pixels along each side that DINOv2 sees; its own image size by default"
    )
    features: Literal["cache", "online"] = Field(
        "cache", description="M2M-DINO: read cache-features' output, or encode while training (+20 % of a step)"
    )
    latents: Literal["stored", "encoded"] = Field(
        "stored",
        description="train on the sampler's latents, or on E(x) of the pictures as the paper does (E(D(z)) is not z)",
    )
    sets: int | None = Field(None, ge=1, description="the first so many training sets; paper: 9M (Self), 6M (DINO)")
    choice_seed: int = Field(0, ge=0, description="which N of a set's images; cache-features must have the same")
    frozen_choice: bool = Field(
        True, description="the same N images of a set in every epoch; False draws anew (needs features=online)"
    )
    clean_timestep: int | None = Field(
        0,
        ge=0,
        description="M2M-Self: the timestep of clean images (the paper does not say); None: the noisy images' own",
    )
    dropped_context: Literal["empty", "zeroed"] = Field(
        "empty", description="M2M-Self: a dropped context is no image at all, or (the paper's words) latents of zeros"
    )
    context_noise: int = Field(
        0,
        ge=0,
        description="M2M-Self: preceding images are noised up to this timestep, and the clean stream is told; 0: clean",
    )
    sample_images: int = Field(4, ge=1, description="images generated for each set of the sample picture")

    @model_validator(mode="after")
    def _timesteps_fit(self) -> "Pretrain":
        if self.clean_timestep is None and self.timesteps == "image":
            raise ValueError("clean_timestep=None gives clean images the set's timestep: set timesteps=set")
        if self.context_noise and self.clean_timestep != 0:
            raise ValueError("context_noise tells clean images their own timestep: leave clean_timestep at 0")
        return self

    @model_validator(mode="after")
    def _zeros_are_for_whole_sets(self) -> "Pretrain":
        if self.dropped_context == "zeroed" and (self.dropping == "image" or self.random_context):
            raise ValueError("dropped_context=zeroed drops whole sets: leave dropping=set and random_context off")
        return self

    def preview(self, root: Path, variant: str | None) -> list[str]:
        """Build the U-Net on the meta device, so that sizes are known and nothing is allocated."""
        assert variant is not None
        said = []
        width = None
        if variant == "dino":
            width = feature_width(self.dino, root)
            said.append(f"image encoder: {self.dino}, features of width {width}")
        with torch.device("meta"):
            unet = ManyToManyUNet.from_text_to_image(
                unet_config(self.text_to_image, root),
                variant,  # type: ignore[arg-type]
                width,
                **self.own_unet_settings(),
            )
        said.append(f"U-Net: {VARIANTS[variant]}, {parameter_count(unet) / 1e6:,.1f} M parameters")
        if self.init_from is not None and resolve(self.init_from, root).is_dir():
            check_start(resolve(self.init_from, root), variant)
        said.append(f"starts from: {self.init_from or self.text_to_image}")
        return said

    def own_unet_settings(self) -> dict:
        """What `ManyToManyUNet` takes beside the text-to-image model's config."""
        return {"clean_timestep": self.clean_timestep, "dropped_context": self.dropped_context}


def pretrain(config: Pretrain, run: StageRun) -> None:
    """Write a ManyToManyPipeline with the averaged weights into `run.out`, with `training_log.jsonl` and `sample.png`.

    Raises:
        ArtifactError: `init_from` is of the other variant; the sets or features don't fit.
        CheckFailed: a loss is not finite.
    """
    variant, root = str(run.stage.variant), run.profile.root
    accelerator = start_accelerator(config, run)
    pipeline, started_from = _starting_pipeline(config, variant, root, run.profile.label or None)
    pipeline.to(accelerator.device)
    cached = variant == "dino" and config.features == "cache"
    training = MisSets(
        TrainingSets(
            run.inputs["sets"],
            "train",
            config.images_per_set,
            config.choice_seed,
            run.inputs["features"] if cached else None,
            config.frozen_choice,
        ),
        config.sets,
        pictures=config.latents == "encoded" or (variant == "dino" and not cached),
    )
    _check_fit(config, run, training, pipeline, cached)
    held_out = _held_out(config, run.inputs["sets"])
    if held_out is None:
        run.progress.log(f"{run.stage.key}: no validation sets: no validation loss and no sample picture")
    objective = objective_of(config, pipeline, context_noise=config.context_noise)
    take(
        config,
        pipeline,
        Sets(
            training,
            held_out,
            Encoding(pipeline, accelerator, encode_latents=config.latents == "encoded"),
            training.sets.sets_per_shard,
        ),
        objective,
        SamplePicture(given=config.images_per_set - 1, generated=config.sample_images),
        started_from,
        accelerator,
        run,
    )


class MisSets:
    """MIS by (epoch, sample): the N chosen images' latents, cached features, and pictures where they are encoded."""

    def __init__(self, sets: TrainingSets, limit: int | None = None, pictures: bool = False) -> None:
        # sets made without pictures: they are decoded where they are needed
        self.sets, self.pictures = sets, pictures and sets.sets.index.pictures is not None
        self._count = len(sets) if limit is None else min(limit, len(sets))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, sample = key
        self.sets.set_epoch(epoch)  # here, in the process that reads: a data worker has its own copy
        item = self.sets[sample]
        item["sample"] = torch.tensor(sample)
        if self.pictures:
            item["pictures"] = self.sets.sets.pictures(sample, self.sets.images(sample))
        return item


def _starting_pipeline(config: Pretrain, variant: str, root: Path, label: str | None) -> tuple[ManyToManyPipeline, str]:
    """The pipeline with its first weights, and where they come from."""
    dino = load_dino(config.dino, root) if variant == "dino" else None
    width = None if dino is None else dino.config.hidden_size
    if config.init_from is None:
        unet = fresh_unet(config.text_to_image, root, variant, width, config.seed, config.own_unet_settings())
        source = config.text_to_image, resolve(config.text_to_image, root)
        scheduler = load_ddim(config.text_to_image, root, config.prediction_type)
    else:
        folder = local_or_hub_folder(config.init_from, root)
        unet = continued_unet(folder, variant, width, config.own_unet_settings())
        source = config.init_from, folder
        trained_with = folder if (folder / "scheduler").is_dir() else config.text_to_image
        scheduler = load_ddim(trained_with, root, config.prediction_type)
    pipeline = ManyToManyPipeline(
        vae=load_vae(config.text_to_image, root),
        unet=unet,
        scheduler=scheduler,
        image_encoder=dino,
        feature_size=config.feature_size,
    )
    pipeline.card = CardFacts(initialised_from(*source, root), label)
    return pipeline, origin(*source, root)


def _held_out(config: Pretrain, sets: Path) -> "MisSets | None":
    """Validation sets, always with features encoded anew: the cache need not hold this split."""
    if not read_index(sets, SetsIndex).splits.get("validation"):
        return None
    held_out = TrainingSets(sets, "validation", config.images_per_set, config.choice_seed)
    return MisSets(held_out, pictures=True)


def _check_fit(config: Pretrain, run: StageRun, training: MisSets, pipeline: ManyToManyPipeline, cached: bool) -> None:
    """What would otherwise fail deep inside the first step.

    Raises:
        ConfigError: latents or cached features of another model than is trained, or a setting of the other variant.
    """
    if config.context_noise and pipeline.unet.variant == "dino":
        raise ConfigError("context_noise is for M2M-Self: DINO features have no timestep. Leave it at 0")
    if config.context_noise >= pipeline.scheduler.config["num_train_timesteps"]:
        count = pipeline.scheduler.config["num_train_timesteps"]
        raise ConfigError(f"context_noise={config.context_noise}: the noise schedule has timesteps 0 to {count - 1}")
    channels, _, _ = training.sets.sets.latent_shape
    unet = pipeline.unet
    if channels != unet.config.in_channels:
        raise ConfigError(
            f"{run.inputs['sets']} holds latents of {channels} channels, {config.text_to_image} reads "
            f"{unet.config.in_channels}: pretrain.text_to_image must be generate-sets.text_to_image"
        )
    if cached:
        index = read_index(run.inputs["features"], FeaturesIndex)
        encoder = pipeline.image_encoder.config
        size = config.feature_size or encoder.image_size
        tokens = 1 + (size // encoder.patch_size) ** 2
        if (index.tokens, index.width) != (tokens, encoder.hidden_size):
            raise ConfigError(
                f"{run.inputs['features']} holds features of {index.tokens} tokens and width {index.width}; "
                f"{config.dino} at {size} pixels gives {tokens} and {encoder.hidden_size}: "
                "give pretrain and cache-features the same dino and feature_size"
            )
