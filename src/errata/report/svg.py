"""Pieces of inline SVG that drawings of the page share: a plotting area, its axes, and numbers beside points.

Colours are the page's (`--c0` …), so that a drawing follows its light or dark style.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from errata.report.tables import escape

Scale = Callable[[float], float]
COLOURS: Final = 10  # --c0 … --c9 of the page's style
STEP: Final = 12.0
NEAR: Final = 13.0  # two labels nearer than this would be read as one
_AROUND: Final = [(r * math.cos(a), r * math.sin(a)) for r in (13, 22, 31, 40) for a in (k * math.pi / 4 - math.pi / 2 for k in range(8))]


def colour(i: int) -> str:
    """Of method i, in every drawing."""
    return f"var(--c{i % COLOURS})"


@dataclass(frozen=True)
class Axes:
    """The plotting area inside a drawing of ``width`` × ``height``."""

    width: int
    height: int
    left: int = 52
    top: int = 14
    right: int = 12
    bottom: int = 50

    @property
    def box(self) -> tuple[float, float, float, float]:
        """left, top, right, bottom edges."""
        return self.left, self.top, self.width - self.right, self.height - self.bottom

    def across(self, start: float, end: float) -> Scale:
        left, _, right, _ = self.box
        return lambda v: left + (right - left) * (v - start) / (end - start)

    def up(self, start: float, end: float) -> Scale:
        _, top, _, bottom = self.box
        return lambda v: bottom - (bottom - top) * (v - start) / (end - start)

    def frame(self, across: str, up: str) -> list[str]:
        """The two axes and what they say."""
        left, top, right, bottom = self.box
        middle = (top + bottom) / 2
        return [
            line(left, bottom, right, bottom, 'class="axis"'),
            line(left, top, left, bottom, 'class="axis"'),
            words((left + right) / 2, self.height - 10, across, "middle"),
            f'<text x="14" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 14 {middle:.1f})">{escape(up)}</text>',
        ]

    def x_ticks(self, at: Iterable[float], x: Scale, said: Callable[[float], str]) -> list[str]:
        """Grid lines and ticks of the axis at the bottom."""
        _, top, _, bottom = self.box
        return [
            part for v in at for part in (line(x(v), top, x(v), bottom, 'class="gridline"'), words(x(v), bottom + 16, said(v), "middle"))
        ]

    def y_ticks(self, at: Iterable[float], y: Scale, said: Callable[[float], str]) -> list[str]:
        """Grid lines and ticks of the axis at the left."""
        left, _, right, _ = self.box
        return [part for v in at for part in (line(left, y(v), right, y(v), 'class="gridline"'), words(left - 6, y(v) + 4, said(v), "end"))]


def percent(value: float) -> str:
    """A share as an axis says it."""
    return f"{100 * value:.0f}"


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def dot(x: float, y: float, radius: float, fill: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}"/>'


def words(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def path(points: Sequence[tuple[float, float]], style: str) -> str:
    return f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in points)}" fill="none" {style}/>'


def drawing(area: Axes, parts: Iterable[str], spoken: str) -> str:
    """The whole; ``spoken``: its numbers in words, for those who do not see it."""
    return f'<svg viewBox="0 0 {area.width} {area.height}" role="img" aria-label="{escape(spoken)}">{"".join(parts)}</svg>'


def legend(names: Sequence[str]) -> str:
    """Numbers and colours of the methods."""
    items = (f'<li><b style="color: {colour(i)}">{i + 1}</b> {escape(name)}</li>' for i, name in enumerate(names))
    return f'<ol class="legend">{"".join(items)}</ol>'


def numbered(points: Sequence[tuple[float, float]], marks: Sequence[int], area: Axes) -> list[str]:
    """Number and colour of the method ``marks[i]`` beside point i, at the first free place around it, with a line where that is far."""
    left, top, right, bottom = area.box
    placed: list[tuple[float, float]] = []
    out = []
    for (x, y), mark in zip(points, marks, strict=True):
        others = [p for p in points if p != (x, y)]

        def crowded(dx: float, dy: float) -> float:
            at = (x + dx, y + dy)  # noqa: B023
            outside = not (left + 5 <= at[0] <= right - 2 and top - 8 <= at[1] <= bottom - 6)
            return 100.0 * outside + sum(max(0.0, NEAR - math.dist(at, p)) for p in (*placed, *others))  # noqa: B023

        dx, dy = min(_AROUND, key=lambda d: (crowded(*d), math.hypot(*d)))
        placed.append((x + dx, y + dy))
        if math.hypot(dx, dy) > 15:
            out.append(line(x, y, x + 0.75 * dx, y + 0.75 * dy, f'stroke="{colour(mark)}" stroke-width="0.75"'))
        bold = f'text-anchor="middle" style="fill: {colour(mark)}; font-weight: 700"'
        out.append(f'<text x="{x + dx:.1f}" y="{y + dy + 4:.1f}" {bold}>{mark + 1}</text>')
    return out


def stacked(heights: Sequence[float], marks: Sequence[int], area: Axes) -> list[str]:
    """Numbers of lines that end at the right edge, beside it: one above the other, `STEP` apart at least, a thin line to each end."""
    _, top, right, bottom = area.box
    order = sorted(range(len(marks)), key=lambda i: heights[i])
    places: list[float] = []
    for i in order:  # down from the top, each below the one before
        places.append(max(heights[i], places[-1] + STEP) if places else max(heights[i], top))
    limit = bottom
    for i in reversed(range(len(places))):  # and up again where that ran over the edge
        places[i] = min(places[i], limit)
        limit = places[i] - STEP
    out = []
    for i, place in zip(order, places, strict=True):
        ink = colour(marks[i])
        out.append(line(right, heights[i], right + 8, place, f'stroke="{ink}" stroke-width="0.75"'))
        out.append(f'<text x="{right + 10:.1f}" y="{place + 4:.1f}" style="fill: {ink}; font-weight: 700">{marks[i] + 1}</text>')
    return out
