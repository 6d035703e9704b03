"""Published figures beside measured ones: a table for the terminal, Markdown, and plots, from the document of `errata reproduce`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.report import figures
from errata.report.curves import COLOURS, MARKERS
from errata.report.tables import percent

Document = Mapping[str, Any]
Row = Mapping[str, Any]
FLAGS = {"within": "", "above": "▲ higher", "below": "▼ lower"}
HEADINGS = ("part", "method", "T", "n", "figure", "measured [95 %]", "published", "gap", "")


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """Cells under `HEADINGS`, a line a figure, in percent."""
    out = []
    for r in rows:
        interval = "" if r["low"] is None else f" [{percent(r['low'])}, {percent(r['high'])}]"
        part = r["part"] if r["benchmark"] == r["part"].partition(",")[0] else f"{r['part']} ({r['benchmark']})"
        gap = "" if r["gap"] is None else f"{100 * r['gap']:+.1f}"
        mark = FLAGS.get(r["flag"] or "", "") + (" *" if r["misprint"] else "")
        cells = [part, r["method"], r.get("T", ""), r["n"], r["column"].replace("_", " "), percent(r["measured"]) + interval]
        out.append([*map(str, cells), percent(r["published"]), gap, mark.strip()])
    return out


def footers(document: Document) -> list[str]:
    """What a reader of the table must know."""
    what = document["reference"] or "no figure could be read"
    out = [f"Published: {document['paper']}, {document['where']} ({what}); source: {document['read']}."]
    if not document["rows"]:
        return out
    out.append(
        "Percent. ▲ and ▼: the published figure lies outside the measured interval and the paper's own spread of 2 points."
        + ("" if document["same_model"] else " Not the paper's model: a mark says that the settings differ, not who erred.")
    )
    out += [f"* {r['method']}, {r['part']}, T = {r.get('T', '–')}: {r['misprint']}." for r in document["rows"] if r["misprint"]]
    return out


def redundancy_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(headings, lines): method, block, and for each M the mean count of dimensions below M times the largest."""
    headings = ["method", "block", *(f"< {m:g} max" for m in dict.fromkeys(r["M"] for r in rows))]
    out: dict[tuple[str, int], list[str]] = {}
    for r in rows:
        out.setdefault((r["method"], r["block"]), [r["method"], str(r["block"])]).append(f"{r['count']:.1f} of {r['rank']}")
    return headings, list(out.values())


def markdown(document: Document) -> str:
    """The whole document as a page."""
    out = [f"# {document['title']}: {document['paper']}, {document['where']}", ""]
    out += [f"Measured on {document['model']} (base {document['base']}).", ""]
    if document["rows"]:
        out += _table(HEADINGS, lines(document["rows"]))
        out += [*(f"{line}  " for line in footers(document)), ""]
    if document["redundancy"]:
        out += _table(*redundancy_table(document["redundancy"]))
    for title, items in (
        ("Not as in the paper", document["differences"]),
        ("Not measured", document["left_out"]),
        ("About the published figures", [*document["remarks"], *_misprints(document)]),
    ):
        if items:
            out += [f"## {title}", "", *(f"- {line}" for line in items), ""]
    return "\n".join(out)


def _misprints(document: Document) -> list[str]:
    return [
        f"Misprint: {m['model']}, {m['method']}, {m['part']}{', T = ' + str(m['T']) if 'T' in m else ''}: {m['column']} is printed as "
        f"{m['printed']:g}, the mean of its row is {m['mean']:g}."
        for m in document["misprints"]
    ]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    table = [headings, ["---"] * len(headings), *rows]
    return [*("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table), ""]


def _style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}


def marks(rows: Sequence[Row], paths: Sequence[str | Path]) -> None:
    """A panel a figure and part: measured over T with intervals, published dashed."""
    panels = list(dict.fromkeys((r["part"], r["column"]) for r in rows))
    made, all_axes = figures.figure(3.4 * len(panels), 3.4, len(panels))
    methods = list(dict.fromkeys(r["method"] for r in rows))
    for axes, (part, column) in zip(all_axes, panels, strict=True):
        for i, method in enumerate(methods):
            mine = [r for r in rows if (r["part"], r["column"], r["method"]) == (part, column, method)]
            style = _style(i)
            spread = [[max(0.0, r["measured"] - r["low"]) for r in mine], [max(0.0, r["high"] - r["measured"]) for r in mine]]
            axes.errorbar(
                [r["T"] for r in mine], [r["measured"] for r in mine], yerr=spread, label=method, linewidth=1.2, capsize=2, **style
            )
            printed = [r for r in mine if r["published"] is not None]
            axes.plot([r["T"] for r in printed], [r["published"] for r in printed], linestyle="--", linewidth=1, fillstyle="none", **style)
        axes.set_xscale("log")
        ticks = sorted({r["T"] for r in rows if r["part"] == part})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("T")
        axes.set_title(f"{part}: {column}", fontsize=9)
        axes.grid(True, alpha=0.25)
    all_axes[0].legend(fontsize=7, title="dashed: published", title_fontsize=7)
    figures.save(made, paths)


def redundancy(rows: Sequence[Row], paths: Sequence[str | Path]) -> None:
    """Dimensions below M times the largest, over M, a line a block (BaFT, Fig. 1)."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    made, panels = figures.figure(4.4 * len(methods), 3.4, len(methods))
    for axes, method in zip(panels, methods, strict=True):
        for i, block in enumerate(sorted({r["block"] for r in rows if r["method"] == method})):
            mine = [r for r in rows if (r["method"], r["block"]) == (method, block)]
            style = _style(i)
            at, spread = range(len(mine)), [r["sd"] for r in mine]
            axes.errorbar([x + 0.06 * i for x in at], [r["count"] for r in mine], yerr=spread, label=f"block {block}", capsize=2, **style)
            axes.set_xticks(at, [f"{r['M']:g}" for r in mine])
        axes.set_ylim(0, rows[0]["rank"])
        axes.set_xlabel("M")
        axes.set_ylabel(f"of {rows[0]['rank']} dimensions, below M × the largest")
        axes.set_title(f"{method}: mean and sd over {rows[0]['n']} edits", fontsize=9)
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize=7)
    figures.save(made, paths)
