"""What one to four preceding images tell (paper, section 8.2 and Fig. 6).

One preceding image can't say what of it is the pattern: its single apple may be chance. The more images agree in an
attribute, the likelier it is shared by the set. An ideal observer who knows how often sets share the attribute draws
exactly that conclusion; how near the model comes is what this measures where the tiny world's pictures can be read.

Belongs here: what models make of trials, and the telling of it. Not here: the trials, the ideal observer
(`m2m.evaluation.agreement`).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from m2m.config import Later
from m2m.data.sets import ImageSets
from m2m.evaluation.agreement import SHARED_RATE, Agreement, Trials, agreement, draw_trials, reading_accuracy
from m2m.evaluation.encoders import ClassifierBackbone, Clip, Reader
from m2m.evaluation.grids import write_grid
from m2m.evaluation.instruments import Tools, prove
from m2m.evaluation.measures import cosine, rmse
from m2m.evaluation.noises import over_noises
from m2m.evaluation.per_set import PerSet
from m2m.evaluation.planted import PLANTED, PlantedSampler, WorldSets
from m2m.evaluation.preceding_curves import KEPT, LIKENESS, LIKENESS_BY_SET, TABLE, VARYING
from m2m.evaluation.protocol import BothModels, conclude, each_picture, in_batches
from m2m.evaluation.sampler import Continues, Sampler, samplers
from m2m.evaluation.set_pictures import SetPictures
from m2m.generation.noise import namespaced
from m2m.stage_run import StageRun
from m2m.tiny.sketch import Renderer
from m2m.tiny.world import ATTRIBUTES, read_caption

_KINDS = {"agreement": "agreement", "kept": KEPT, "varying": VARYING}
_ORACLE = "planted: oracle"
_REACH = {"agreement": "ideal observer", "kept": "all", "varying": "chance"}


class PrecedingImages(BothModels):
    """Settings of the evaluation by number of preceding images."""

    trials: int = Field(200, ge=1, description="sets of preceding images: drawn by the world with a reader, else tests")
    preceding: list[Annotated[int, Field(ge=0)]] = Field(
        [1, 2, 3, 4],
        min_length=1,
        description="numbers of preceding images (Fig. 6: 1 to 4); 0: the same model without context",
    )
    guidances: Annotated[list[Annotated[float, Field(ge=1)]], Later()] = Field(
        [], description="guidance scales beside 1 and that of `sampling`, for a sweep"
    )
    sketches: Annotated[bool, Later()] = Field(
        False,
        description="with a reader: also carry on sketches of the same attributes, a renderer seen in no training "
        "(zero-shot), at the guidance scale of `sampling`",
    )
    shared_rate: Annotated[float | None, Later()] = Field(
        None,
        gt=0,
        lt=1,
        description="how often the sets that the models were trained on share an attribute: what the ideal observer "
        "knows; by default what the captions of the training sets name",
    )
    in_detail: Annotated[bool, Later()] = Field(
        False, description="with a reader: also what is kept by attribute, and how near the nearest preceding image is"
    )
    planted_sets: int = Field(
        24, ge=0, description="sets that planted models continue to prove the measures; needs a reader, 0 leaves it out"
    )


@over_noises
def evaluate_preceding_images(config: PrecedingImages, run: StageRun) -> None:
    """Generate one image after 1, 2, ... preceding ones, with the same noise, without and with guidance.

    Tells the likeness (CLIP) to all of a set's preceding images, shown or not, and with a reader how often the image
    agrees in the attributes in which they do, and in the ones in which they differ (there, with the first image).
    Planted models go through the same arithmetic: the oracle has to meet the ideal observer's curve.
    """
    clip, reader = config.open_clip(run), config.open_reader(run)
    guidances = sorted({1.0, config.sampling.guidance_scale, *config.guidances})
    told = _Told(config, run, _shared_rates(config, run) if reader else {})
    for name, sampler in samplers(config, run):
        trials = _drawn(config, sampler.size) if reader else _test_sets(config, run, sampler)
        if reader and trials.sets and not told.rows:
            # planted models have no guidance, and their pictures did not go through the autoencoder
            accuracy = reading_accuracy(lambda pictures: pictures, trials, reader)
            for kind in PLANTED:
                planted = PlantedSampler(kind, trials.sets, sampler.size, first=max(config.preceding))
                found = _generate(config, run, kind, planted, trials, [1.0], clip, reader)
                told.add(f"planted: {kind}", trials, found, [None], accuracy)
        accuracy = reading_accuracy(sampler.reconstruct, trials, reader) if reader else {}
        found = _generate(config, run, name, sampler, trials, guidances, clip, reader)
        told.add(name, trials, found, guidances, accuracy)
        _show(run, name, trials, found["pictures"][:, guidances.index(config.sampling.guidance_scale)], config)
        if reader and config.sketches:
            title, own = f"{name}, of sketches", [config.sampling.guidance_scale]
            drawn = _drawn(config, sampler.size, "sketch")
            found = _generate(config, run, title, sampler, drawn, own, clip, reader)
            told.add(title, drawn, found, own, reading_accuracy(sampler.reconstruct, drawn, reader))
            _show(run, title, drawn, found["pictures"][:, 0], config)
    if reader and config.reader and config.planted_sets:
        backbone = ClassifierBackbone(config.reader, run.profile.root, config.compute)
        tools = Tools(clip, config.open_dino(run), reader, backbone)
        drawn = WorldSets.drawn(config.planted_sets, namespaced(config.seed, "planted"), SHARED_RATE)
        shown = prove(drawn, tools, size=trials.pictures.shape[-1], preceding=4, num_images=6, seed=config.seed)
        told.metrics["planted"] = shown.tell(run)
    told.conclude(guidances, accuracy)


def _drawn(config: PrecedingImages, size: int, renderer: Renderer = "world") -> Trials:
    return draw_trials(config.trials, max(config.preceding), config.seed, size, renderer)


def _shared_rates(config: PrecedingImages, run: StageRun) -> dict[str, float]:
    """How often training sets share each attribute: the ideal observer's prior."""
    if config.shared_rate is not None:
        return dict.fromkeys(ATTRIBUTES, config.shared_rate)
    sets = ImageSets(run.inputs["sets"], "train")
    named = [read_caption(sets.caption(i)) for i in range(len(sets))]
    return {name: sum(name in told for told in named) / len(named) for name in ATTRIBUTES}


def _test_sets(config: PrecedingImages, run: StageRun, sampler: Sampler) -> Trials:
    sets = SetPictures(run, sampler)
    chosen = config.choose(len(sets), config.trials, "preceding images")
    pictures = sets.stack(chosen, range(max(config.preceding)))
    return Trials(pictures, [sets.key(i) for i in chosen])


def _generate(
    config: PrecedingImages,
    run: StageRun,
    name: str,
    sampler: Continues,
    trials: Trials,
    guidances: Sequence[float],
    clip: Clip,
    reader: Reader | None,
) -> dict[str, Tensor]:
    """Tensors (trials, guidances, numbers of preceding images, ...)."""

    def measure(batch: range) -> dict[str, Tensor]:
        preceding = trials.pictures[batch.start : batch.stop]
        keys = trials.keys[batch.start : batch.stop]
        made = torch.stack(
            [
                torch.stack(
                    [
                        sampler.continue_sets(preceding[:, :count], keys, guidance_scale=guidance)[:, 0]
                        for count in config.preceding
                    ],
                    1,
                )
                for guidance in guidances
            ],
            1,
        )
        single = made.flatten(0, 2)
        embedded = clip.pictures(single).unflatten(0, made.shape[:3])
        like = cosine(embedded[:, :, :, None], each_picture(clip.pictures, preceding)[:, None, None]).mean(-1)
        told = {"clip": like, "pictures": made[: max(0, config.shown - batch.start)]}
        if reader:
            told["read"] = reader.read(single).unflatten(0, made.shape[:3])
        if config.in_detail:
            told["nearest"] = torch.stack(
                [_nearest(made[:, :, place], preceding[:, :count]) for place, count in enumerate(config.preceding)], 2
            )
        return told

    return in_batches(run, name, len(trials.keys), config.batch, measure)


def _nearest(made: Tensor, preceding: Tensor) -> Tensor:
    """Pictures (B, guidances, 3, H, W) to the nearest of (B, count, 3, H, W), RMSE; 0 where none precede."""
    if not preceding.shape[1]:
        return torch.zeros(made.shape[:2], dtype=torch.float64)
    return rmse(made[:, :, None], preceding[:, None]).double().amin(2)


def _show(run: StageRun, name: str, trials: Trials, pictures: Tensor, config: PrecedingImages) -> None:
    rows = [[before, made] for before, made in zip(trials.pictures, pictures)]
    told = ", ".join(map(str, config.preceding))
    run.picture(
        f"{name}: preceding images, then one image generated after the first {told} of them",
        write_grid(run.out / name, rows),
    )


class _Told:
    """Rows, curves and values by trial of one evaluation as they come."""

    def __init__(self, config: PrecedingImages, run: StageRun, priors: Mapping[str, float]) -> None:
        self._config, self._run, self._priors = config, run, priors
        self.rows: list[dict[str, Any]] = []
        self.per_set = PerSet()
        self.metrics: dict[str, Any] = {}
        self._off: list[float] = []  # of the oracle from the ideal observer's curve
        self._by_attribute: list[dict[str, Any]] = []
        self._nearest: list[dict[str, Any]] = []

    def add(
        self,
        name: str,
        trials: Trials,
        found: Mapping[str, Tensor],
        guidances: Sequence[float | None],
        accuracy: Mapping[str, float],
    ) -> None:
        """One model's rows: for every guidance (None where there is no such thing) and number of preceding images."""
        for g, guidance in enumerate(guidances):
            for k, count in enumerate(self._config.preceding):
                row: dict[str, Any] = {"model": name, "guidance": guidance, "preceding images": count}
                place = (
                    f"{name}, {'no guidance scale' if guidance is None else f'guidance {guidance:g}'}, {count} before"
                )
                better = "neither" if guidance is None else "higher"
                like = self.per_set.add(f"{place}: {LIKENESS_BY_SET}", found["clip"][:, g, k] * 100, better)
                row[LIKENESS_BY_SET] = like.mean
                if trials.labels is not None:
                    kinds = agreement(trials, found["read"][:, g, k], count, self._priors, accuracy)
                    for kind, title in _KINDS.items():
                        here = kinds.get(kind)
                        metric = None if here is None else self.per_set.add(f"{place}: {title}", here.values)
                        row[title] = metric and metric.mean
                        row[f"{title} ±"] = metric and metric.error
                        row[_REACH[kind]] = here and here.reach
                    row["agreement as read"] = kinds["agreement"].as_read
                    if name == _ORACLE:
                        self._off.append(kinds["agreement"].off)
                    if self._config.in_detail and "kept" in kinds:
                        self._detail(row, place, kinds["kept"], found["nearest"][:, g, k])
                self.rows.append({key: value for key, value in row.items() if key != _REACH["kept"]})

    def _detail(self, row: Mapping[str, Any], place: str, kept: Agreement, nearest: Tensor) -> None:
        told = {key: row[key] for key in ("model", "guidance", "preceding images")}
        self._by_attribute.append({**told, **kept.by_attribute, "mean": float(kept.values.mean())})
        if row["preceding images"]:
            distance = self.per_set.add(f"{place}: nearest, RMSE", nearest).mean
            true = [one for one in self._nearest if one["model"] == _ORACLE]
            true = [one["nearest: RMSE"] for one in true if one["preceding images"] == row["preceding images"]]
            over = distance / true[0] if true and true[0] else 1.0  # the oracle comes first: its own is 1
            self._nearest.append({**told, "nearest: RMSE": distance, "over the same in true sets": over})

    def conclude(self, guidances: Sequence[float], accuracy: Mapping[str, float]) -> None:
        self._run.table(TABLE, self.rows)
        for key, title in {"agreement": "Agreement", LIKENESS_BY_SET: LIKENESS}.items():
            if key in self.rows[0]:
                for guidance in guidances:
                    self._run.curve(f"{title}, guidance {guidance:g}", self._columns(key, guidance))
        if accuracy:
            self._run.table(
                "The attributes",
                [
                    {
                        "attribute": name,
                        "values": len(values),
                        "training captions that name it": self._priors[name],
                        "read rightly off autoencoder's pictures": accuracy[name],
                    }
                    for name, values in ATTRIBUTES.items()
                ],
            )
        if self._by_attribute:
            self._run.table("Kept where shared, by attribute", self._by_attribute)
            self._run.table("Distance to the nearest preceding image", self._nearest)
            self._run.curve("Kept where shared, by guidance scale", self._by_guidance(guidances))
            self.metrics |= {"by_attribute": self._by_attribute, "nearest": self._nearest}
        if self._off:
            furthest = max(self._off, key=abs)
            self._run.figure(**{"the oracle's furthest from the ideal observer, in standard errors": furthest})
            self.metrics["oracle_off_the_ideal_observer"] = self._off
        config, most = self._config, max(self._config.preceding)
        for row in self.rows:
            if row["preceding images"] == most and row["guidance"] == config.sampling.guidance_scale:
                key = "agreement" if "agreement" in row else LIKENESS_BY_SET
                self._run.figure(**{f"{row['model']}: {key} after {most}": row[key]})
        self._run.count(
            trials=config.trials,
            generated_images=config.trials * len(guidances) * len(config.preceding) * len(config.models),
        )
        self.metrics |= {"rows": self.rows, "priors": dict(self._priors), "reading_accuracy": dict(accuracy)}
        conclude(self._run, self.metrics, self.per_set)

    def _by_guidance(self, guidances: Sequence[float]) -> dict[str, list[float]]:
        """What models keep after most preceding images."""
        columns: dict[str, list[float]] = {"guidance scale": list(guidances)}
        for row in self.rows:
            if row["guidance"] is not None and row["preceding images"] == max(self._config.preceding):
                columns.setdefault(str(row["model"]), []).append(float(row[_KINDS["kept"]]))
                columns.setdefault(f"{row['model']} ±", []).append(float(row[f"{_KINDS['kept']} ±"] or 0.0))
        return {name: values for name, values in columns.items() if len(values) == len(guidances)}

    def _columns(self, key: str, guidance: float) -> dict[str, list[float]]:
        """Models at this guidance and the oracle, each with its errors; for agreement the ideal observer, too."""
        columns: dict[str, list[float]] = {"preceding images": [float(count) for count in self._config.preceding]}
        here = [row for row in self.rows if row["guidance"] == guidance or row["model"] == _ORACLE]
        for row in here:
            columns.setdefault(str(row["model"]), []).append(float(row[key]))
            if row.get(f"{key} ±") is not None:
                columns.setdefault(f"{row['model']} ±", []).append(float(row[f"{key} ±"]))
        if key == "agreement":
            columns["ideal observer"] = [float(row["ideal observer"]) for row in here[: len(self._config.preceding)]]
        return columns
