"""How metrics hold as edits follow, as inline SVG: a panel a metric, T on a logarithmic axis, a numbered line a method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from errata.report import svg
from errata.report.tables import escape, main, merged, methods, title

Row = Mapping[str, Any]
AREA: Final = svg.Axes(400, 260, right=28)
_DASHES: Final = ("", "6 3", "2 3", "8 3 2 3")  # lines that lie on each other stay two


def panels(rows: Sequence[Row], protocol: str) -> list[str]:
    """A drawing with caption for each metric that was scored at two T at least."""
    mine = [row for row in main(rows) if row["protocol"] == protocol]
    names, out = methods(rows), []
    for metric, heading in merged(mine).items():
        here = [row for row in mine if row["metric"] == metric]
        if len({row["T"] for row in here}) > 1:
            out.append(_panel(here, heading, protocol, names))
    return out


def _ends(rows: Sequence[Row]) -> tuple[float, float]:
    """Of the upright axis: 0 to 1, and further where a difference of probabilities is below 0 or an entropy above 1."""
    low, high = min(float(row["low"]) for row in rows), max(float(row["high"]) for row in rows)
    return min(0.0, math.floor(10 * low) / 10), max(1.0, math.ceil(10 * high) / 10)


def _panel(rows: Sequence[Row], heading: str, protocol: str, names: Sequence[str]) -> str:
    at = sorted({int(row["T"]) for row in rows})
    (start, end), (low, high) = _ends(rows), (math.log(at[0]), math.log(at[-1]))
    log, y = AREA.across(low, high), AREA.up(start, end)

    def x(t: float) -> float:
        return log(math.log(t))

    step = (end - start) / 5
    parts = [*AREA.x_ticks(_thinned(at), x, lambda t: f"{t:g}"), *AREA.y_ticks([start + i * step for i in range(6)], y, svg.percent)]
    parts += AREA.frame("edits made (T)", f"{heading}, %")
    ends, marks, spoken = [], [], []
    for i, name in enumerate(names):
        if line := sorted((row for row in rows if row["method"] == name), key=lambda row: int(row["T"])):
            parts += _line(line, i, x, y)
            ends.append(y(float(line[-1]["value"])))
            marks.append(i)
            spoken.append(f"{name} " + ", ".join(f"T {row['T']} {float(row['value']):.3f}" for row in line))
    parts += svg.stacked(ends, marks, AREA)
    what = f"{heading}, {title(protocol).partition(':')[0]}"
    return f"{svg.drawing(AREA, parts, f'{what}: ' + '; '.join(spoken))}<figcaption>{escape(what)}</figcaption>"


def _thinned(at: Sequence[int]) -> list[int]:
    """Ticks that do not run into each other: the last, and those an eighth of the axis apart."""
    out = [at[-1]]
    for t in reversed(at[:-1]):
        if math.log(out[-1] / t) >= 0.12 * math.log(at[-1] / at[0]):
            out.append(t)
    return out


def _line(rows: Sequence[Row], i: int, x: svg.Scale, y: svg.Scale) -> list[str]:
    stroke = f'stroke="{svg.colour(i)}"'
    dash = f' stroke-dasharray="{_DASHES[i % 4]}"' if _DASHES[i % 4] else ""
    out = [svg.path([(x(row["T"]), y(float(row["value"]))) for row in rows], f'{stroke} stroke-width="1.75"{dash}')]
    for row in rows:
        out.append(svg.line(x(row["T"]), y(float(row["low"])), x(row["T"]), y(float(row["high"])), f'{stroke} stroke-width="1"'))
        out.append(svg.dot(x(row["T"]), y(float(row["value"])), 3, svg.colour(i)))
    return out
