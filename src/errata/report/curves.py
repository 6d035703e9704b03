"""Curves as image files: how an edit holds as more follow (`retention`), and what a setting does (`sweep`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.errors import InputError
from errata.report import figures
from errata.report.tables import HEADINGS, PROTOCOLS, methods, metrics, protocols

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

# Told apart by colour-blind readers, and by marker where printed grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
LABELS = {"likelihood": "share of probes, or difference of probability", "sampled": "bits (GE), cosine (RS)"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def _check(rows: Sequence[Row], needed: tuple[str, ...]) -> None:
    if not rows:
        raise InputError("there is no row to draw a curve of")
    for i, row in enumerate(rows):
        if missing := [key for key in needed if key not in row]:
            raise InputError(f"row {i} of the curve has no {missing[0]!r}; it needs {', '.join(needed)}")
        numbers = [key for key in needed if key in ("T", "x", "value", "low", "high")]
        if bad := [key for key in numbers if not isinstance(row[key], int | float) or not math.isfinite(row[key])]:
            raise InputError(f"row {i} of the curve: {bad[0]} must be a finite number, not {row[bad[0]]!r}")


def _lines(axes: Axes, rows: Sequence[Row], x: str) -> None:
    """One line per method (colour) and metric (marker), with whiskers from low to high."""
    names, columns = methods(rows), metrics(rows)
    for i, name in enumerate(names):
        for j, column in enumerate(columns):
            points = sorted((row for row in rows if row["method"] == name and row["metric"] == column), key=lambda row: float(row[x]))
            if not points:
                continue
            values = [float(p["value"]) for p in points]
            # A resampled interval can miss the mean by rounding; whiskers may not be negative.
            below = [max(0.0, v - float(p["low"])) for v, p in zip(values, points, strict=True)]
            above = [max(0.0, float(p["high"]) - v) for v, p in zip(values, points, strict=True)]
            axes.errorbar(
                [float(p[x]) for p in points],
                values,
                yerr=[below, above],
                label=_plain(f"{name}: {HEADINGS.get(column, column)}"),
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[j % len(MARKERS)],
                linestyle=("-", "--", "-.", ":")[j % 4],
                markersize=4,
                capsize=2,
                linewidth=1.2,
            )


def _plain(text: str) -> str:
    # Dollar signs would start a formula, and a leading underscore would hide the line from the legend.
    return text.replace("$", r"\$").lstrip("_ ")


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Of the upright axis: 0 to 1, and further where a difference of probabilities is below 0 or an entropy above 1."""
    return min([0.0, *(float(row["low"]) for row in rows)]) - 0.03, max([1.0, *(float(row["high"]) for row in rows)]) + 0.03


def _draw(rows: Sequence[Row], path: str | Path, x: str, label: str, log: bool) -> None:
    shown = protocols(rows)
    figure, panels = figures.figure(5.2 * len(shown), 4.0, len(shown))
    for axes, protocol in zip(panels, shown, strict=True):
        mine = [row for row in rows if row["protocol"] == protocol]
        _lines(axes, mine, x)
        if log:
            axes.set_xscale("log")
        ticks = sorted({float(row[x]) for row in mine})
        if len(ticks) <= 8:
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.minorticks_off()
        axes.set_xlabel(_plain(label))
        axes.set_ylabel(LABELS.get(protocol, "share of probes"))
        axes.set_ylim(*_limits(mine))
        figures.finish(axes, _plain(PROTOCOLS.get(protocol, protocol).partition(":")[0]))
    figures.save(figure, [path])


def retention(rows: Sequence[Row], path: str | Path) -> None:
    """Metrics after T edits, T on a logarithmic axis.

    A row holds method, metric, protocol, T ≥ 1, value, low, high.  One panel for each protocol.
    """
    _check(rows, ("method", "metric", "protocol", "T", "value", "low", "high"))
    if any(row["T"] < 1 for row in rows):
        raise InputError("T counts edits and must be at least 1")
    _draw(rows, path, "T", "edits applied (T)", log=True)


def sweep(rows: Sequence[Row], path: str | Path) -> None:
    """Metrics over the values ``x`` of one setting.

    A row holds method, metric, protocol, setting (its name, the same in all rows), x, value, low, high.  The axis is
    logarithmic where the values are positive and span more than a factor of 20.
    """
    _check(rows, ("method", "metric", "protocol", "setting", "x", "value", "low", "high"))
    settings = sorted({str(row["setting"]) for row in rows})
    if len(settings) > 1:
        raise InputError(f"a sweep shows one setting, not {', '.join(settings)}; draw one curve for each")
    least, most = min(row["x"] for row in rows), max(row["x"] for row in rows)
    _draw(rows, path, "x", settings[0], log=least > 0 and most / least > 20)
