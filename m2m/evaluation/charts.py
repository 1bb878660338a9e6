"""Curves as inline SVG: readable on a phone, in light and dark, without a script or an outside file.

Belongs here: scales, ticks, lines, legends. Not here: which curves there are.
"""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 44
_MOST_POINTS, _MOST_BARS = 300, 64
ERROR = " ±"
_KNOWN = {"M2M-Self": "var(--self)", "M2M-DINO": "var(--dino)"}
_OTHERS = ("var(--third)", "var(--fourth)", "var(--fifth)", "var(--sixth)", "var(--seventh)", "var(--eighth)")
_ALONE = (
    "svg{background:#fff;font-family:sans-serif;--self:#3a6fd8;--dino:#e0682f;--third:#7b8291;--fourth:#2f9e8f;"
    "--fifth:#a95ac7;--sixth:#b78a1e;--seventh:#d1548c;--eighth:#6f9a2a}.grid{stroke:#dde}.tick,.axis{fill:#667;font-size:12px}"
    ".line{fill:none;stroke-width:2}.error{stroke-width:1.2;opacity:.7}"
)
_LETTER, _ROW = 6.4, 16  # of a legend at 12 px: an average width, rather too wide, and the height
_REFERENCES = ("ideal", "oracle", "own images", "autoencoder", "text-to-image", "copied")


def chart(name: str, columns: Mapping[str, Sequence[float]]) -> str:
    """One chart as an `<svg>` element with a legend below it.

    Args:
        columns: the first is the x axis; the y axis is logarithmic where positive values span a factor over 30. A
            column "name ±" holds the errors of column "name", drawn as bars. Where all columns read "model: what", a
            model's lines have one colour, those after its first hollow points.
    """
    x_name, *named = columns
    series = [key for key in named if not key.endswith(ERROR)]
    x = [float(value) for value in columns[x_name]]
    lines = {key: _thinned(x, [float(value) for value in columns[key]]) for key in series}
    values = [y for points in lines.values() for _, y in points]
    bars = {key: _bars(x, columns[key], columns[key + ERROR]) for key in series if key + ERROR in columns}
    values += [y for of in bars.values() for _, *ends in of for y in ends]
    if not values:
        return ""
    pairs = all(": " in key for key in series)
    logarithmic = min(values) > 0 and max(values) / min(values) > 30
    scale = math.log10 if logarithmic else float
    ticks = _log_ticks(min(values), max(values)) if logarithmic else _ticks(min(values), max(values))
    low, high = scale(min(ticks[0], min(values))), scale(max(ticks[-1], max(values)))
    x_ticks = _x_ticks(x)
    first, last = min(x), max(x)

    def across(value: float) -> float:
        share = 0.5 if last == first else (value - first) / (last - first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def down(value: float) -> float:
        share = 0.5 if high == low else (scale(value) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name, quote=True)}">']
    for tick in ticks:
        y = down(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{_said(tick)}</text>')
    for tick in x_ticks:
        text = f'x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 18}"'
        parts.append(f'<text class="tick" text-anchor="middle" {text}>{_said(tick)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" text-anchor="middle" x="{middle}" y="{_HEIGHT - 6}">{escape(x_name)}</text>')
    legend = []
    others = iter(_OTHERS * (1 + len(series) // len(_OTHERS)))
    colours: dict[str, str] = {}
    for key, points in lines.items():
        whose = key.partition(": ")[0] if pairs else key
        hollow = whose in colours  # the second line of the same model
        colour = colours[whose] = colours.get(whose) or _KNOWN.get(whose) or next(others)
        dashed = ' stroke-dasharray="6 5"' if any(word in key for word in _REFERENCES) else ""
        path = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in points)
        parts.append(f'<polyline class="line" points="{path}" style="stroke:{colour}"{dashed}/>')
        for a, lower, upper in bars.get(key, ()):
            ends = f'x1="{across(a):.1f}" x2="{across(a):.1f}" y1="{down(lower):.1f}" y2="{down(upper):.1f}"'
            parts.append(f'<line class="error" {ends} style="stroke:{colour}"/>')
        if len(points) <= 24:
            parts += [
                f'<circle cx="{across(a):.1f}" cy="{down(b):.1f}" r="3.4" style="{_dot(colour, hollow)}">'
                f"<title>{escape(key)}: {_said(b, 4)} at {_said(a)}</title></circle>"
                for a, b in points
            ]
        kind = ' class="hollow"' if hollow else ""
        legend.append(f'<span><i{kind} style="background:{colour}"></i>{escape(key)}</span>')
    return "".join(parts) + "</svg>" + f'<div class="legend">{"".join(legend)}</div>'


def _dot(colour: str, hollow: bool) -> str:
    return f"fill:var(--card,#fff);stroke:{colour};stroke-width:1.8" if hollow else f"fill:{colour}"


def picture(name: str, columns: Mapping[str, Sequence[float]]) -> str:
    """The same chart as an SVG document of its own, its legend on top: for where no page gives the colours."""
    drawn = chart(name, columns)
    if not drawn:
        return ""
    start, body = drawn[: drawn.index("</svg>")].split(">", 1)
    colours = re.findall(r'<i(?: class="hollow")? style="background:([^"]+)"></i>([^<]*)', drawn)
    rows = _rows(colours)
    more = _ROW * (len(rows) - 1)
    size = f'width="{_WIDTH}" height="{_HEIGHT + more}" viewBox="0 {-more} {_WIDTH} {_HEIGHT + more}"'
    start = start.replace(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}"', f'<svg xmlns="http://www.w3.org/2000/svg" {size}')
    legend = ""
    for place, row in enumerate(rows):
        entries = "".join(f'<tspan dx="12" style="fill:{colour}">{text}</tspan>' for colour, text in row)
        legend += f'<text x="{_LEFT}" y="{_TOP - 2 - more + _ROW * place}" font-size="12">{entries}</text>'
    return f"{start}><style>{_ALONE}</style>{body}{legend}</svg>"


def _rows(entries: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """A legend's entries (colour, text), in as many rows as they need beside each other."""
    rows: list[list[tuple[str, str]]] = [[]]
    left = space = _WIDTH - _LEFT
    for colour, text in entries:
        wide = 12 + _LETTER * len(text)
        if rows[-1] and wide > left:
            rows.append([])
            left = space
        rows[-1].append((colour, text))
        left -= wide
    return rows


def _bars(x: Sequence[float], y: Sequence[float], errors: Sequence[float]) -> list[tuple[float, float, float]]:
    """(x, lower, upper) of the points that have an error; more than can be seen apart are left out."""
    found = [
        (a, float(b) - float(e), float(b) + float(e))
        for a, b, e in zip(x, y, errors)
        if math.isfinite(a) and math.isfinite(b) and math.isfinite(e)
    ]
    return found if len(found) <= _MOST_BARS else []


def _thinned(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Points of one line; many of them become the means of equal stretches. What is not finite is left out."""
    points = [(a, b) for a, b in zip(x, y) if math.isfinite(a) and math.isfinite(b)]
    if len(points) <= _MOST_POINTS:
        return points
    step = -(-len(points) // _MOST_POINTS)
    parts = [points[i : i + step] for i in range(0, len(points), step)]
    return [(sum(a for a, _ in part) / len(part), sum(b for _, b in part) / len(part)) for part in parts]


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    if low == high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    rough = (high - low) / wanted
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    return [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _x_ticks(x: Sequence[float]) -> list[float]:
    distinct = sorted(set(x))
    if len(distinct) <= 8:
        return distinct
    return [tick for tick in _ticks(distinct[0], distinct[-1]) if distinct[0] <= tick <= distinct[-1]]


def _said(value: float, digits: int = 3) -> str:
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"
