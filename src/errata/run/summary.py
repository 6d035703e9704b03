"""What a cell came to: metrics with intervals at the end and at each mark, forgetting by age, what the guard did; what patches weigh."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from errata.core.bank import Stack
from errata.request import SURFACE_KINDS, Case
from errata.run.folder import Records
from errata.run.grid import Cell
from errata.score.cost import size_on_disk
from errata.score.forgetting import forgetting
from errata.score.metrics import summarise
from errata.score.robustness import micro_averages

Entry = dict[str, Any]


def of_cell(cell: Cell, records: Records, entries: Sequence[Entry], cases: Sequence[Case]) -> dict[str, Any]:
    """The document ``summary.json``.

    summary      rows of `summarise` after all edits
    micro_averages   REP's own averages of them, with ``score.robustness``
    retention    the same at each mark, with T; right_after: of each case right after its own edit (growing stacks only)
    forgetting   rows of `errata.score.forgetting`
    health       what the guard found, with T; undone: the edits it took back, by name
    """
    out: dict[str, Any] = {"cell": cell.to_dict(), "id": cell.id, "n": len(cases), "edits": entries[-1]["edits"]}
    if cell.scenario.kind == "single":
        return {**out, "summary": summarise(records), **_as_rep(records)}
    by_mark: dict[Any, Records] = {}
    for record in records:
        by_mark.setdefault(record.get("edits", "sampled"), []).append(record)
    sampled = by_mark.pop("sampled", [])
    soon = next((by_mark.pop(key) for key in list(by_mark) if isinstance(key, str)), [])
    last = max(by_mark)
    undone = {int(place): why for entry in entries for place, why in entry.get("undone", {}).items()}
    return {
        **out,
        "summary": summarise([*by_mark[last], *sampled]),
        **_as_rep(by_mark[last]),
        "retention": [{**row, "T": mark} for mark in sorted(by_mark) for row in summarise(by_mark[mark])],
        "right_after": summarise(soon),
        "forgetting": forgetting(soon, by_mark[last], last),
        "health": [{"T": entry["edits"], **entry["health"]} for entry in entries if "health" in entry],
        "undone": [
            {"edit": i + 1, "prompt": cases[i].request.prompt, "target": cases[i].request.target, "why": why} for i, why in undone.items()
        ],
        "stopped": any(entry.get("stopped") for entry in entries),
    }


def _as_rep(records: Records) -> dict[str, Any]:
    """REP's own averages after all edits, where its surfaces were asked."""
    asked = any(r["kind"] in SURFACE_KINDS for r in records)
    return {"micro_averages": micro_averages(records)} if asked else {}


def sizes(stacks: Sequence[Stack], single: bool) -> dict[str, Any]:
    """Numbers and bytes on disk: of a single edit's patch (mean over ``stacks``), or of all that is on at the end."""
    numbers = [sum(p.parameters for p in stack) for stack in stacks]
    weights = [sum(map(size_on_disk, stack)) for stack in stacks]
    return {"parameters": statistics.mean(numbers), "patch_bytes": statistics.mean(weights), "of": "an edit" if single else "the stack"}
