"""One training loop for pre-training and fine-tuning: AdamW, accumulated gradients, averaged weights, exact resume.

Belongs here: optimisation, checkpoints at the right moments. Not here: the loss, the data, the stages, what stands in
the log.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader

from m2m.artifacts import write_bytes
from m2m.errors import CheckFailed, ConfigError, InputError
from m2m.generation.noise import keyed_generator, namespaced
from m2m.progress import Progress
from m2m.training import checkpoints
from m2m.training.acceleration import anywhere
from m2m.training.batches import BatchPlan
from m2m.training.checkpoints import Checkpoint
from m2m.training.flops import training_flops
from m2m.training.log import LOG, LogLine, best, decoded, encoded, is_spike, skipped_in_a_row, smoothed
from m2m.training.objective import Objective, SetLoss
from m2m.training.read_ahead import read_ahead
from m2m.training.run_log import RunLog
from m2m.training.settings import TrainingSettings
from m2m.training.stopping import STOPPED, Stop, ignore_signals

CHECKPOINTS = "checkpoints"
_SKIPS_IN_A_ROW = 10

Batch = dict[str, Tensor]


class SetData(Protocol):
    """Sets of images to train on, by (epoch, sample)."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        """One set: `sample` (its number) and what `prepare` needs. Read by data workers: no models here."""
        ...


Prepare = Callable[[Batch], Batch]
"""A stacked batch on the training device -> `latents` and, as the model needs, `features`, `condition`, `counts`."""


Rollouts = Callable[[Batch, Sequence[int], int], Batch]
"""A prepared batch, its samples and their epoch -> the batch with preceding images of the model's own."""
Validate = Callable[[], float | None]
"""The validation loss of the U-Net as it stands; every process calls it at the same step."""


def train(
    settings: TrainingSettings,
    loss: SetLoss,
    objective: Objective,
    data: SetData,
    out: Path,
    progress: Progress,
    accelerator: Accelerator,
    *,
    belongs_to: str,
    prepare: Prepare = dict,
    validate: Validate | None = None,
    rollouts: Rollouts | None = None,
    per_shard: int | None = None,
    run_log: Path | None = None,
    label: str = "train",
) -> list[LogLine]:
    """Train the U-Net of `loss`; it is left with the averaged weights (the last or the best), on its device.

    Goes on from the newest good checkpoint below `out/checkpoints`; killed and gone on with equals uninterrupted,
    bit for bit on the same kind of device and number of processes.

    Args:
        out: gets `training_log.jsonl`; its checkpoints are the caller's to delete.
        belongs_to: identity of the settings; checkpoints of others are not picked up.
        prepare: what the models make of a batch (encoding), if the data is not ready for the U-Net.
        validate: called every `validate_every` steps with the averaged weights in the U-Net.
        rollouts: called with every prepared micro-batch.
        per_shard: sets that lie in one file, for the order of reading; None: all are equally near.
        run_log: gets speed and memory, which are no part of the output.

    Returns:
        The log of all steps, those before a resume included.

    Raises:
        InputError: no sets.
        ConfigError: fewer sets in a batch than processes; the best weights are asked for and nothing is held out.
        CheckFailed: a loss or gradient is not finite, or the loss leaps; names the samples.
        SystemExit: 75 after SIGTERM or SIGUSR1, with a checkpoint written.
    """
    if not len(data):
        raise InputError(f"{label}: there are no sets to train on")
    if validate is None and settings.export == "best":
        raise ConfigError(f"{label}: export=best takes a validation loss, and there are no validation sets")
    if settings.sets_per_step < accelerator.num_processes:
        count = accelerator.num_processes
        raise ConfigError(f"{label}: {settings.sets_per_step} sets in a batch are fewer than the {count} processes")
    trainer = _Trainer(settings, loss, objective, data, prepare, validate, rollouts, accelerator, label)
    folder = out / CHECKPOINTS
    found = checkpoints.load_newest(folder, belongs_to, progress.log)
    if found is not None:
        trainer.restore(found)
        progress.log(f"{label}: goes on after step {found.step:,}")
    plan = BatchPlan(settings, len(data), per_shard, accelerator.num_processes, accelerator.process_index)
    main = accelerator.is_main_process
    steps, log = trainer.run(plan), None
    if main:
        write_bytes(out / LOG, encoded(trainer.log))
        log = (out / LOG).open("a", encoding="utf-8")
        steps = progress.each(steps, total=plan.steps - len(trainer.log), unit="step", label=label)
    speed = RunLog(settings, accelerator, run_log, trainer.flops, belongs_to[:16])
    with Stop() as stop, speed, settings.kernels.chosen(accelerator.device), log or contextlib.nullcontext():
        for line, sets, seconds in steps:
            speed.add(line, sets, seconds, last=line.step == plan.steps, waited=trainer.waited)
            if log is not None:
                log.write(line.encoded())
                log.flush()
            if main and line.validation_loss is not None and best(trainer.log) is line:
                checkpoints.save_best(folder, trainer.averaged(belongs_to))
            stopping = anywhere(accelerator, stop.asked)
            if stopping or line.step % settings.checkpoint_every == 0 or line.step == plan.steps:
                if main:
                    checkpoints.save(folder, trainer.state(belongs_to), settings.keep_checkpoints)
                accelerator.wait_for_everyone()
            if stopping and line.step < plan.steps:
                progress.log(f"{label}: asked to stop; goes on after step {line.step:,} when run again")
                raise SystemExit(STOPPED)
    if said := speed.said():
        progress.log(f"{label}: {said}")
    if settings.export == "best":
        found = checkpoints.load_best(folder, belongs_to, progress.log)
        if found is None:
            raise CheckFailed(f"{folder}: no whole checkpoint of the best weights; take export=last, or train again")
        trainer.adopt(found)
        progress.log(f"{label}: the weights after step {found.step:,} are the best")
    trainer.adopt_average()
    return trainer.log


class _Trainer:
    """The state of a training, and its steps."""

    def __init__(
        self,
        settings: TrainingSettings,
        loss: SetLoss,
        objective: Objective,
        data: SetData,
        prepare: Prepare,
        validate: Validate | None,
        rollouts: Rollouts | None,
        accelerator: Accelerator,
        label: str,
    ) -> None:
        self.settings, self.objective, self.label = settings, objective, label
        self.data, self.prepare, self.accelerator = data, prepare, accelerator
        self.validate, self.rollouts = validate, rollouts
        self.unet = loss.unet
        settings.kernels.apply(self.unet)
        if settings.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        # evaluation_mode: no DDP wrapper. Which weights get gradients changes with the dropped contexts, and
        # gradients are summed over processes once a step, after accumulation
        self.loss = accelerator.prepare_model(loss, evaluation_mode=True)
        self.weights = {name: weight for name, weight in self.unet.named_parameters() if weight.requires_grad}
        self.frozen = {name for name, weight in self.unet.named_parameters() if not weight.requires_grad}
        # on a GPU one kernel for many tensors: a U-Net has hundreds, and each would be launched by itself
        on_gpu = accelerator.device.type == "cuda"
        self.average = EMAModel(self.weights.values(), decay=settings.ema_decay, foreach=on_gpu)
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=on_gpu or None
        )
        self.log: list[LogLine] = []
        self._shapes: dict[str, Sequence[int]] = {}
        self.waited = 0.0
        """Seconds of the last step in which it waited for data."""

    def run(self, plan: BatchPlan) -> Iterator[tuple[LogLine, int, float]]:
        """The steps after those already done, each with its sets and seconds (without its validation)."""
        start = len(self.log)
        loader = DataLoader(
            self.data,  # type: ignore[arg-type]
            batch_sampler=plan.reading_order(start),  # type: ignore[arg-type]
            num_workers=self.settings.workers,
            worker_init_fn=ignore_signals,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # its draws reach no result; leaves the global one alone
        )
        with contextlib.closing(read_ahead(_on_own_gpu(iter(loader), self.accelerator.device))) as micro_batches:
            yield from self._steps(plan, start, micro_batches)

    def _steps(
        self, plan: BatchPlan, start: int, micro_batches: Iterator[Batch]
    ) -> Iterator[tuple[LogLine, int, float]]:
        self.unet.train()
        for step, epoch, batch in plan.batches(start):
            began = time.monotonic()
            self._seed_layers(step)
            total = torch.zeros((), device=self.accelerator.device)
            self.waited = 0.0
            for _ in plan.micro_batches(batch):
                asked = time.monotonic()
                micro = next(micro_batches)
                self.waited += time.monotonic() - asked
                total += self._accumulate(micro, epoch, len(batch))
            value = self.accelerator.reduce(total, "sum").item()  # type: ignore[union-attr]
            if not math.isfinite(value):
                raise self._stopped(f"the loss of step {step:,} is {value}", batch)
            skip = is_spike(self.log, value, self.settings.spike_factor)
            if skip and (self.settings.on_spike == "stop" or skipped_in_a_row(self.log) == _SKIPS_IN_A_ROW):
                smooth = self.log[-1].smoothed
                raise self._stopped(f"the loss of step {step:,} is {value:.4g} after a smoothed {smooth:.4g}", batch)
            rate = self.settings.learning_rate * min(1.0, step / max(1, self.settings.warmup_steps))
            norm = self._update(rate, skip)
            if not math.isfinite(norm):
                raise self._stopped(f"the gradient norm of step {step:,} is {norm}", batch)
            seconds = time.monotonic() - began
            smooth = self.log[-1].smoothed if skip else smoothed(self.log, value)
            validated = self._validated(step, plan.steps)
            self.log.append(LogLine(step, epoch, value, smooth, rate, norm, skip, validated))
            yield self.log[-1], len(batch), seconds

    def _accumulate(self, micro: Batch, epoch: int, batch: int) -> Tensor:
        """Add a micro-batch's gradients; returns its part of the batch's mean loss."""
        device = self.accelerator.device
        samples = micro["sample"].tolist()
        ready = self.prepare({name: tensor.to(device, non_blocking=True) for name, tensor in micro.items()})
        if self.rollouts is not None:
            ready = self.rollouts(ready, samples, epoch)
        self._shapes = {name: ready[name].shape[1:] for name in ("latents", "features", "condition") if name in ready}
        losses = batch_losses(self.loss, self.objective, ready, samples, epoch)
        # by the batch's size, not the micro-batch's: the last micro-batch may be smaller
        part = losses.sum() / batch
        self.accelerator.backward(part)  # of NaN too: to ask first would have a GPU wait, and the step stops anyway
        return part.detach()

    def flops(self) -> int:
        """Operations of one set like the last one trained on."""
        return training_flops(self.unet, self._shapes)

    def _update(self, rate: float, skip: bool) -> float:
        """One optimizer step, or none, from the gradients of all processes; returns their norm before clipping."""
        weights = list(self.weights.values())
        for weight in weights:
            if weight.grad is None:  # all contexts dropped: a zero like any other, on every split into micro-batches
                weight.grad = torch.zeros_like(weight)
            if self.accelerator.num_processes > 1:
                weight.grad = self.accelerator.reduce(weight.grad, "sum")  # type: ignore[assignment]
        norm = float(torch.nn.utils.clip_grad_norm_(weights, self.settings.gradient_clip))
        if math.isfinite(norm) and not skip:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.average.step(weights)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _seed_layers(self, step: int) -> None:
        # layers that draw for themselves (dropout in a U-Net that has it) draw the same after a resume
        key = (step, self.accelerator.process_index)
        drawn = keyed_generator(namespaced(self.settings.seed, "layers"), *key)
        torch.manual_seed(int(drawn.integers(2**32)))

    def _validated(self, step: int, steps: int) -> float | None:
        """The validation loss of the averaged weights, where it is this step's turn."""
        every = self.settings.validate_every
        if self.validate is None or every is None or (step % every and step != steps):
            return None
        weights = list(self.weights.values())
        self.average.store(weights)
        self.average.copy_to(weights)
        found = self.validate()
        self.average.restore(weights)
        return found

    def _stopped(self, why: str, batch: Sequence[int]) -> CheckFailed:
        return CheckFailed(
            f"{self.label}: {why}; its samples: {', '.join(map(str, batch))}. "
            "Look at these sets (`python -m m2m shards show`), or lower learning_rate"
        )

    def state(self, belongs_to: str) -> Checkpoint:
        """Everything of the training, to be written."""
        moments = {
            f"{key}/{name}": self.optimizer.state[weight][key]
            for name, weight in self.weights.items()
            for key in ("exp_avg", "exp_avg_sq", "step")
        }
        tensors = {
            "unet": {name: tensor for name, tensor in self.unet.state_dict().items() if name not in self.frozen},
            "average": dict(zip(self.weights, self.average.shadow_params)),
            "optimizer": moments,
        }
        numbers = {"average_steps": self.average.optimization_step}
        return Checkpoint(len(self.log), tensors, encoded(self.log).decode(), belongs_to, numbers)

    def averaged(self, belongs_to: str) -> Checkpoint:
        """The averaged weights alone, to be written: what would be exported now."""
        tensors = {"average": dict(zip(self.weights, self.average.shadow_params))}
        return Checkpoint(len(self.log), tensors, belongs_to=belongs_to)

    def adopt(self, found: Checkpoint) -> None:
        """Take the averaged weights of a checkpoint."""
        average = found.tensors["average"]
        self.average.shadow_params = [
            torch.empty_like(weight, requires_grad=False).copy_(average[name]) for name, weight in self.weights.items()
        ]

    def restore(self, found: Checkpoint) -> None:
        """Take the state of a checkpoint."""
        frozen = {name: tensor for name, tensor in self.unet.state_dict().items() if name in self.frozen}
        self.unet.load_state_dict({**frozen, **found.tensors["unet"]})
        self.adopt(found)
        self.average.optimization_step = found.numbers["average_steps"]
        moments = found.tensors["optimizer"]
        states: dict[int, Any] = {
            place: {
                "step": moments[f"step/{name}"],
                # laid out as the weight is, which fused kernels want
                **{key: torch.empty_like(weight).copy_(moments[f"{key}/{name}"]) for key in ("exp_avg", "exp_avg_sq")},
            }
            for place, (name, weight) in enumerate(self.weights.items())
        }
        self.optimizer.load_state_dict(
            {"state": states, "param_groups": self.optimizer.state_dict()["param_groups"]}  # rates are set at each step
        )
        self.log = decoded(found.log)

    def adopt_average(self) -> None:
        """Put the averaged weights into the U-Net."""
        self.average.copy_to(self.weights.values())
        self.unet.eval()


def _on_own_gpu(items: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The items, in a thread of its own too on this process's GPU: pinning memory would else open the first one."""
    own = torch.cuda.current_device() if device.type == "cuda" else None

    def taken() -> Iterator[Batch]:
        if own is not None:
            torch.cuda.set_device(own)
        yield from items

    return taken()


def batch_losses(loss: Any, objective: Objective, ready: Batch, samples: Sequence[int], epoch: int) -> Tensor:
    """(B,) losses of a prepared batch under its own keyed draws."""
    latents = ready["latents"]
    draws = objective.draw(samples, epoch, latents.shape[1:]).to(latents.device)
    extra = {name: ready[name] for name in ("context", "features", "condition", "counts") if name in ready}
    return loss(latents, draws, weighting=objective.weighting, **extra)
