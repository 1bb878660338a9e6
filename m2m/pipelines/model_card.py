"""The model card of a saved pipeline: a README.md that says what the folder holds and how to use it.

`save_pretrained` writes it, from the facts that a training sets; `export` completes that one for a release.

Belongs here: its facts, its text, reading the facts back, completing it. Not here: what a training knows of itself,
what manifests say of a release (`m2m.release_card`). Deterministic and without paths of this machine, as everything in
an output.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from m2m.config import is_hub_id
from m2m.licences import OTHER, in_a_card

CARD = "README.md"
_FACTS = "m2m"  # key of the facts in the card's header
_NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class CardFacts:
    """What a pipeline can't know of itself; unknown where None.

    Attributes:
        initialised_from: a hub id, or a model's name; no path.
        label: for example "tiny" or "real": what the weights can be expected to be good for.
        licence: the hub's name of it (`mit`, `openrail++`, ...), or `other:ITS NAME`; weights inherit that of what they
            started from.
        notes: more for readers, Markdown.
    """

    initialised_from: str | None = None
    label: str | None = None
    licence: str = OTHER
    notes: str | None = None


def write_card(pipeline: Any, folder: Path) -> None:
    """Write the card of a ManyToManyPipeline, with its `card` facts, into its folder."""
    from m2m.models.unet import VARIANTS  # brings torch, which reading and completing cards does without

    facts: CardFacts = pipeline.card
    unet = pipeline.unet
    kind, condition = VARIANTS[unet.variant], unet.config["condition"]
    source = facts.initialised_from
    header: dict[str, Any] = {
        **_licence_in_header(facts.licence),
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": ["many-to-many-image-generation", kind.lower(), *([condition] if condition else [])],
        "base_model": source.partition("@")[0] if source and is_hub_id(source) and " " not in source else None,
        _FACTS: _said(facts),
    }
    text = _TEXT.format(
        header=ModelCardData(**header).to_yaml(),
        kind=kind,
        label=f" ({facts.label})" if facts.label else "",
        reads=_READS[unet.variant],
        rows="\n".join(_row(name, value) for name, value in _table(pipeline, kind)),
        condition=_CONDITION.format(condition=condition) if condition else "",
        notes=f"\n{facts.notes}\n" if facts.notes else "",
        conditions=_CONDITION_LINES.format(numbers=unet.condition_embedder.numbers) if condition else "",
        given="\n    condition=condition,\n    target_condition=target_condition," if condition else "",
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def read_facts(folder: Path) -> CardFacts:
    """The facts of a saved pipeline's card; unknown ones where there is no card, or another's."""
    path = folder / CARD
    if not path.is_file():
        return CardFacts()
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict().get(_FACTS)
    except Exception:  # a card is for people: one that can't be parsed is no reason not to load the model
        return CardFacts()
    known = {field.name for field in fields(CardFacts)}
    return CardFacts(**{key: str(value) for key, value in (found or {}).items() if key in known})


def completed(folder: Path, name: str, licence: str, figures: Sequence[EvalResult], sections: Mapping[str, str]) -> str:
    """A saved pipeline's card as a release has it: with its licence and figures, and with more sections at its end.

    Args:
        name: of the model in the hub's list of figures.
        licence: as in `CardFacts`.
        sections: texts by their headings.
    """
    facts = read_facts(folder)
    card: Any = ModelCard.load(folder / CARD)
    licensed = replace(facts, licence=licence)
    for key, value in {"license_name": None, **_licence_in_header(licence), _FACTS: _said(licensed)}.items():
        card.data[key] = value
    if figures:
        card.data.model_name, card.data.eval_results = name, list(figures)
    card.text = card.text.replace(_row(*_licence_row(facts)), _row(*_licence_row(licensed)))
    return "\n".join([card.content.rstrip("\n"), *(f"\n## {head}\n\n{text}" for head, text in sections.items())]) + "\n"


def _said(facts: CardFacts) -> dict[str, str]:
    return {key: value for key, value in asdict(facts).items() if value is not None}


def _licence_in_header(licence: str) -> dict[str, str]:
    unnamed = {"license_name": "as-of-the-model-it-was-initialised-from"} if licence == OTHER else {}
    return in_a_card(licence) | unnamed


def _licence_row(facts: CardFacts) -> tuple[str, str]:
    own = facts.licence.removeprefix(f"{OTHER}:")
    return "licence", "that of the model it was initialised from" if own == OTHER else own


def _row(name: str, value: Any) -> str:
    return f"| {name} | {value} |"


def _table(pipeline: Any, kind: str) -> list[tuple[str, Any]]:
    unet, facts = pipeline.unet, pipeline.card
    rows: list[tuple[str, Any]] = [
        ("variant", f"{kind} (`{unet.variant}`)"),
        ("condition", unet.config["condition"] or "none"),
        ("initialised from", facts.initialised_from or _NOT_RECORDED),
        ("label", facts.label or _NOT_RECORDED),
        _licence_row(facts),
        ("parameters of the U-Net", f"{sum(parameter.numel() for parameter in unet.parameters()):,}"),
    ]
    if unet.origin is not None:
        origin = unet.origin
        counts = f"{len(origin.copied)} copied, {len(origin.new)} new, {len(origin.left_out)} of the source left out"
        rows.append(("its tensors when it was made", counts))
    window, sink = pipeline.config["context_window"], pipeline.config["context_sink"]
    rows.append(
        ("context window W", f"{window or 'no bound'}, the first {sink} always kept" if sink else window or "no bound")
    )
    if unet.variant == "self":
        fixed = unet.config["clean_timestep"]
        rows.append(("timestep of clean images", "the noisy images'" if fixed is None else fixed))
    return rows


_READS = {
    "self": "It reads the preceding images' own latents, through the same U-Net (M2M-Self, section 5.1).",
    "dino": "It reads DINOv2 features of the preceding images (M2M-DINO, section 5.2).",
}
_CONDITION = """
It is fine-tuned for a {condition} condition of every image (section 6.2): give one for each preceding image
and for each image to make.
"""
_CONDITION_LINES = """
condition = torch.zeros(1, 2, {numbers})  # of the preceding images
target_condition = torch.zeros(1, 3, {numbers})  # of the images to make
"""
_TEXT = """---
{header}
---

# {kind}{label}

Makes any number of images, one after another, from any number of preceding images: *Many-to-many Image Generation with
Auto-regressive Diffusion Models*. {reads}
{condition}{notes}
| | |
|---|---|
{rows}

## Use

```python
import torch
from PIL import Image
from m2m.pipelines.many_to_many import ManyToManyPipeline

pipeline = ManyToManyPipeline.from_pretrained("path/to/this/folder")
{conditions}made = pipeline(
    [Image.open("a.png"), Image.open("b.png")],
    num_images=3,
    num_inference_steps=50,
    guidance_scale=7.5,{given}
)
made.images[0][0].save("next.png")
```

or `python -m m2m generate path/to/this/folder a.png b.png --num-images 3 --out generated`.
"""
