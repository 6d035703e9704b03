"""What `errata analyse gates` found, from the plain numbers of its ``gates.json``: weights of the bases by kind of input (BaFT, Fig. 2),
failure signs and tests; and from ``reproduce.json`` how many dimensions of an edit do little (Fig. 1).

    summary      rows {block, kind, cases, inputs, bases [r]}: each basis' mean weight on inputs of that kind ("weights" in the latter)
    signs        rows {sign, block, value, bound, fires, says}
    tests        rows {block, a, b, n, p, gap, adjusted}: whether two kinds of input get different weights, paired by case
    redundancy   rows {method, block, M, count, rank}: mean number of dimensions that are updated less than M times the largest

Parts may be missing; one that cannot be read is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from errata.errors import InputError
from errata.report.layout import Table
from errata.report.tables import escape

Row = Mapping[str, Any]
KEYS: Final = {
    "summary": ("kind", "bases"),
    "weights": ("kind", "bases"),
    "signs": ("sign", "says"),
    "tests": ("a", "b", "p"),
    "redundancy": ("M", "count", "rank"),
}


def _rows(document: Mapping[str, Any], part: str) -> list[Row]:
    rows = document.get(part) or []
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or (lacking := [k for k in KEYS[part] if k not in row]):
            what = "is no mapping" if not isinstance(row, Mapping) else f"has no {lacking[0]!r}"
            raise InputError(
                f"{name(document)}: row {i} of {part!r} {what}; it was not written by errata analyse gates or errata reproduce"
            )
    return list(rows)


def name(document: Mapping[str, Any]) -> str:
    """What was looked at, where it says."""
    return str(document.get("source") or document.get("title") or document.get("model") or "the run")


def tables(document: Mapping[str, Any]) -> list[Table]:
    """The signs and the tests."""
    signs = [
        [str(r["sign"]), _block(r), _number(r.get("value")), _number(r.get("bound")), _fires(r.get("fires")), str(r["says"])]
        for r in _rows(document, "signs")
    ]
    tested = [
        [f"{r['a']} against {r['b']}", _block(r), str(r.get("n", "–")), _number(r.get("gap")), _number(r["p"]), _number(r.get("adjusted"))]
        for r in _rows(document, "tests")
    ]
    heads = ["inputs", "block", "cases", "gap", "p", "p, adjusted"]
    out = [
        Table("Failure signs of the gates", ["sign", "block", "value", "bound", "there", "what it says"], signs, words=6, key="signs"),
        Table("Do the gates tell inputs apart?", heads, tested, "Permutation tests, paired by case; adjusted over all rows.", key="tests"),
    ]
    return [table for table in out if table.lines]


def _block(row: Row) -> str:
    return "–" if row.get("block") is None else str(row["block"])


def _number(value: Any) -> str:
    return "–" if value is None else f"{float(value):.3g}"


def _fires(value: Any) -> str:
    return "not measured" if value is None else "yes" if value else "no"


def heat_maps(document: Mapping[str, Any]) -> list[str]:
    """HTML: a table a block, kinds of input down and bases across, shaded by weight; and the redundancy of dimensions."""
    rows, out = _rows(document, "summary") or _rows(document, "weights"), []
    for block in dict.fromkeys(map(_block, rows)):
        mine = [r for r in rows if _block(r) == block]
        bases = max(len(r["bases"]) for r in mine)
        labels = [f"{r['kind']} ({r.get('inputs', '?')})".replace("_", " ") for r in mine]
        caption = f"Mean weight of each basis, block {block}; rows: kind of input (how many)"
        out.append(_map(caption, ["input", *(str(i + 1) for i in range(bases))], labels, [[*map(_finite, r["bases"])] for r in mine], 2))
    if found := _rows(document, "redundancy"):
        lines, at = list(dict.fromkeys((str(r.get("method", "")), _block(r)) for r in found)), list(dict.fromkeys(r["M"] for r in found))
        counts = {(str(r.get("method", "")), _block(r), r["M"]): _finite(r["count"]) for r in found}
        caption = f"Dimensions of an edit, of {found[0]['rank']}, whose update is less than M times the largest (mean over edits)"
        values = [[counts.get((*line, m), math.nan) for m in at] for line in lines]
        labels = [f"{method}, block {block}" for method, block in lines]
        out.append(_map(caption, ["", *(f"M = {m:g}" for m in at)], labels, values, 1, float(found[0]["rank"])))
    return out


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _map(
    caption: str, heads: Sequence[str], labels: Sequence[str], values: Sequence[Sequence[float]], digits: int, most: float = 0.0
) -> str:
    most = most or max((v for row in values for v in row if not math.isnan(v)), default=0.0) or 1.0
    body = []
    for label, row in zip(labels, values, strict=True):
        cells = "".join(
            "<td>–</td>" if math.isnan(v) else f'<td class="heat" style="--h: {100 * max(0.0, v) / most:.0f}%">{v:.{digits}f}</td>'
            for v in row
        )
        body.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    return (
        f'<figure class="wide"><figcaption>{escape(caption)}</figcaption><div class="scroll" tabindex="0"><table class="map">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div></figure>"
    )
