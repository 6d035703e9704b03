"""Reliability against locality as inline SVG: each method a numbered point with a whisker for each interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from errata.report.tables import HEADINGS, PROTOCOLS, escape, methods

Row = Mapping[str, Any]
Scale = Callable[[float], float]

WIDTH, HEIGHT = 400, 340
LEFT, TOP, RIGHT, BOTTOM = 52, 14, 388, 290  # the plotting area
LOCALITY: Final = ("locality_agreement", "locality_correct")
COLOURS = 8  # --c0 … --c7 of the page's style


def scatter(rows: Sequence[Row], protocol: str) -> str:
    """The drawing and its legend for one protocol, or "" where no method has both metrics."""
    at = {(row["method"], row["metric"]): row for row in rows if row["protocol"] == protocol}
    for locality in LOCALITY:
        points = [(m, at[m, "reliability"], at[m, locality]) for m in methods(rows) if (m, "reliability") in at and (m, locality) in at]
        if points:
            return _drawing(points, locality, protocol)
    return ""


def _floor(values: Sequence[float]) -> float:
    """The axis' beginning: the tenth below the lowest value, so that points near 1 can be told apart."""
    return max(0.0, min(math.floor(10 * min(values) - 1e-9) / 10, 0.9))


def _ticks(start: float) -> list[float]:
    """Every tenth, or every twentieth on a short axis."""
    step = 0.05 if start >= 0.75 else 0.1 if start >= 0.4 else 0.2
    count = math.floor((1 - start) / step + 1e-6)
    return [1 - i * step for i in range(count, -1, -1)]


def _drawing(points: Sequence[tuple[str, Row, Row]], locality: str, protocol: str) -> str:
    x0 = _floor([float(across["low"]) for _, across, _ in points])
    y0 = _floor([float(up["low"]) for _, _, up in points])

    def x(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (value - x0) / (1 - x0)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - y0) / (1 - y0)

    parts = _axes(x0, y0, x, y, locality)
    for i, (_, across, up) in enumerate(points):
        colour = f"var(--c{i % COLOURS})"
        cx, cy = x(float(across["value"])), y(float(up["value"]))
        parts += [
            _line(x(float(across["low"])), cy, x(float(across["high"])), cy, f'stroke="{colour}" stroke-width="1.5"'),
            _line(cx, y(float(up["low"])), cx, y(float(up["high"])), f'stroke="{colour}" stroke-width="1.5"'),
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="8" fill="{colour}"/>',
            f'<text x="{cx:.1f}" y="{cy + 4:.1f}" text-anchor="middle" style="fill: var(--back); font-weight: 700">{i + 1}</text>',
        ]
    name = escape(PROTOCOLS.get(protocol, protocol).partition(":")[0])
    spoken = "; ".join(f"{escape(m)} {float(a['value']):.3f}, {float(b['value']):.3f}" for m, a, b in points)
    legend = "".join(f'<li><b style="color: var(--c{i % COLOURS})">{i + 1}</b> {escape(m)}</li>' for i, (m, _, _) in enumerate(points))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}, reliability and locality: {spoken}">{"".join(parts)}</svg>'
        f'<figcaption>{name}; the upper right corner is best<ol class="legend">{legend}</ol></figcaption>'
    )


def _axes(x0: float, y0: float, x: Scale, y: Scale, locality: str) -> list[str]:
    parts = []
    for tick in _ticks(x0):
        parts.append(_line(x(tick), TOP, x(tick), BOTTOM, 'class="gridline"'))
        parts.append(f'<text x="{x(tick):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{100 * tick:.0f}</text>')
    for tick in _ticks(y0):
        parts.append(_line(LEFT, y(tick), RIGHT, y(tick), 'class="gridline"'))
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:.0f}</text>')
    middle = (TOP + BOTTOM) / 2
    return [
        *parts,
        _line(LEFT, BOTTOM, RIGHT, BOTTOM, 'class="axis"'),
        _line(LEFT, TOP, LEFT, BOTTOM, 'class="axis"'),
        f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">reliability, %</text>',
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{HEADINGS[locality]}, %</text>',
    ]


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'
