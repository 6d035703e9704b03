"""Forgetting by age: of the edits that held right after they were made, the share that still holds, by how many edits came later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from errata.score import intervals

Record = Mapping[str, Any]
# What "holds" means for the edited prompt, by protocol: its free text begins with the answer (None in older records), or equals it; every
# token of it is right, the answer being fed.
_HOLDS: Final[dict[str, Callable[[Record], bool | None]]] = {
    "starts": lambda r: r.get("starts_after"),
    "generated": lambda r: bool(r["gen_match_after"]),
    "teacher_forced": lambda r: r["tf_after"] == 1.0,
}


def ages(edits: int) -> list[tuple[int, int]]:
    """Buckets (youngest, oldest) of ages 0 to ``edits`` − 1: the newest alone, then to the next power of ten."""
    found, low = [(0, 0)], 1
    while low < edits:
        found.append((low, min(low * 10, edits) - 1))
        low *= 10
    return found


def forgetting(right_after: Iterable[Record], at: Iterable[Record], edits: int, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each protocol and bucket: {method, T, protocol, age_low, age_high, n, held, retained, low, high}.

    ``right_after``: records right after each edit, in the order of the edits; ``at``: records of all cases on the stack after ``edits``.
    An edit is a case with all its requests: where it has several it holds if all do.  Its age is how many came after it.  n edits of that
    age; ``held`` of them held right after; ``retained`` is the share of those that hold at T (None where none held), with its 95 %
    interval over edits.  Edits that were taken back do not count.
    """
    first = _rewrites(r for r in right_after if "undone" not in r)
    last = _rewrites(at)
    place = {case: i for i, case in enumerate(dict.fromkeys(r["case"] for r in at))}
    rows = []
    for protocol, holds in _HOLDS.items():
        if any(holds(r) is None for records in (*first.values(), *last.values()) for r in records):
            continue
        for low, high in ages(edits):
            there = [case for case in first if case in last and low <= edits - 1 - place[case] <= high]
            held = [case for case in there if all(map(holds, first[case]))]
            if there:
                method = first[there[0]][0]["method"]
                row = {"method": method, "T": edits, "protocol": protocol, "age_low": low, "age_high": high, "n": len(there)}
                rows.append({**row, "held": len(held), **_share([all(map(holds, last[case])) for case in held], seed)})
    return rows


def _rewrites(records: Iterable[Record]) -> dict[str, list[Record]]:
    """case -> the records of its edited prompts."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] == "rewrite":
            found.setdefault(record["case"], []).append(record)
    return found


def _share(kept: Sequence[bool], seed: int) -> dict[str, float | None]:
    if not kept:
        return {"retained": None, "low": None, "high": None}
    values = np.array(kept, dtype=np.float64)
    low, high = intervals.share(values, seed)
    return {"retained": float(values.mean()), "low": low, "high": high}
