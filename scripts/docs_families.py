"""The table of docs/families.md, computed from ``src/errata/core/families.json``: what was verified on which model family."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from docs_results import table
from families_file import Data, read

Claim = dict[str, Any]
HEADS = ("family", "parts are found by", "weights", "number formats", "forward", "undo", "methods")


def stacked(lines: Iterable[str]) -> str:
    """Several verifications in one cell, a line each."""
    return "<br>".join(lines) or "–"


def methods(claim: Claim, every: int) -> str:
    """How many hold, of those that were tried."""
    held, tried = len(claim["methods"]), len(claim["methods"]) + len(set(claim["failed"]) - {"forward"})
    return f"all {held}" if held == tried == every else f"{held} of {every}"


def families(data: Data) -> str:
    """A row a family; families nothing was verified on come last and say so."""
    rows = []
    for name, row in sorted(data["families"].items(), key=lambda item: (not item[1]["verified"], item[0])):
        found: list[Claim] = row["verified"]
        how = "structure" if row["paths"] is None else "name"
        if not found:
            rows.append([f"`{name}`", how, "not verified", "–", "–", "–", "–"])
            continue
        rows.append(
            [
                f"`{name}`",
                how,
                stacked(claim["weights"] for claim in found),
                stacked(", ".join(claim["dtypes"]) for claim in found),
                stacked("yes" if claim["forward"] else "**no**" for claim in found),
                stacked("yes" if claim["undo"] else "**no**" for claim in found),
                stacked(methods(claim, len(data["all_methods"])) for claim in found),
            ]
        )
    return table(HEADS, rows)


def failures(data: Data) -> str:
    """What did not hold, with the reason that was written down."""
    lines = [
        f"- `{name}`, {claim['weights']}: {what} failed. {why}"
        for name, row in sorted(data["families"].items())
        for claim in row["verified"]
        for what, why in claim["failed"].items()
    ]
    return "\n".join(lines) or "Nothing that was tried failed."


def versions(data: Data) -> str:
    """With what, and when."""
    found: dict[tuple[str, str, str], int] = {}
    for row in data["families"].values():
        for claim in row["verified"]:
            key = claim["torch"], claim["transformers"], claim["date"]
            found[key] = found.get(key, 0) + 1
    return "\n".join(
        f"- {count} verification{'s' if count > 1 else ''} with torch {torch} and transformers {transformers}, on {date}"
        for (torch, transformers, date), count in sorted(found.items())
    )


def parts() -> dict[str, str]:
    """Name of a computed part of families.md -> its text."""
    data = read()
    return {"families": families(data), "failures": failures(data), "versions": versions(data)}
