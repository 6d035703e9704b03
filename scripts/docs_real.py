"""The tables of docs/results/real.md, computed from what `scripts/gather.py` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from docs_methods import GROUPS, link
from docs_results import MODELS, SINGLE, Cell, costs, of, percent, row, table

DIFFERENCES = tuple(column for column in SINGLE if column[0] not in ("ES", "PS"))
ORDER = [name for names in GROUPS.values() for name in names]


def points(found: Mapping[str, Any]) -> str:
    """A difference; bold where its interval leaves out 0."""
    text = f"{100 * found['value']:+.0f} [{100 * found['low']:+.0f}, {100 * found['high']:+.0f}]"
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


def in_order(found: Mapping[str, Cell]) -> dict[str, Cell]:
    """As the pages have the methods; a variant stands behind its method."""
    return {label: found[label] for label in sorted(found, key=lambda label: (ORDER.index(label.split()[0]), label))}


def single(model: str) -> str:
    """Every method on a model's facts, and what each does otherwise than BaFT."""
    found = in_order(of("single", model))
    if not found:
        return "Not measured yet.\n"
    heads = ["", "n", *(head for head, _, _ in SINGLE), "s an edit", "kB"]
    rows = [[link(label, "../"), str(c["n"]), *(percent(row(c, m, p)) for _, m, p in SINGLE), *costs(c)] for label, c in found.items()]
    out = table(heads, [_unedited(next(iter(found.values()))), *rows])
    other = [
        [link(label, "../"), *(points(_pair(c, m, p)) for _, m, p in DIFFERENCES)] for label, c in found.items() if c.get("difference")
    ]
    if other:
        out += "\nEach method minus BaFT on the same facts, points, paired by case; bold where the interval leaves out 0.\n\n"
        out += table(["", *(head for head, _, _ in DIFFERENCES)], other)
    return out


def _pair(cell: Cell, metric: str, protocol: str) -> Mapping[str, Any]:
    pair: Mapping[str, Any] = next(d for d in cell["difference"] if d["metric"] == metric and d["protocol"] == protocol)
    return pair


def _unedited(cell: Cell) -> Sequence[str]:
    """The model as a cell saw it before its edits."""
    out = []
    for _, metric, protocol in SINGLE:
        found = row(cell, metric, protocol)
        same = metric in ("locality_first_word", "watch")  # agreement with itself
        out.append("100" if same else "–" if found is None or found["before"] is None else f"{100 * found['before']:.0f}")
    return ["unedited", str(cell["n"]), *out, "", ""]


def parts() -> dict[str, str]:
    """Name of a computed part of real.md -> its text."""
    return {f"single_{model}": single(model) for model in MODELS}
