"""What was measured on real models, out of docs/results/real: the files that `scripts/gather.py` wrote."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
MODELS = {"smollm2": "smollm2-135m", "gemma": "gemma-3-270m"}
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma-3-270M"}
SINGLE = (
    ("reliability", "reliability", "starts"), ("generality", "generality", "starts"), ("first word kept", "locality_first_word", "starts"),
    ("watched", "watch", "starts"), ("ES", "ES", "likelihood"), ("PS", "PS", "likelihood"), ("NS", "NS", "likelihood"),
)  # fmt: skip

Cell = Mapping[str, Any]


@functools.cache
def cells(name: str) -> tuple[Cell, ...]:
    """Of docs/results/real/NAME.json; none where there is no such file."""
    path = RESULTS / "real" / f"{name}.json"
    return tuple(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else ()


def of(name: str, model: str) -> dict[str, Cell]:
    """{label of a method: its cell} of one model, by its short name."""
    return {c["method"]: c for c in cells(name) if c["model"] == MODELS[model]}


def row(cell: Cell | None, metric: str, protocol: str) -> Mapping[str, Any] | None:
    """One number of a cell with its interval."""
    rows: Iterable[Mapping[str, Any]] = () if cell is None else cell["rows"]
    return next((r for r in rows if r["metric"] == metric and r["protocol"] == protocol), None)


def value(cell: Cell | None, metric: str, protocol: str) -> float:
    """The number alone; NaN where it was not measured."""
    found = row(cell, metric, protocol)
    return float("nan") if found is None else float(found["value"])


def percent(found: Mapping[str, Any] | None) -> str:
    """With its interval, where there is one."""
    if found is None:
        return "–"
    ends = "" if found["low"] is None else f" [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
    return f"{100 * found['value']:.0f}{ends}"


def seconds(cell: Cell) -> float:
    """Of editing, an edit; 0 for a method that trains nothing."""
    return float(cell["seconds"].get("editing", 0.0)) / int(cell["edits"])


def costs(cell: Cell) -> list[str]:
    """Seconds an edit and kB on disk, as text."""
    return [f"{seconds(cell):.1f}", f"{cell['patch_bytes'] / 1000:,.0f}"]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)) + "\n"
