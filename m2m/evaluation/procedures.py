"""The next steps of held-out procedures (paper, section 8.5.2 and Fig. 8), measured against the true ones.

Belongs here: what precedes, what is compared, what a generated step is told apart from. Not here: reading VGSI, the
measures (`m2m.evaluation.steps`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from m2m.config import SourcePath
from m2m.data.vgsi import IMAGES, Procedures
from m2m.errors import InputError
from m2m.evaluation.grids import write_grid
from m2m.evaluation.noises import over_noises
from m2m.evaluation.per_set import PerSet
from m2m.evaluation.planted_steps import prove_steps
from m2m.evaluation.protocol import EvaluationConfig, conclude, in_batches
from m2m.evaluation.sampler import Sampler
from m2m.evaluation.steps import FOUND, LIKENESS, StepMeasures
from m2m.generation.noise import keyed_generator, namespaced
from m2m.stage_run import StageRun

_MODEL, _SHUFFLED, _COPY = "M2M-DINO", "M2M-DINO, preceding steps out of order", "the last preceding step, copied"


class NextSteps(EvaluationConfig):
    """Settings of the evaluation of procedures."""

    vgsi: SourcePath = Field(description="VGSI's folder; its test split is evaluated")
    procedures: int = Field(200, ge=2, description="random held-out procedures; all where there are fewer")
    preceding: int = Field(4, ge=1, description="steps that precede, where a procedure has more; else all but its last")
    num_images: int = Field(4, ge=1, description="steps generated in the grids (Fig. 8), where a procedure has them")
    distractors: int = Field(9, ge=1, description="steps of other procedures among which the true next one is sought")
    planted_procedures: int = Field(
        24, ge=0, description="procedures of any split that planted models continue to prove the measures; 0: none"
    )
    condition_guidance_scale: float | None = Field(
        None, description="s_C of Eq. 7, for the position; without one the pipeline's default"
    )


@over_noises
def evaluate_procedures(config: NextSteps, run: StageRun) -> None:
    """Generate the next step of held-out procedures and compare it with the true one.

    Beside it: the same with the preceding images given out of order (what is lost is what the model made of the order),
    and copying the last step. The true next step is also sought, by DINOv2 likeness to the generated one, among steps
    of other procedures and among its own procedure's steps.

    Raises:
        InputError: fewer than two held-out procedures with two steps or more.
    """
    measures = StepMeasures(config.open_dino(run), config.open_clip(run))
    sampler = Sampler(run.inputs["m2m_vgsi"], "dino", config)
    procedures = Procedures(run.source(config.vgsi), "test")
    chosen = _held_out(config, procedures, sampler.size)

    def measure(batch: range) -> dict[str, Tensor]:
        # procedures differ in length: each is a batch of its own, and the two orders of its steps are sampled together
        told: dict[str, list[Tensor]] = {}
        for place in batch:
            for key, value in one(place).items():
                told.setdefault(key, []).append(value)
        return {key: torch.stack(values) for key, values in told.items()}

    def one(place: int) -> dict[str, Tensor]:
        steps = procedures.images(chosen[place], sampler.size)
        before = min(config.preceding, len(steps) - 1)
        order = _out_of_order(config, place, before)
        given = torch.stack([steps[:before], steps[order]])
        made = _next(config, sampler, given, [place, place], before, 1)[:, 0]
        others = [(place + 1 + int(offset)) % len(chosen) for offset in _offsets(config, place, len(chosen))]
        distractors = torch.stack([_a_step(config, procedures, chosen[i], place, i, sampler.size) for i in others])
        told = measures.compare(torch.stack([*made, steps[before - 1]]), steps, before, distractors)
        told["chance_own"] = torch.tensor(1 / len(steps), dtype=torch.float64)
        # what was in order has no other order with fewer than two preceding steps
        told["reordered"] = torch.tensor(before > 1)
        return told

    found = in_batches(run, "procedures", len(chosen), config.batch, measure)
    distractors = min(config.distractors, len(chosen) - 1)
    rows = _rows(found, LIKENESS)
    sought = _rows(found, {"among_others": f"among {distractors} steps of others", "among_own": "among its own steps"})
    for row in sought:
        row |= {"chance": 1 / (1 + distractors), "chance among its own": found["chance_own"].mean().item()}
    per_set = PerSet()
    for key, title in {**LIKENESS, **FOUND}.items():
        per_set.add(f"{_MODEL}: {title}", found[key][:, 0], "higher", chosen)
        per_set.add(f"{_COPY}: {title}", found[key][:, 2], "neither", chosen)
        moved = found["reordered"]
        if moved.any():
            lost = (found[key][:, 0] - found[key][:, 1])[moved]
            per_set.add(
                f"{_MODEL}, lost out of order: {title}", lost, "neither", np.array(chosen)[moved.numpy()].tolist()
            )
    run.table("The next step against the true one", rows)
    run.table("Finding the true next step by the generated one", sought)
    _show(config, run, sampler, procedures, chosen)
    run.figure(**{f"{title}, next step": round(rows[0][title], 4) for title in LIKENESS.values()})
    run.count(procedures=len(chosen), generated_images=len(chosen) * 2)
    proof = _prove(config, run, measures, sampler.size)
    conclude(run, {"likeness": rows, "retrieval": sought} | ({"planted": proof} if proof else {}), per_set)


def _prove(config: NextSteps, run: StageRun, measures: StepMeasures, size: int) -> dict[str, Any] | None:
    """Planted models on procedures of both splits, the held-out ones first: nobody was trained on them."""
    found: list[Tensor] = []
    for split in ("test", "train"):
        # a planted follower goes wrong where the order is: two steps before the one that is sought
        if len(found) < config.planted_procedures and (run.source(config.vgsi) / IMAGES / split).is_dir():
            procedures = Procedures(run.source(config.vgsi), split)
            for i in keyed_generator(namespaced(config.seed, "planted procedures")).permutation(len(procedures)):
                if len(found) < config.planted_procedures and len(procedures[int(i)].step_ids) > 2:
                    found.append(procedures.images(int(i), size))
    found = [steps for steps in found if len(steps) > 2]
    if len(found) < 2:
        if config.planted_procedures:
            run.progress.log(f"the measures are not proven: {len(found)} procedures have three steps or more")
        return None
    orders = [_out_of_order(config, i, min(config.preceding, len(steps) - 1)) for i, steps in enumerate(found)]
    return prove_steps(found, orders, measures, config.distractors).tell(run)


def _held_out(config: NextSteps, procedures: Procedures, size: int) -> list[int]:
    """Random procedures of two readable steps or more, in order."""
    chosen: list[int] = []
    for i in keyed_generator(namespaced(config.seed, "procedures")).permutation(len(procedures)).tolist():
        if len(chosen) < config.procedures and len(procedures[i].step_ids) > 1 and len(procedures.images(i, size)) > 1:
            chosen.append(i)
    if len(chosen) < 2:
        raise InputError(
            f"{config.vgsi}: {len(chosen)} held-out procedures have two steps or more; at least two are compared"
        )
    return sorted(chosen)


def _next(
    config: NextSteps, sampler: Sampler, given: Tensor, keys: Sequence[int], before: int, num_images: int
) -> Tensor:
    """Steps after the first `before` ones; positions count from 0."""
    positions = torch.arange(before + num_images, dtype=torch.float32)[None, :, None].expand(len(given), -1, 1)
    conditions: dict[str, Any] = {"condition": positions[:, :before], "target_condition": positions[:, before:]}
    if config.condition_guidance_scale is not None:
        conditions["condition_guidance_scale"] = config.condition_guidance_scale
    return sampler.continue_sets(given, keys, num_images, **conditions)


def _out_of_order(config: NextSteps, place: int, before: int) -> list[int]:
    """An order of the preceding steps in which not all are in place (if there are two)."""
    drawn = keyed_generator(namespaced(config.seed, "out of order"), place)
    order = list(range(before))
    while before > 1 and order == list(range(before)):
        order = drawn.permutation(before).tolist()
    return order


def _offsets(config: NextSteps, place: int, count: int) -> list[int]:
    drawn = keyed_generator(namespaced(config.seed, "distractors"), place)
    return drawn.permutation(count - 1)[: config.distractors].tolist()


def _a_step(config: NextSteps, procedures: Procedures, index: int, place: int, other: int, size: int) -> Tensor:
    drawn = keyed_generator(namespaced(config.seed, "distractor step"), place, other)
    steps = procedures.images(index, size)
    return steps[int(drawn.integers(len(steps)))]


def _rows(found: Mapping[str, Tensor], measures: Mapping[str, str]) -> list[dict[str, Any]]:
    """Means over procedures; out of order only over those in which something could be out of order."""
    rows = []
    reordered = found["reordered"]
    for place, name in enumerate((_MODEL, _SHUFFLED, _COPY)):
        counted = reordered if name == _SHUFFLED and reordered.any() else torch.ones_like(reordered)
        row: dict[str, Any] = {"image": name}
        for key, title in measures.items():
            row[title] = found[key][counted, place].mean().item()
        rows.append(row)
    return rows


def _show(config: NextSteps, run: StageRun, sampler: Sampler, procedures: Procedures, chosen: Sequence[int]) -> None:
    """Preceding steps, generated ones (one after the other), the true ones."""
    rows = []
    for place, index in enumerate(chosen[: config.shown]):
        steps = procedures.images(index, sampler.size)
        before = min(config.preceding, max(1, len(steps) // 2))
        following = min(config.num_images, len(steps) - before)
        made = _next(config, sampler, steps[None, :before], [place], before, following)[0]
        rows.append([steps[:before], made, steps[before : before + following]])
    run.picture("Preceding steps, generated ones, and the true ones", write_grid(run.out / "steps", rows))
