"""What a released model's card says beyond the one that was saved with it: all of it is read from manifests.

Belongs here: data, settings, figures, where it comes from; the licence of what a model was made from. Not here: the
card itself (`m2m.pipelines.model_card`), the folder around it (`export`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult

from m2m import artifacts
from m2m.artifacts import read_summary
from m2m.config import Profile, resolve
from m2m.errors import ConfigError
from m2m.licences import known, of_hub_model, require_known
from m2m.pipelines.model_card import completed
from m2m.provenance import Made
from m2m.stages import STAGES


@dataclass(frozen=True)
class Measured:
    """What one evaluation found of a model."""

    stage: str
    description: str
    figures: Mapping[str, float | int]


def measured(made: Made, profile: Profile) -> list[Measured]:
    """The figures of the evaluations that read exactly this model."""
    assert made.manifest is not None
    found = []
    for stage in STAGES.values():
        names = [name for name, key in stage.inputs.items() if key == made.key]
        folder = stage.folder(profile)
        manifest = artifacts.read_manifest(folder)
        if stage.command != "evaluate" or not names or manifest is None:
            continue
        if manifest.inputs.get(names[0]) != made.manifest.digest:
            continue  # it looked at another model of this name
        others = [STAGES[key] for key in stage.inputs.values() if STAGES[key].group == "models" and key != made.key]
        figures = {
            name: value
            for name, value in read_summary(folder).figures.items()
            if isinstance(value, int | float) and not any(_of(name, other.variant) for other in others)
        }
        found.append(Measured(stage.key, stage.description, figures))
    return found


def licence_of(made: Made, profile: Profile, said: str | None) -> str:
    """The licence that a model may be given on: what was said, or the one of what it was made from.

    Raises:
        ConfigError: one that the hub has no name for was said; its sources have several, or one says none.
    """
    if said:
        return require_known(said)
    found: dict[str, str] = {}
    for node in made.each():
        if node.key == made.key or STAGES[node.key].group == "models":
            for source in node.sources:
                found[source.path or source.setting] = _licence(source.path, profile.root)
    unknown = [path for path, licence in found.items() if not licence]
    if unknown:
        raise ConfigError(f"{unknown[0]} says no licence; say the model's with --licence, for example --licence mit")
    if len(set(found.values())) > 1:
        told = ", ".join(f"{path} {licence}" for path, licence in found.items())
        raise ConfigError(f"the model was made from things of several licences ({told}); say its own with --licence")
    path, licence = next(iter(found.items()), ("", "mit"))
    if not known(licence):
        raise ConfigError(f"{path} is under {licence!r}, for which the hub has no name; say it with --licence")
    return licence


def release_card(made: Made, profile: Profile, licence: str, results: Sequence[Measured]) -> str:
    """README.md of the exported folder: the model's own card with its licence, its figures and what is behind it."""
    assert made.manifest is not None
    stage, nodes = STAGES[made.key], list(made.each())
    settings = json.dumps(made.manifest.config, indent=1, sort_keys=True)
    sections = {
        "Data": "\n".join(_data_lines(nodes)),
        "Settings": f"{stage.description}\n\n```json\n{settings}\n```",
        "Measured": "\n\n".join(map(_result_text, results)) or "No evaluation of this very model is there.",
        "Where it comes from": f"Fingerprint `{made.manifest.fingerprint}`, manifest `{made.manifest.digest}`. "
        "`provenance.json` has the manifests and runs of everything behind it; `sha256sum -c SHA256SUMS` checks every "
        "file here.\n\n" + "\n".join(_code_lines(nodes)),
    }
    figures = [figure for result in results for figure in _for_the_hub(result)]
    return completed(made.folder, f"{stage.asset.replace('_', '-')}-{profile.name}", licence, figures, sections)


def _of(figure: str, variant: str | None) -> bool:
    """Whether a figure is one of the other model: `fid_dino`, `M2M-DINO: agreement after 4`."""
    return variant is not None and bool(re.search(rf"(_{variant}$|^M2M-{variant}:)", figure, re.IGNORECASE))


def _licence(path: str | None, root: Path) -> str:
    """What a source says of its licence: the hub's models by id, folders by the card in or above them."""
    if path is None:
        return ""
    if of_the_hub := of_hub_model(path):
        return of_the_hub
    place = resolve(path, root)
    for folder in (place, *place.parents):
        for card_file in ("README.md", "LICENSE"):
            licence = _licence_in(folder / card_file)
            if licence:
                return licence
        if folder == root:
            break
    return ""


def _licence_in(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    if path.name == "LICENSE":
        return "mit" if text.startswith("MIT License") else ""
    parts = text.split("---\n", 2)
    try:
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except yaml.YAMLError:
        return ""
    return str(head.get("license", "")) if isinstance(head, dict) else ""


def _data_lines(nodes: Sequence[Made]) -> list[str]:
    lines = []
    for node in nodes:
        assert node.manifest is not None
        counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in node.manifest.counts.items())
        lines.append(f"- `{node.key}`: {counts or 'nothing counted'} (manifest `{node.manifest.digest[:12]}`)")
        lines += [f"  - {source.setting}: `{source.path or source.digest[:12]}`" for source in node.sources]
    return lines


def _code_lines(nodes: Sequence[Made]) -> list[str]:
    lines = []
    for node in nodes:
        git = node.run.get("git", {})
        dirty = ", with changes that were not committed" if git.get("dirty") else ""
        lines.append(f"- `{node.key}`: code `{git.get('revision') or 'not recorded'}`{dirty}")
    return lines


def _result_text(result: Measured) -> str:
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in result.figures.items())
    return f"{result.description} (`{result.stage}`)\n\n| | |\n| --- | --- |\n{rows}"


def _for_the_hub(result: Measured) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-to-image",
            dataset_type=result.stage.partition("@")[2],
            dataset_name=result.stage,
            metric_type=name,
            metric_value=value,
        )
        for name, value in result.figures.items()
    ]
