"""Gates as image files, from the numbers of `errata analyse gates`: weights by kind of input, balance over edits, what locality costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.errors import InputError
from errata.report import figures

if TYPE_CHECKING:
    pass

Row = Mapping[str, Any]

# Told apart by colour-blind readers; kinds that should open gates are blue and light blue.
KINDS = {
    "edited": "#0072b2", "rephrased": "#56b4e9", "neighbour": "#d55e00", "unrelated": "#e69f00", "same_subject": "#cc79a7",
    "forgetfulness": "#999999",
}  # fmt: skip
VARIANTS = {"with": ("#0072b2", "o", "-"), "without": ("#d55e00", "s", "--")}


def weights(rows: Sequence[Row], paths: Sequence[str | Path]) -> None:
    """A panel a block: each basis' mean weight, bases sorted by their weight on edited inputs, a line a kind of input (BaFT, Fig. 2)."""
    blocks = sorted({int(r["block"]) for r in rows})
    if not blocks:
        raise InputError("there is no gate weight to draw")
    made, panels = figures.figure(3.6 * len(blocks), 3.4, len(blocks))
    for axes, block in zip(panels, blocks, strict=True):
        mine = [r for r in rows if r["block"] == block]
        first = mine[0]["bases"]
        order = sorted(range(len(first)), key=lambda k: -first[k])
        for i, row in enumerate(mine):
            line = [row["bases"][k] for k in order]
            label = f"{row['kind'].replace('_', ' ')} ({row['cases']})"
            axes.plot(
                range(1, len(line) + 1), line, color=KINDS[row["kind"]], marker="os^Dv*"[i % 6], markersize=4, linewidth=1.2, label=label
            )
        axes.set_xlabel(f"basis, by weight on {mine[0]['kind']} inputs")
        axes.set_ylabel("mean weight")
        axes.set_ylim(0, 1.2 * max(0.01, *(w for r in rows for w in r["bases"])))
        axes.set_xticks(range(1, len(first) + 1, max(1, len(first) // 6)))
        figures.finish(axes, f"block {block}")
    figures.save(made, paths)


def balance(rows: Sequence[Row], paths: Sequence[str | Path]) -> None:
    """Unevenness of the bases' running mean weights after t edits, the mean over blocks bold and each block thin: variance, and over
    the mean squared."""
    if not rows:
        raise InputError("there is no edit to draw")
    made, panels = figures.figure(9.0, 3.4, 2)
    for axes, (field, label) in zip(panels, (("variance", "variance over bases"), ("squared_cv", "variance / mean²")), strict=True):
        for variant, (colour, _, style) in VARIANTS.items():
            mine = [r for r in rows if r["variant"] == variant]
            blocks = [[r for r in mine if r["block"] == b] for b in sorted({r["block"] for r in mine})]
            for own in blocks:
                axes.plot([r["t"] for r in own], [r[field] for r in own], color=colour, linestyle=style, linewidth=0.6, alpha=0.45)
            if blocks:
                middle = [sum(r[field] for r in at) / len(at) for at in zip(*blocks, strict=True)]
                axes.plot(
                    [r["t"] for r in blocks[0]], middle, color=colour, linestyle=style, linewidth=2, label=f"{variant} the balancing loss"
                )
        axes.set_xlabel("sequential edits")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        figures.finish(axes, "")
    figures.save(made, paths)


def locality(rows: Sequence[Row], paths: Sequence[str | Path]) -> None:
    """Reliability against locality: a point a learning rate with its intervals, each variant's Pareto front a line."""
    if not rows:
        raise InputError("there is no run to draw")
    made, (axes,) = figures.figure(5.4, 4.4)
    for variant, (colour, marker, style) in VARIANTS.items():
        mine = [r for r in rows if r["variant"] == variant]
        points = [(r["reliability"], r["locality_agreement"]) for r in mine]
        for (x, y), row in zip(points, mine, strict=True):
            xerr, yerr = ([[max(0.0, v["value"] - v["low"])], [max(0.0, v["high"] - v["value"])]] for v in (x, y))
            axes.errorbar(x["value"], y["value"], xerr=xerr, yerr=yerr, color=colour, marker=marker, markersize=5, linewidth=0.7, capsize=2)
            axes.annotate(f"{row['lr']:.0e}", (x["value"], y["value"]), fontsize=6, xytext=(4, 4), textcoords="offset points")
        front = sorted((x["value"], y["value"]) for (x, y), r in zip(points, mine, strict=True) if r["front"])
        axes.plot([x for x, _ in front], [y for _, y in front], color=colour, linestyle=style, label=f"{variant} the locality term")
    axes.set_xlabel("reliability (teacher-forced)")
    axes.set_ylabel("locality: agreement (teacher-forced)")
    figures.finish(axes, "numbers: learning rate")
    figures.save(made, paths)
