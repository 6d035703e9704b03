"""Reliability against locality as inline SVG: each method a numbered point with a whisker for each interval, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from errata.report import svg
from errata.report.tables import HEADINGS, escape, methods, title

Row = Mapping[str, Any]
Point = tuple[str, Row, Row]  # a method, its reliability, its locality

AREA: Final = svg.Axes(400, 340)
LOCALITY: Final = ("locality_agreement", "locality_correct")


def scatter(rows: Sequence[Row], protocol: str) -> str:
    """The drawing and its legend for one protocol, or "" where no method has both metrics."""
    at = {(row["method"], row["metric"]): row for row in rows if row["protocol"] == protocol}
    names = methods(rows)
    for locality in LOCALITY:
        points = [(m, at[m, "reliability"], at[m, locality]) for m in names if (m, "reliability") in at and (m, locality) in at]
        if points:
            return _drawing(points, locality, protocol, names)
    return ""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other is as good as in both and better in one, by rising first number."""

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in points)

    return sorted((i for i, p in enumerate(points) if not beaten(p)), key=lambda i: points[i])


def _floor(values: Sequence[float]) -> float:
    """The axis' beginning: the tenth below the lowest value, so that points near 1 can be told apart."""
    return max(0.0, min(math.floor(10 * min(values) - 1e-9) / 10, 0.9))


def _ticks(start: float) -> list[float]:
    """Every tenth, or every twentieth on a short axis."""
    step = 0.05 if start >= 0.75 else 0.1 if start >= 0.4 else 0.2
    count = math.floor((1 - start) / step + 1e-6)
    return [1 - i * step for i in range(count, -1, -1)]


def _drawing(points: Sequence[Point], locality: str, protocol: str, names: Sequence[str]) -> str:
    x0 = _floor([float(across["low"]) for _, across, _ in points])
    y0 = _floor([float(up["low"]) for _, _, up in points])
    x, y = AREA.across(x0, 1), AREA.up(y0, 1)
    values = [(float(across["value"]), float(up["value"])) for _, across, up in points]
    best = pareto_front(values)
    parts = [*AREA.x_ticks(_ticks(x0), x, svg.percent), *AREA.y_ticks(_ticks(y0), y, svg.percent)]
    parts += [*AREA.frame("reliability, %", f"{HEADINGS[locality]}, %"), _staircase([values[i] for i in best], x, y, x0, y0)]
    marks = [names.index(name) for name, _, _ in points]
    for mark, (_, across, up), (vx, vy) in zip(marks, points, values, strict=True):
        stroke = f'stroke="{svg.colour(mark)}" stroke-width="1.5"'
        parts += [
            svg.line(x(float(across["low"])), y(vy), x(float(across["high"])), y(vy), stroke),
            svg.line(x(vx), y(float(up["low"])), x(vx), y(float(up["high"])), stroke),
            svg.dot(x(vx), y(vy), 5, svg.colour(mark)),
        ]
    parts += svg.numbered([(x(vx), y(vy)) for vx, vy in values], marks, AREA)
    name = title(protocol).partition(":")[0]
    spoken = "; ".join(f"{m} {vx:.3f}, {vy:.3f}" for (m, _, _), (vx, vy) in zip(points, values, strict=True))
    on = ", ".join(points[i][0] for i in best)
    caption = f"{name}; the upper right corner is best; dashed: the Pareto front ({on})"
    return f"{svg.drawing(AREA, parts, f'{name}, reliability and locality: {spoken}')}<figcaption>{escape(caption)}</figcaption>"


def _staircase(points: Sequence[tuple[float, float]], x: svg.Scale, y: svg.Scale, x0: float, y0: float) -> str:
    """What the front reaches: to the left of a point and below it."""
    steps, left = [], x0
    for vx, vy in points:
        steps += [(x(left), y(vy)), (x(vx), y(vy))]
        left = vx
    return svg.path([*steps, (x(left), y(y0))], 'class="front"')
