"""How the report's page is made of what it shows: its template, cells of tables, pictures within it, completeness.

Belongs here: all that turns values into HTML. Not here: which values (`m2m.evaluation.report`), curves
(`m2m.evaluation.charts`), the look (`report.html.j2`).
"""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, UnidentifiedImageError

from m2m.errors import ArtifactError
from m2m.evaluation.charts import chart

_WITH_ERROR = re.compile(r"(-?[\d.]+(?:e[-+]\d+)?) ± ([\d.]+(?:e[-+]\d+)?)")
_NOTHING = 1e-12
_MODELS = {"self": "M2M-Self", "dino": "M2M-DINO"}
_SHORT = {"fid": "FID", "is": "IS", "clip": "CLIP", "dino": "DINO", "rmse": "RMSE", "text": "Text-Image CLIP"}
_SHORT |= {"image": "Image-Image CLIP", "lpips": "LPIPS"}
_TEMPLATE = Path(__file__).with_name("report.html.j2")


def render(picture_width: int, **shown: Any) -> str:
    """The page.

    Args:
        picture_width: pixels; wider pictures are made smaller.
        shown: the template's values.

    Raises:
        ArtifactError: one of the pictures can't be read.
    """
    return _environment(picture_width).get_template(_TEMPLATE.name).render(**shown)


def missing_from(html: str, sections: list[str]) -> list[str]:
    """What keeps a page from being complete and self-contained, in words: nothing if it is."""
    seen = _Page()
    seen.feed(html)
    missing = [f"no section {name}" for name in sections if name not in seen.sections]
    return missing + [f"reads {link} from outside" for link in seen.outside]


def data_uri(path: Path, width: int) -> str:
    """A picture file as a data URI; pictures wider than `width` are made smaller and become JPEG.

    Raises:
        ArtifactError: it can't be read as a picture.
    """
    try:
        with Image.open(path) as image:
            image.load()
            kind = (image.format or "PNG").lower()
            content = path.read_bytes()
            if image.width > width or kind not in ("png", "jpeg", "webp"):
                image.thumbnail((width, image.height), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "JPEG", quality=88)
                kind, content = "jpeg", buffer.getvalue()
    except (OSError, UnidentifiedImageError) as error:
        raise ArtifactError(f"{path}: not a picture: {error}") from None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def inside(folder: Path, path: str) -> Path:
    """A path of a summary within its folder.

    Raises:
        ArtifactError: it leads out of the folder.
    """
    found = (folder / path).resolve()
    if not found.is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder}: its summary names a picture outside of it: {path}")
    return found


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sections: set[str] = set()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        if tag == "section" and said.get("id"):
            self.sections.add(str(said["id"]))
        link = said.get("src") or (said.get("href") if tag == "link" else None)
        if link and not link.startswith("data:"):
            self.outside.append(link)


def _environment(width: int) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cell": cell,
        "duration": _duration,
        "bytes": _bytes,
        "words": lambda name: str(name).replace("_", " "),
        "figure_name": figure_name,
        "chart": lambda columns, name: chart(name, columns),
    }
    environment.globals["picture"] = lambda section, path: data_uri(inside(section.folder, path), width)
    environment.globals |= {"numeric_columns": _numeric_columns, "decimals": _decimals}
    return environment


def _numeric_columns(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Columns that hold numbers alone, or numbers written out such as "9.56 ± 1.21" or "-3e-17"."""
    return {
        column
        for column in rows[0]
        if all(re.fullmatch(r"[-–+]?[-+\d., ±%e<]*", cell(row.get(column))) for row in rows)
    }


def _decimals(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many decimals show a column's numbers to about four digits, and no more than they have."""
    found = {}
    for column in rows[0]:
        values = [row[column] for row in rows if isinstance(row.get(column), float) and math.isfinite(row[column])]
        if values:
            largest = max(abs(value) for value in values)
            most = 4 if largest < 0.1 else 3 if largest < 10 else 2 if largest < 100 else 1
            found[column] = next((n for n in range(most) if all(v == round(v, n) for v in values)), most)
    return found


def cell(value: Any, decimals: int | None = None) -> str:
    """A value as a table shows it: never a number that is none, unmarked."""
    if isinstance(value, float) and not math.isfinite(value):
        return "⚠ not a finite number"
    if isinstance(value, float) and decimals is not None:
        return f"{value:,.{decimals}f}"
    if value is None:
        return "–"
    if isinstance(value, str) and (said := _WITH_ERROR.fullmatch(value)):
        return _with_error(*said.groups())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}"
    return str(value)


def figure_name(name: str) -> str:
    """A figure's name in words: `fid_self` is "FID, M2M-Self"."""
    *words, last = str(name).split("_")
    model = _MODELS.get(last) if words else None
    said = " ".join(_SHORT.get(word, word) for word in (words if model else [*words, last]))
    return f"{said}, {model}" if model else said


def _with_error(mean: str, error: str) -> str:
    """A mean with no more decimals than its error has, and no powers of ten for what is next to nothing."""
    value, spread = float(mean), float(error)
    if spread < _NOTHING:
        return f"{'0' if abs(value) < _NOTHING else mean} ± 0"
    said = "<0.0001" if spread < 1e-4 else f"{spread:,.0f}" if "e" in error else error
    places = len(said.partition(".")[2])
    if "e" in mean or len(mean.partition(".")[2]) > places:
        mean = f"{round(value, places) + 0.0:,.{places}f}"
    return f"{mean} ± {said}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 60 else f"{hours:.1f} h"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
