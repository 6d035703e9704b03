"""The tables of docs/families.md: what was verified on which model family (``src/errata/core/families.json``) and architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import verify_architectures
from docs_results import table
from families_file import Data, read
from verify_architectures import CELLS

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


def architectures(data: Data) -> str:
    """A row an architecture; a cell is right, a number of what errata refuses with (`refusals`), or a fault."""
    numbers = {text: str(number) for number, text in enumerate(_refused(data), 1)}

    def shown(cell: dict[str, str]) -> str:
        if "fault" in cell:
            return "**fault**"
        return f"refused ({numbers[_plain(cell['refused'])]})" if cell else "right"

    rows = [[f"`{name}`", *(shown(row[cell]) for cell in CELLS)] for name, row in data["architectures"].items()]
    return table(("architecture", *CELLS), rows)


def refusals(data: Data) -> str:
    """What the numbers in the table stand for, and whatever faults there are."""
    faults = [
        f"- `{name}`, {key}: **fault**. {cell['fault']}"
        for name, row in data["architectures"].items()
        for key, cell in row.items()
        if "fault" in cell
    ]
    about = f"With torch {data['torch']} and transformers {data['transformers']}:"
    return "\n".join([about, "", *(f"{number}. {text}" for number, text in enumerate(_refused(data), 1)), *faults])


def _refused(data: Data) -> list[str]:
    """The distinct refusals, as they occur."""
    cells = [cell for row in data["architectures"].values() for cell in row.values()]
    return list(dict.fromkeys(_plain(cell["refused"]) for cell in cells if "refused" in cell))


def _plain(text: str) -> str:
    """A refusal without the names of method and model in front and the advice behind."""
    return re.sub(r"; set (the block|layers?), .*$", "", re.sub(r"^(\w+: )?[\w-]+: (?=block)", "", text))


def parts() -> dict[str, str]:
    """Name of a computed part of families.md -> its text."""
    data, tried = read(), verify_architectures.read()
    return {
        "families": families(data),
        "failures": failures(data),
        "versions": versions(data),
        "architectures": architectures(tried),
        "refusals": refusals(tried),
    }
