"""The page of results: its tables, charts and pictures are rebuilt from the outputs of evaluations, its words stay.

The evaluations are kept beside the page, in `outputs/SEED`, without pictures that the page does not show: who measures
one of them anew fills what comes of that one.

Belongs here: filling the marked places of a Markdown page. Not here: measuring (`m2m.evaluation`), the words
(`docs/results/README.md`), what is read off several seeds (`m2m.tiny.reached`, `m2m.tiny.seeds`).

A place is a pair of comments; what stands between them is replaced:

    <!-- table evaluate@preceding_images: By number of preceding images | model, kept where shared | guidance=1/7.5 -->
    <!-- end -->

There are `table` (with the columns and the rows that are shown, else all) and `curve`, over the seeds that have them,
and `picture` of a stage, by what the stage calls them; `losses` of the shipped weights, `time` that the stages took,
and `reached` over all seeds.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from PIL import Image

from m2m import artifacts
from m2m.artifacts import Summary
from m2m.errors import InputError
from m2m.evaluation.charts import picture as drawn_chart
from m2m.evaluation.page import cell
from m2m.tiny.reached import reached
from m2m.tiny.seeds import curves_over_seeds, rows_over_seeds
from m2m.training.log import LOG

_PLACE = re.compile(r"<!-- (?P<kind>\w+) ?(?P<what>[^\n]*?) -->\n(?P<old>(?:(?!<!-- ).)*)<!-- end -->", re.DOTALL)
_MARK = re.compile(r"<!-- \w+")
_KEPT = "outputs"
_RUNS = "runs"
_NOT_YET = "*Not measured yet.*"
_WIDEST = 1000  # pixels of a picture
_SMOOTHED = ("M2M-Self", "M2M-DINO")


def rebuild(page: Path, outputs: Sequence[Path], weights: Path) -> list[str]:
    """Keep the evaluations beside a page and fill all its places; older files of the same name are replaced.

    Args:
        outputs: of one profile, a folder for each seed, from 0 on; pictures and times are the first one's.
            What one lacks is taken from what was kept of that seed before.
        weights: the folder of tiny weights whose training logs are shown.

    Returns:
        The places for which there is nothing in the outputs.

    Raises:
        InputError: no such page or folder, a place of a kind that there is not, or one without its end (then nothing
            is kept); the seeds' evaluations are not alike. The page stays as it is.
    """
    for path in (page, *outputs):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    text, missing = page.read_text("utf-8"), []
    kinds: dict[str, Callable[[str], str]] = {
        "table": lambda what: _table(outputs, what),
        "curve": lambda what: _curve(outputs, what, page.parent),
        "picture": lambda what: _picture(outputs[0], what, page.parent),
        "losses": lambda _: _losses(weights, page.parent),
        "time": lambda _: markdown(_times(outputs[0]), ("stage", "seconds", "started")),
        "reached": lambda _: markdown(reached(outputs, weights)),
    }
    places = list(_PLACE.finditer(text))
    for place in places:
        if place["kind"] not in kinds:
            raise InputError(f"{page}: a place of kind {place['kind']!r}; there are: {', '.join(kinds)}")
    if len(_MARK.findall(text)) != 2 * len(places):
        raise InputError(f"{page}: a place has no kind or no end")
    shown = {place["what"] for place in places if place["kind"] == "picture"}
    outputs = _keep(outputs, page.parent / _KEPT, shown)

    def filled(place: re.Match[str]) -> str:
        kind, what = place["kind"], place["what"]
        content = kinds[kind](what)
        if not content:
            missing.append(f"{kind} {what}".strip())
        return f"<!-- {kind} {what} -->".replace("  ", " ") + f"\n{content or _NOT_YET}\n<!-- end -->"

    page.write_text(_PLACE.sub(filled, text), "utf-8")
    return missing


def _keep(outputs: Sequence[Path], kept: Path, shown: Set[str]) -> list[Path]:
    """Copy finished evaluations, and when and how long stages ran; the kept folders, one for each seed."""

    def unseen(folder: str, names: list[str]) -> set[str]:
        pictures = {name for name in names if Path(name).suffix == ".png"}
        wanted = {name for name in pictures if f"evaluate@{Path(folder).name}: {Path(name).stem}" in shown}
        return pictures - (wanted if seed == 0 else set())

    for seed, folder in enumerate(outputs):
        there = kept / str(seed)
        if folder.resolve() == there.resolve():
            continue
        for evaluation in folder.glob("evaluate/*"):
            if artifacts.read_manifest(evaluation):
                shutil.rmtree(there / "evaluate" / evaluation.name, ignore_errors=True)
                shutil.copytree(evaluation, there / "evaluate" / evaluation.name, ignore=unseen)
        for records in (folder / _RUNS).glob("*"):
            newest = max(records.glob("2*.json"), default=None)
            if newest is None:  # its first run goes on
                continue
            record = json.loads(newest.read_bytes())
            told = {"stage": records.name, "seconds": round(record["seconds"]), "started": record["started"]}
            (there / _RUNS).mkdir(parents=True, exist_ok=True)
            artifacts.write_json(there / _RUNS / f"{records.name}.json", told)
    found = sorted(kept.glob("[0-9]*"), key=lambda folder: int(folder.name))
    if not found:
        raise InputError(f"{kept}: no evaluation is kept here; name a folder with some, outputs/tiny_claims")
    return found


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """A table in Markdown; empty without rows. A column "x ±" is shown behind its column "x"."""
    if not rows:
        return ""
    shown = [name for name in columns or rows[0] if not name.endswith(" ±")]
    lines = [shown, ["---"] * len(shown)]
    for row in rows:
        errors = {name: row.get(f"{name} ±") for name in shown}
        lines.append([_cell(row.get(name), errors[name]) for name in shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any, error: float | None) -> str:
    said = f"{value:.3f}" if isinstance(value, float) and abs(value) < 10 else cell(value)
    return said if error is None or value is None else f"{said} ± {error:.3f}"


def _summary(outputs: Path, stage: str) -> Summary | None:
    folder = outputs / stage.replace("@", "/")
    return artifacts.read_summary(folder) if artifacts.read_manifest(folder) else None


def _summaries(outputs: Sequence[Path], stage: str) -> list[Summary]:
    return [found for folder in outputs if (found := _summary(folder, stage))]


def _split(what: str) -> tuple[str, str]:
    stage, _, name = what.partition(": ")
    return stage, name


def _table(outputs: Sequence[Path], what: str) -> str:
    what, columns, only, *_ = (*(part.strip() for part in what.split("|")), "", "")
    stage, name = _split(what)
    tables = [found.tables[name] for found in _summaries(outputs, stage) if found.tables.get(name)]
    rows = rows_over_seeds(tables) if tables else []
    for condition in filter(None, only.split(", ")):
        key, _, values = condition.partition("=")
        rows = [row for row in rows if _plain(row.get(key)) in values.split("/")]
    shown = markdown(rows, [column.strip() for column in columns.split(",")] if columns else ())
    if not shown:
        return ""
    if len(tables) > 1:
        return f"{len(tables)} seeds, mean ± standard deviation over them:\n\n{shown}"
    return ("One seed, ± standard error:\n\n" if "±" in shown else "One seed:\n\n") + shown


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _curve(outputs: Sequence[Path], what: str, folder: Path) -> str:
    stage, name = _split(what)
    curves = [found.curves[name] for found in _summaries(outputs, stage) if name in found.curves]
    if not curves:
        return ""
    title = f"{name} (mean of {len(curves)} seeds)" if len(curves) > 1 else name
    return _chart(folder, f"{stage}-{name}", title, curves_over_seeds(curves))


def _chart(folder: Path, file: str, name: str, columns: Mapping[str, Sequence[float]]) -> str:
    path = folder / f"{_slug(file)}.svg"
    path.write_text(drawn_chart(name, columns) + "\n", "utf-8")
    return f"**{name}**\n\n![{name}]({path.name})"


def _picture(outputs: Path, what: str, folder: Path) -> str:
    """The picture whose file has this name, less its ending: a stage calls it by what it shows."""
    stage, name = _split(what)
    found = _summary(outputs, stage)
    for title, path in found.pictures.items() if found else ():
        if Path(path).stem == name:
            source = outputs / stage.replace("@", "/") / path
            copy = folder / f"{_slug(f'{stage}-{name}')}{source.suffix}"
            with Image.open(source) as shown:
                if shown.width > _WIDEST:
                    size = _WIDEST, round(shown.height * _WIDEST / shown.width)
                    shown.resize(size, Image.Resampling.LANCZOS).save(copy, optimize=True)
                else:
                    shutil.copyfile(source, copy)
            return f"{title}:\n\n![{title}]({copy.name})"
    return ""


def _losses(weights: Path, folder: Path) -> str:
    columns: dict[str, list[float]] = {}
    for name in _SMOOTHED:
        log = weights / name.lower() / LOG
        if log.is_file():
            lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
            columns[name] = [line["smoothed"] for line in lines]
    if not columns:
        return ""
    steps = min(len(values) for values in columns.values())
    shown = {name: values[:steps] for name, values in columns.items()}
    return _chart(folder, "losses", "training loss, smoothed", {"step": [float(n + 1) for n in range(steps)], **shown})


def _times(outputs: Path) -> list[dict[str, Any]]:
    """The newest run of each stage."""
    rows = [json.loads(path.read_bytes()) for path in (outputs / _RUNS).glob("*.json")]
    return sorted(rows, key=lambda row: row["started"])


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("evaluate@")).strip("-")
