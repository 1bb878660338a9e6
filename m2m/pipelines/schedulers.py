"""Which of diffusers' schedulers can sample from M2M, what each wants of a step, and those that have a name here.

Belongs here: checks and differences between schedulers. Not here: the loop over steps (`many_to_many`).
"""

import inspect
from typing import Any, Literal

from diffusers import DPMSolverMultistepScheduler

from m2m.errors import InputError
from m2m.pipelines.arguments import Generators

SchedulerName = Literal["ddim", "sde-dpmsolver++"]
"""DDIM is deterministic (the paper's appendix A). The other (Lu et al. 2022) takes away more noise at every step than
is asked for and adds new noise, which mends what earlier predictions had wrong, at the same cost; it starts at the last
timestep."""


def named_scheduler(name: SchedulerName, trained: Any) -> Any:
    """The scheduler of that name with the noise schedule and prediction type of a pipeline's own, DDIM."""
    if name == "ddim":
        return trained
    return DPMSolverMultistepScheduler.from_config(
        trained.config, algorithm_type="sde-dpmsolver++", timestep_spacing="trailing"
    )


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler of another process than the one that M2M learns: a variance-preserving one in timesteps.

    Raises:
        InputError: flow matching, EDM, or a scheduler whose steps want more than a prediction.
    """
    name, way_out = type(scheduler).__name__, "DDIM, Euler, Heun, PNDM, DPM-Solver, UniPC and their like can"
    config = scheduler.config
    flows = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if flows or not hasattr(scheduler, "alphas_cumprod") or not hasattr(scheduler, "init_noise_sigma"):
        raise InputError(
            f"{name} follows another process than the noise schedule that M2M is trained with: it can't sample "
            f"from this model. {way_out}: SCHEDULER.from_config(pipeline.scheduler.config)"
        )
    more = [p.name for p in list(inspect.signature(scheduler.step).parameters.values())[3:] if p.default is p.empty]
    if [one for one in more if one not in ("args", "kwargs")]:
        raise InputError(f"{name} wants {more[0]} at every step, which this pipeline does not have. {way_out}")


def step_arguments(scheduler: Any, generator: Generators) -> dict[str, Any]:
    """Samplers that draw noise get the generator; DDIM without added noise needs none."""
    draws = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generator} if draws and generator is not None else {}
