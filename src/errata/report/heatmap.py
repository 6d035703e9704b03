"""Causal traces as heat maps, from the plain numbers that ``trace.json`` holds (`errata trace`)."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.errors import InputError
from errata.report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"hidden": "Purples", "mlp": "Greens", "attn": "Reds"}
WORDS = {"hidden": "hidden state", "mlp": "MLP", "attn": "attention"}
ROLES = {
    "subject_first": "first subject token*",
    "subject_middle": "middle subject tokens*",
    "subject_last": "last subject token*",
    "next": "first token after",
    "further": "further tokens",
    "last": "last token",
}
_SHADES = 64
_TICK = 5  # blocks from one labelled tick to the next, on a model of more than 12


@dataclass(frozen=True)
class Panel:
    """``values`` [labels, blocks]; ``vmin`` is where the colours begin."""

    kind: str
    title: str
    xlabel: str
    colorbar_label: str
    values: Sequence[Sequence[float]]
    vmin: float


def fact(record: Mapping[str, Any], window: int, paths: Sequence[str | Path]) -> None:
    """One traced fact: p(answer) with one state restored, for each token (* subject) and block.

    record: prompt, answer, tokens, span, low, scores {kind: [tokens][blocks]}.
    """
    start, end = record["span"]
    labels = [_plain(t) + ("*" if start <= i < end else "") for i, t in enumerate(record["tokens"])]
    panels = [
        Panel(kind, f"impact of restoring {WORDS[kind]}", _across(kind, window), f"p({_plain(record['answer'])})", rows, record["low"])
        for kind, rows in record["scores"].items()
    ]
    _draw(panels, labels, paths)


def average(record: Mapping[str, Any], window: int, paths: Sequence[str | Path]) -> None:
    """Average indirect effects by token role and block.  record: facts, roles {role: {n, mean: {kind: [blocks]}}}."""
    found = {role: row for role, row in record["roles"].items() if row["n"]}
    if not found:
        raise InputError("there is no averaged role to draw")
    labels = [f"{ROLES[role]} ({row['n']})" for role, row in found.items()]
    panels = [
        Panel(kind, f"{WORDS[kind]}, {record['facts']} facts", _across(kind, window), "average indirect effect",
              [row["mean"][kind] for row in found.values()], 0.0)
        for kind in next(iter(found.values()))["mean"]
    ]  # fmt: skip
    _draw(panels, labels, paths)


def _across(kind: str, window: int) -> str:
    if kind == "hidden":
        return "single restored block"
    name = "MLP" if kind == "mlp" else "attention"
    return f"single restored {name}" if window == 1 else f"centre of {window} restored {name} blocks"


def _plain(text: str) -> str:
    """A token as a label: dollar signs would start a formula; what cannot be seen is shown."""
    text = text.strip(" ") or "␣"
    text = "".join("⏎" if c == "\n" else "�" if unicodedata.category(c) in ("Cc", "Cs", "Cn", "Co") else c for c in text)
    return text.replace("$", r"\$")


def _draw(panels: Sequence[Panel], labels: Sequence[str], paths: Sequence[str | Path]) -> None:
    for panel in panels:
        if len(panel.values) != len(labels) or not all(math.isfinite(v) for row in panel.values for v in row):
            raise InputError(f"the {panel.kind} panel must hold a row of finite numbers for each of {len(labels)} labels")
    wide = 0.055 * max(map(len, labels))
    figure, every = figures.figure((2.9 + wide) * len(panels), max(2.0, 0.75 + 0.145 * len(labels)), len(panels))
    for axes, panel in zip(every, panels, strict=True):
        _panel(figure, axes, panel, labels)
    figures.save(figure, paths)


def _panel(figure: Figure, axes: Axes, panel: Panel, labels: Sequence[str]) -> None:
    from matplotlib import colormaps

    blocks = len(panel.values[0])
    most = max(max(map(max, panel.values)), panel.vmin + 1e-3)  # a flat map is drawn in the lightest colour
    mesh = axes.pcolormesh(panel.values, cmap=colormaps[COLOURS[panel.kind]].resampled(_SHADES), vmin=panel.vmin, vmax=most)
    axes.invert_yaxis()
    axes.set_yticks([i + 0.5 for i in range(len(labels))], list(labels), fontsize=7)
    step = _TICK if blocks > 12 else 1
    ticks = range(0, blocks, step)
    axes.set_xticks([i + 0.5 for i in ticks], [str(i) for i in ticks], fontsize=7)
    axes.set_title(panel.title, fontsize=8)
    axes.set_xlabel(panel.xlabel, fontsize=7)
    bar = figure.colorbar(mesh, ax=axes)
    if bar.solids is not None:  # no bitmap inside an SVG, and no hairlines between shades
        bar.solids.set(rasterized=False, edgecolor="face")
    bar.ax.tick_params(labelsize=6)
    bar.ax.set_title(panel.colorbar_label, fontsize=6) if len(panel.colorbar_label) < 16 else bar.set_label(
        panel.colorbar_label, fontsize=7
    )
