"""The settings that pre-training and fine-tuning share.

Belongs here: fields and what they mean. Not here: the settings of one stage (they stand beside its function).
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from m2m.config import Compute, Incidental, Later, StageConfig
from m2m.training.kernels import Kernels

_PAPER_SILENT = "the paper does not say"


class TrainingSettings(StageConfig):
    """How a training goes, whatever it trains on."""

    made_together: ClassVar[bool] = True

    images_per_set: int = Field(
        5, ge=2, description=f"N; M2M-Self: 5 (paper, section 7.1); for M2M-DINO and fine-tuning {_PAPER_SILENT}"
    )
    batch: int = Field(256, ge=1, description="total batch of a step over all processes, in `batch_counts`")
    batch_counts: Annotated[Literal["sets", "images"], Later()] = Field(
        "sets",
        description=f"whether `batch` counts sets or images, of which as many whole sets are taken; {_PAPER_SILENT}",
    )
    micro_batch: int = Field(4, ge=1, description="sets in one forward pass of one process; gradients are accumulated")
    epochs: int = Field(1, ge=1, description=f"passes over the sets; {_PAPER_SILENT}")
    steps: int | None = Field(
        None,
        ge=0,
        description="optimizer steps; decides instead of `epochs` where given; 0: the starting weights as they are",
    )
    learning_rate: float = Field(1e-5, gt=0, description="constant")
    warmup_steps: int = Field(0, ge=0, description="steps of linear growth from 0 to the learning rate")
    weight_decay: float = Field(1e-2, ge=0, description=f"AdamW's default; {_PAPER_SILENT}")
    gradient_clip: float = Field(1.0, gt=0, description=f"largest norm of the whole gradient; {_PAPER_SILENT}")
    ema_decay: float = Field(
        0.9999,
        ge=0,
        lt=1,
        description=f"of the averaged weights, which are exported; grows to it as (1 + n) / (10 + n); {_PAPER_SILENT}",
    )
    timesteps: Literal["image", "set"] = Field(
        "image",
        description="one timestep for each image, as Stable Diffusion's trainings draw them and as sampling visits "
        "images, or one shared by a set (Eq. 5 writes a single t)",
    )
    timestep_sampling: Literal["uniform", "shifted", "logit_normal"] = Field(
        "uniform",
        description="which timesteps, how often: uniform as in the paper (section 3), or skewed to high noise, where "
        "preceding images matter: shifted or logit_normal (Esser et al. 2024, Eqs. 23 and 19)",
    )
    timestep_shift: float = Field(3.0, gt=0, description="of timestep_sampling=shifted; over 1: towards noise")
    timestep_mean: float = Field(1.0, description="of timestep_sampling=logit_normal; over 0: towards noise")
    timestep_std: float = Field(1.0, gt=0, description="of timestep_sampling=logit_normal")
    loss_weighting: Annotated[Literal["noise", "velocity"] | None, Later()] = Field(
        None,
        description="what errors count: of the noise (Eq. 5), or of the velocity (Salimans & Ho 2022), which counts "
        "them at high noise, where preceding images matter, up to 200 times as much; None: of what the model predicts",
    )
    context_dropout: float = Field(
        0.1, ge=0, le=1, description="share of sets trained without preceding images (section 6.1)"
    )
    dropping: Literal["set", "image"] = Field(
        "set", description=f"preceding images are dropped for a whole set, or for each image by itself; {_PAPER_SILENT}"
    )
    random_context: bool = Field(
        False,
        description="image i sees a random number of the i - 1 images before it, at least one, the nearest ones, "
        "instead of all of them",
    )
    rollout_share: float = Field(
        0.0, ge=0, le=1, description="share of sets whose preceding images but the first are the model's own"
    )
    rollout_steps: int = Field(10, ge=1, description="DDIM steps of each of the model's own images")
    rollout_guidance: float = Field(1.0, ge=1, description="guidance scale of the model's own images; 1: none, cheap")
    seed: int = Field(0, ge=0, description="of all that is drawn, by (seed, epoch, sample)")
    gradient_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    kernels: Annotated[Kernels, Later()] = Field(
        Kernels.model_validate({}),
        description="how a step is computed on a GPU: speed and memory; the results change by rounding",
    )
    checkpoint_every: Annotated[int, Incidental()] = Field(1000, ge=1, description="steps")
    keep_checkpoints: Annotated[int, Incidental()] = Field(2, ge=1)
    log_every: Annotated[int, Incidental()] = Field(
        10, ge=1, description="steps between lines of speed and memory in the run log, and to the trackers"
    )
    peak_tflops: Annotated[float | None, Incidental()] = Field(
        None,
        gt=0,
        description="what one device can do at most in compute.dtype, for example 312 (A100, bfloat16): its share "
        "that the model uses (MFU) is then logged",
    )
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Incidental()] = Field(
        (), description="who else is told of losses and speed, through Accelerate, where its package is installed"
    )
    workers: Annotated[int, Incidental()] = Field(0, ge=0, description="processes that read data; 0: this one")
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="a loss over so many times the smoothed one is a spike (from step 51 on); default none",
    )
    on_spike: Literal["stop", "skip"] = Field(
        "stop", description="at a spike: stop and name the batch, or leave its gradients out (ten in a row do stop)"
    )
    validation_sets: int = Field(64, ge=0, description="held-out sets of the validation loss, before and after")
    validate_every: int | None = Field(
        None, ge=1, description="steps between validations of the averaged weights while training; default none"
    )
    export: Literal["last", "best"] = Field(
        "last", description="the averaged weights after the last step, or after the one with the best validation loss"
    )
    sample_sets: int = Field(4, ge=0, description="held-out sets in the sample picture; 0: no picture")
    num_inference_steps: int = Field(50, ge=1, description="DDIM steps of the sample picture")
    guidance_scale: float = Field(7.5, ge=1, description="of the sample picture")
    compute: Compute = Compute.model_validate({})

    @property
    def sets_per_step(self) -> int:
        """Sets of one optimizer step over all processes."""
        return self.batch if self.batch_counts == "sets" else max(1, self.batch // self.images_per_set)

    @model_validator(mode="after")
    def _best_is_known(self) -> "TrainingSettings":
        if self.export == "best" and (self.validate_every is None or not self.validation_sets):
            raise ValueError("export=best needs validate_every, and validation_sets to choose by")
        return self

    @model_validator(mode="after")
    def _dtype_can_train(self) -> "TrainingSettings":
        if self.compute.dtype == "float16":
            raise ValueError("training in float16 would need loss scaling: take compute.dtype bfloat16 or float32")
        return self

    @model_validator(mode="after")
    def _kernels_are_there(self) -> "TrainingSettings":
        if self.kernels.attention == "flex" and self.compute.device != "cuda":
            raise ValueError("kernels.attention=flex has gradients on cuda only: leave it at prefix on the CPU")
        return self
