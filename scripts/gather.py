"""What folders of `errata run` came to, as one file under docs/results/real, from which the pages are computed.

    python scripts/gather.py NAME RUN [RUN …] [--replace]

Every complete cell of the folders goes into docs/results/real/NAME.json; cells that are there already stay.  So a table that was run in
parts, or on two machines, is one.  A cell of the same model, method and scenario that came out otherwise is told, and takes the older
one's place with ``--replace`` alone: the folder may be the older of the two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.score.metric_table import ROBUST
from errata.score.metrics import difference

REAL = Path(__file__).resolve().parents[1] / "docs" / "results" / "real"
KEPT = ("value", "low", "high", "n_cases", "n_probes", "before")
ROWS = (
    "reliability", "generality", "reliability_last", "generality_last", "reliability_ceiling", "portability", "portability_by_kind",
    "locality_agreement", "locality_agreement_by_kind", "locality_first_word", "locality_correct_known", "same_subject", "watch",
    "S", "ES", "PS", "NS", *(metric.name for metric in ROBUST),
)  # fmt: skip
PAIRED = (("reliability", "starts"), ("generality", "starts"), ("locality_first_word", "starts"), ("watch", "starts"), ("NS", "likelihood"))
AGAINST = "baft"

Document = dict[str, Any]


def rows_of(found: Iterable[Mapping[str, Any]]) -> list[Document]:
    """The rows of a summary that a page shows, rounded."""
    out = []
    for row in found:
        if row["metric"] in ROWS:
            numbers = {k: None if row.get(k) is None else round(row[k], 4) for k in KEPT}
            out.append({"metric": row["metric"], "protocol": row["protocol"], **({"T": row["T"]} if "T" in row else {}), **numbers})
    return out


def read_cell(folder: Path, commit: str | None) -> tuple[Document, list[Document]]:
    """(what the file holds of a cell, its records)."""
    summary, cost, cell = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("summary", "cost", "cell"))
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = summary["cell"]
    out = {
        "model": asked["model"]["name"], "method": asked["method"]["label"], "set": asked["method"]["set"], "benchmark": asked["benchmark"],
        "scenario": asked["scenario"], "settings": cell["settings"], "dtype": cell["dtype"], "commit": commit,
        "n": summary["n"], "edits": summary["edits"], "known": summary.get("known"),
        "seconds": cost["seconds"], "parameters": cost["parameters"], "patch_bytes": cost["patch_bytes"],
        "rows": rows_of(summary.get("retention") or summary["summary"]), "right_after": rows_of(summary.get("right_after", ())),
        **{k: summary[k] for k in ("forgetting", "health", "undone", "stopped") if summary.get(k)},
    }  # fmt: skip
    return out, records


def key(cell: Mapping[str, Any]) -> str:
    """Cells with the same are one row; settings that are younger than some cells count where they are on."""
    benchmark = {k: v for k, v in cell["benchmark"].items() if k != "consistent" or v}
    return json.dumps([cell["model"], cell["method"], benchmark, cell["scenario"]], sort_keys=True)


def compared(own: Sequence[Document], other: Sequence[Document]) -> list[Document]:
    """own − other, paired by case."""
    out = []
    for metric, protocol in PAIRED:
        found = difference(own, other, metric, protocol)
        out.append({"metric": metric, "protocol": protocol, "minus": AGAINST, **{k: round(found[k], 4) for k in ("value", "low", "high")}})
    return out


def gather(runs: Sequence[Path], before: Sequence[Document], replace: bool = False) -> list[Document]:
    """The cells of ``before``, and of all runs those that are not among them or, to ``replace``, came out otherwise."""
    cells: dict[str, Document] = {}
    records: dict[str, list[Document]] = {}
    for run in runs:
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        for path in sorted((run / "cells").glob("*/summary.json")):
            cell, own = read_cell(path.parent, manifest.get("commit"))
            cells[key(cell)], records[key(cell)] = cell, own
    for at, cell in cells.items():
        base = key({**cell, "method": AGAINST})
        if cell["scenario"]["kind"] == "single" and cell["method"] != AGAINST and base in records:
            cell["difference"] = compared(records[at], records[base])
    kept = {key(cell): cell for cell in before}
    for at, cell in cells.items():
        if "difference" not in cell and kept.get(at, {}).get("rows") == cell["rows"]:  # it was compared when both were at hand
            cell |= {k: v for k, v in kept[at].items() if k == "difference"}
    for at, cell in list(cells.items()):
        if at in kept and kept[at]["rows"] != cell["rows"]:
            print(f"{cell['model']} {cell['method']}: came out otherwise; {'replaced' if replace else 'not taken without --replace'}")
            if not replace:
                del cells[at]
    return sorted((kept | cells).values(), key=lambda c: (c["model"], c["method"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--replace", action="store_true")
    args = parser.parse_args()
    path = REAL / f"{args.name}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    REAL.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(cell) for cell in gather(args.runs, before, args.replace))
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{path}: {lines.count(chr(10)) + 1} cells")


if __name__ == "__main__":
    main()
