"""Keys seen from the edit, from the numbers of `errata analyse keys`: what the edit reaches, and what REP makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.errors import InputError
from errata.report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"before": "#999999", "after": "#0072b2"}  # told apart by colour-blind readers, and in grey
LABELS = {"before": "native key", "after": "REP's key"}


def draw(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float | None], paths: Sequence[str | Path]) -> None:
    """A panel a block: for each kind of key the range from 5 to 95 %, the middle half and the median, before and after; and where the
    lemmas' bounds lie (medians over cases; ``limits``: beta_min, beta_max)."""
    if not rows:
        raise InputError("there is no key to draw")
    blocks = sorted({int(r["block"]) for r in rows})
    tall = max(sum(r["block"] == b for r in rows) for b in blocks)
    made, panels = figures.figure(5.6 * len(blocks), 1.4 + 0.42 * tall, len(blocks))
    for axes, block in zip(panels, blocks, strict=True):
        _panel(axes, [r for r in rows if r["block"] == block], limits, block)
    figures.save(made, paths)


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float | None], block: int) -> None:
    for i, row in enumerate(rows):
        for when, off in (("before", -0.16), ("after", 0.16)):
            low, quarter, middle, three, high = row[when]
            colour = COLOURS[when]
            axes.plot([low, high], [i + off, i + off], color=colour, linewidth=1, zorder=2)
            axes.plot([quarter, three], [i + off, i + off], color=colour, linewidth=5, solid_capstyle="butt", zorder=3)
            axes.plot([middle], [i + off], marker="|", color="black", markersize=8, linestyle="none", zorder=4)
    for when in COLOURS:
        axes.plot([], [], color=COLOURS[when], linewidth=5, label=LABELS[when])
    for name, style in (("beta_min", "-"), ("beta_max", "--")):
        if (value := limits.get(name)) is not None:
            axes.axvline(value, color="#d55e00", linestyle=style, linewidth=1.2, label=f"β {name.removeprefix('beta_')} (median)")
    axes.set_yticks(range(len(rows)), [f"{row['kind'].replace('_', ', ')} ({row['n']})" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("β(k, k*) / β(k*, k*)")
    axes.set_title(f"block {block}", fontsize=10)
    axes.grid(True, axis="x", alpha=0.25)
    axes.legend(fontsize=7, loc="best")
