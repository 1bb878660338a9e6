"""The report: one self-contained HTML page of what a profile made, measured, and from what.

Belongs here: gathering summaries, manifests and run records; the regression gate's check. Not here: how a page is made
of them (`m2m.evaluation.page`), any measuring.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from m2m import artifacts
from m2m.artifacts import Manifest, Summary
from m2m.config import Source, StageConfig
from m2m.errors import ArtifactError
from m2m.evaluation.curves import CURVES, write_curves
from m2m.evaluation.gate import FALSE_ALARMS, HEADLINES, WORSENING, gate, regressions, undecided
from m2m.evaluation.page import data_uri, inside, missing_from, render
from m2m.evaluation.per_set import PER_SET, Metric, open_per_set, read_per_set, write_per_set
from m2m.evaluation.preceding_curves import TABLE, kept_and_varying, with_errors
from m2m.evaluation.protocol import METRICS
from m2m.stage_run import StageRun
from m2m.stages import STAGES, Stage

PAGE = "report.html"
_GROUPS = {"data": "Data", "models": "Models", "evaluation": "Evaluation"}
_TITLES = {
    "filter-captions": "Captions",
    "generate-sets": "Image sets (MIS)",
    "cache-features": "DINO features",
    "pretrain@self": "M2M-Self",
    "pretrain@dino": "M2M-DINO",
    "finetune@nvs": "Fine-tuned for novel views",
    "finetune@vgsi": "Fine-tuned for procedures",
    "evaluate@table_1": "Table 1",
    "evaluate@preceding_images": "What preceding images tell",
    "evaluate@consistency": "Content and style kept",
    "evaluate@real_images": "Real photographs",
    "evaluate@novel_views": "Novel views",
    "evaluate@procedures": "Procedures",
    "evaluate@sampling_speed": "Sampling speed",
    "evaluate@rollouts": "Long sequences",
}
_HOW_TO_READ = {
    "evaluate@table_1": "Each score is computed for every n-th generated image over all sets, then averaged over n "
    "(± standard deviation). “Real” for FID are the sets' first images. The sets' own images, scored in the same way, "
    "show what a perfect continuation would get.",
    "evaluate@preceding_images": "One picture cannot say what of it is the pattern; several that agree can. The ideal "
    "observer knows how often captions fix an attribute and concludes perfectly from what is seen; it is the most that "
    "these pictures can tell. What a set shares must be kept, and what differs among its images must go on varying "
    "(agree by chance alone): the first curves show both. Rates are corrected for the reader's "
    "errors; “±” is their standard error over trials. "
    "Planted models prove the measures: the oracle shows pictures of the true set and has to meet the ideal observer's "
    "curve, the copier repeats a picture, the guesser ignores all of them, the drifter gets worse with every image.",
    "evaluate@consistency": "Generated images should be as like the preceding ones as the set's own further images "
    "are: more alike than another set's, but no copies (a nearest distance far below the set's own would be copying).",
    "evaluate@real_images": "The models saw only synthetic sets. What they add to photographs of one category should "
    "be more like that category's other photographs than like the other categories'.",
    "evaluate@novel_views": "Generated views against the true ones. Copying the nearest preceding view is the baseline "
    "to beat; the autoencoder's own loss is the ceiling.",
    "evaluate@procedures": "The next step against the true one. If the order of the steps matters to the model, giving "
    "them out of order costs it something; copying the last step is the baseline.",
    "evaluate@sampling_speed": "Median wall-clock seconds an image, single sets, guidance on.",
    "evaluate@rollouts": "Each image sees the generated ones before it: errors add up. 1 means as in the preceding "
    "images.",
}
_HEADLINES = {
    ("filter-captions", "kept"): "captions kept",
    ("generate-sets", "sets"): "image sets",
    ("generate-sets", "images"): "images in them",
    ("evaluate@table_1", "sets"): "test sets in Table 1",
    ("evaluate@table_1", "fid_self"): "FID, M2M-Self",
    ("evaluate@table_1", "fid_dino"): "FID, M2M-DINO",
    ("evaluate@table_1", "image_self"): "Image-Image CLIP, M2M-Self",
    ("evaluate@table_1", "image_dino"): "Image-Image CLIP, M2M-DINO",
}
"""(stage, count or figure) -> what it is called at the top of the page."""


class WriteReport(StageConfig):
    """Settings of the report."""

    title: str = Field("Many-to-many image generation", description="the page's heading")
    picture_width: int = Field(1600, ge=64, description="pixels; wider pictures are made smaller for the page")
    headline_pictures: int = Field(2, ge=1, description="pictures at the top, from Table 1's sequences")
    accepted: Annotated[Path | None, Source()] = Field(
        None, description="per_set.parquet of the last accepted report, for the regression gate; without one it is off"
    )
    gate_headlines: list[str] = Field(
        list(HEADLINES), description="metrics that share one half of gate_false_alarms; all others share the other half"
    )
    gate_false_alarms: float = Field(
        FALSE_ALARMS, gt=0, lt=1, description="how often an unchanged model, evaluated with other seeds, is refused"
    )


@dataclass
class Section:
    """One stage's part of the page."""

    stage: Stage
    folder: Path
    manifest: Manifest
    summary: Summary
    seconds: float | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    per_set: Mapping[str, Metric] = field(default_factory=dict)

    @property
    def origins(self) -> list[tuple[str, str]]:
        """Seeds, and the checkpoints and data by the stage that made them and their manifest's digest."""
        config = self.manifest.config
        seeds = [(name.replace("_", " "), str(config[name])) for name in config if name.endswith("seed")]
        made = [(self.stage.inputs.get(name, name), digest[:12]) for name, digest in self.manifest.inputs.items()]
        return [*seeds, *made]

    @property
    def metric_rows(self) -> list[dict[str, Any]]:
        """Every metric with its standard error over sets."""
        return [
            {"metric": name, "mean": one.mean, "standard error": one.error, "sets": len(one.values)}
            for name, one in self.per_set.items()
        ]

    @property
    def id(self) -> str:
        return self.stage.key.replace("@", "-")

    @property
    def title(self) -> str:
        return _TITLES.get(self.stage.key, self.stage.key)

    @property
    def how_to_read(self) -> str:
        return _HOW_TO_READ.get(self.stage.key, "")

    @property
    def size(self) -> int:
        return sum(record.size for record in self.manifest.files)

    @property
    def config_text(self) -> str:
        return json.dumps(self.manifest.config, indent=2, ensure_ascii=False)


def write_report(config: WriteReport, run: StageRun) -> None:
    """Write `report.html` from the inputs' summaries and manifests, with everything it shows inside it.

    Raises:
        ArtifactError: an input's summary or one of its pictures can't be read.
    """
    sections = [_section(run, name, folder) for name, folder in run.inputs.items()]
    order = list(STAGES)
    sections.sort(key=lambda section: order.index(section.stage.key))
    headlines = _headline_pictures(config, run, sections)
    figures = _headline_figures(sections)
    groups = [
        (title, [section for section in sections if section.stage.group == group]) for group, title in _GROUPS.items()
    ]
    metrics = {
        f"{section.stage.variant}: {name}": metric for section in sections for name, metric in section.per_set.items()
    }
    compared = _compare_with_accepted(config, run, metrics)
    html = render(
        config.picture_width,
        title=config.title,
        profile=run.profile.name,
        label=run.profile.label,
        groups=[(title, found) for title, found in groups if found],
        sections=sections,
        figures=figures,
        headlines=headlines,
        started_from=_started_from(sections),
        seconds=sum(section.seconds or 0 for section in sections),
        machine=_machine(sections),
        fingerprint=run.fingerprint,
        compared=compared,
    )
    artifacts.write_bytes(run.out / PAGE, html.encode())
    write_per_set(run.out / PER_SET, metrics)
    for section in sections:
        write_curves(run.out / CURVES, section.id, section.title, section.summary.curves)
    artifacts.write_json(run.out / METRICS, {section.stage.key: _metrics(section) for section in sections})
    run.figure(**figures, gate=compared or None)
    run.count(
        metrics=len(metrics),
        sections=len(sections),
        pictures=sum(len(section.summary.pictures) for section in sections),
    )
    missing = missing_from(html, [section.id for section in sections])
    run.check("report_complete", not missing, "; ".join(missing))


def _metrics(section: Section) -> dict[str, Any]:
    """One section of the report's `metrics.json`: what was measured, and with what."""
    path = section.folder / METRICS
    try:
        measured = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        raise ArtifactError(f"{path}: not JSON") from None
    return {
        "metrics": measured,
        "means": {
            name: {"mean": one.mean, "error": one.error, "sets": len(one.values), "better": one.better}
            for name, one in section.per_set.items()
        },
        "config": section.manifest.config,
        "counts": section.manifest.counts,
        "inputs": section.manifest.inputs,
        "fingerprint": section.manifest.fingerprint,
        "manifest": section.manifest.digest,
    }


def _compare_with_accepted(config: WriteReport, run: StageRun, metrics: dict[str, Metric]) -> str:
    """Check against the accepted report, and what came of it in words; empty without one."""
    if config.accepted is None:
        run.check("no_regression", True, "")
        return ""
    tested = gate(
        open_per_set(run.source(config.accepted)),
        metrics,
        headlines=config.gate_headlines,
        false_alarms=config.gate_false_alarms,
    )
    run.check("no_regression", not (worse := regressions(tested)), "; ".join(worse))
    open_ = undecided(tested)
    headlines = [why for why in open_ if why.startswith(tuple(config.gate_headlines))]
    return (
        f"{len(tested)} metrics compared with the accepted report, {len(worse)} worse, {len(open_)} that may be worse "
        f"by {WORSENING:g} standard errors or more" + "".join(f". Not known: {why}" for why in headlines)
    )


def _section(run: StageRun, name: str, folder: Path) -> Section:
    stage = STAGES[run.stage.inputs[name]]
    manifest = artifacts.read_manifest(folder)
    if manifest is None:
        raise ArtifactError(f"{folder} is not whole. Make it with: {stage.make_command(run.profile)}")
    record = _run_record(run.profile.outputs / "runs" / stage.key, manifest)
    per_set = read_per_set(folder / PER_SET) if (folder / PER_SET).is_file() else {}
    summary = _with_derived_curves(artifacts.read_summary(folder), manifest, per_set)
    return Section(stage, folder, manifest, summary, record.get("seconds"), record, per_set)


def _with_derived_curves(summary: Summary, manifest: Manifest, per_set: Mapping[str, Metric]) -> Summary:
    """What a table of the evaluation shows as a curve, too, before its other curves; errors where these lack them."""
    guidance = (manifest.config.get("sampling") or {}).get("guidance_scale")
    rows = summary.tables.get(TABLE, [])
    derived = kept_and_varying(rows, [1.0] if guidance is None else sorted({1.0, float(guidance)}))
    return summary.model_copy(update={"curves": {**derived, **with_errors(summary.curves, per_set)}})


def _run_record(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The newest record of a run that made this very output; empty where it was made elsewhere."""
    for path in sorted(folder.glob("*.json"), reverse=True):
        try:
            record = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if record.get("manifest") == manifest.digest:
            return record
    return {}


def _headline_pictures(config: WriteReport, run: StageRun, sections: list[Section]) -> list[tuple[str, str]]:
    """The first pictures of Table 1 (or of whatever evaluation has some), also as pictures of the report itself."""
    by_key = {section.stage.key: section for section in sections}
    first = [by_key[key] for key in ("evaluate@table_1", "evaluate@consistency") if key in by_key]
    found = [(section, item) for section in [*first, *sections] for item in section.summary.pictures.items()]
    headlines = []
    for place, (section, (caption, path)) in enumerate(found[: config.headline_pictures]):
        source = inside(section.folder, path)
        copy = run.out / f"headline-{place + 1}{source.suffix}"
        artifacts.write_bytes(copy, source.read_bytes())
        run.picture(caption, copy)
        headlines.append((caption, data_uri(source, config.picture_width)))
    return headlines


def _headline_figures(sections: list[Section]) -> dict[str, Any]:
    """What was made in numbers: counts of the data, Table 1's scores, the time it took."""
    by_key = {section.stage.key: section for section in sections}
    figures: dict[str, Any] = {}
    for (key, name), title in _HEADLINES.items():
        if key in by_key:
            section = by_key[key]
            value = section.manifest.counts.get(name, section.summary.figures.get(name))
            if value is not None:
                figures[title] = value
    return figures


def _started_from(sections: list[Section]) -> list[tuple[str, str, str]]:
    """For each pre-trained model: its name, the weights that it started from, and the command that made those."""
    told = []
    for section in sections:
        said = section.summary.figures.get("started_from")
        if section.stage.command == "pretrain" and said:
            source, _, command = str(said).partition(", made by: ")
            told.append((section.title, source, command))
    return told


def _machine(sections: list[Section]) -> list[tuple[str, str]]:
    """Where the newest of the runs took place."""
    runs = sorted((section.run for section in sections if section.run), key=lambda record: record.get("started", ""))
    if not runs:
        return []
    newest = runs[-1]
    machine, git = newest.get("machine") or {}, newest.get("git") or {}
    revision = str(git.get("revision") or "unknown")[:12] + (" with local changes" if git.get("dirty") else "")
    told = {
        "last run": newest.get("started"),
        "system": machine.get("system"),
        "cpus": machine.get("cpus"),
        "python": machine.get("python"),
        "revision": revision,
        **(newest.get("packages") or {}),
    }
    return [(key, str(value)) for key, value in told.items() if value is not None]
