"""How well the watch half foretells a benchmark's own neighbours:  python scripts/witness.py RUN_FOLDER [--out FILE.json]

Of a run (`errata run`) with ``score.watch``: for each method and case the share of neighbours with the first word of their answer kept,
once over the benchmark's neighbours (kind "neighbour") and once over the watch half (kind "watch"), and the correlation of the two.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("neighbour", "watch")


def shares(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{case: {kind: share kept}} of the cases that have both kinds."""
    found: dict[str, dict[str, list[bool]]] = {}
    for r in records:
        if r["kind"] in KINDS:
            found.setdefault(r["case"], {}).setdefault(r["kind"], []).append(bool(r["first_word_agree"]))
    return {case: {k: float(np.mean(v)) for k, v in own.items()} for case, own in found.items() if len(own) == len(KINDS)}


def correlation(pairs: list[tuple[float, float]]) -> float | None:
    """Pearson's r; None where one side never varies."""
    x, y = np.array(pairs, dtype=float).T
    return None if x.std() == 0 or y.std() == 0 else float(np.corrcoef(x, y)[0, 1])


def by_method(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of every method of a run, or of a folder of `errata score`."""
    out: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(run.rglob("records.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            out.setdefault(record["method"], []).append(record)
    return out


def witness(by_method: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means and correlations: over cases of each method, over all cases of all methods, and over the methods' means."""
    rows, every = [], []
    for method, records in by_method.items():
        own = list(shares(records).values())
        pairs = [(one["watch"], one["neighbour"]) for one in own]
        every += pairs
        means = [float(np.mean(side)) for side in zip(*pairs, strict=True)]
        rows.append({"method": method, "cases": len(own), "watch": means[0], "neighbour": means[1], "r": correlation(pairs)})
    return {
        "methods": rows,
        "r_cases_and_methods": correlation(every),
        "n": len(every),
        "r_of_means": correlation([(row["watch"], row["neighbour"]) for row in rows]) if len(rows) > 2 else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = witness(by_method(args.run))
    text = json.dumps(found, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
