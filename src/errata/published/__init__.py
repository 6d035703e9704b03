"""Figures that papers printed, a file a table, with where each was read, its protocol and its misprints; never a measurement of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from errata.errors import UnknownNameError, near

HERE: Final = Path(__file__).parent
SPREAD: Final = 0.02  # the same row, printed in three places of the BaFT paper, differs by so much
KEYS: Final = ("model", "method", "part", "T", "batch", "quoted")  # of a row; what is left are its figures
FAMILIES: Final = {"llama-2": "LLaMA-2-7b", "llama-3": "LLaMA-3-8b-Instruct", "gemma": "Gemma-1.1-7b-it"}


@dataclass(frozen=True)
class PublishedTable:
    """One table or figure.

    paper, where, read   the paper, the place in it, and how its figures came here
    protocol             how the paper measured, as far as it says
    misprints            figures that contradict their own row: the row's keys, ``column``, as ``printed``, and the ``mean`` it should be
    remarks              what else a reader of the figures should know
    rows                 model, method, part (a benchmark), maybe T, batch, quoted (from another paper), and the figures as shares
    """

    name: str
    title: str
    paper: str
    where: str
    read: str
    protocol: Mapping[str, Any]
    misprints: tuple[Mapping[str, Any], ...]
    remarks: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The figures a row may have, in the paper's order."""
        return tuple(dict.fromkeys(k for row in self.rows for k in row if k not in KEYS))

    def of(self, model: str) -> list[Mapping[str, Any]]:
        """The rows of one of the paper's models."""
        return [row for row in self.rows if row["model"] == model]

    def nearest(self, name: str) -> tuple[str | None, bool]:
        """(the paper's model that ``name`` is, else its first; whether it is that model).  None without rows."""
        models = list(dict.fromkeys(str(row["model"]) for row in self.rows))
        plain = name.lower().replace("_", "-")
        for part, label in FAMILIES.items():
            found = [m for m in models if m.startswith(label)]
            if part in plain and found:
                same = found[0].lower() in plain and not ("chat" in plain and "chat" not in found[0])
                return found[0], same
        return (models[0] if models else None), False

    def misprint(self, row: Mapping[str, Any], column: str) -> Mapping[str, Any] | None:
        """The misprint at this figure, where there is one."""
        keys = [k for k in KEYS if k in row and k != "quoted"]
        found = (m for m in self.misprints if m["column"] == column and all(m.get(k) == row[k] for k in keys))
        return next(found, None)


def names() -> list[str]:
    """Every table there is."""
    return sorted(path.stem for path in HERE.glob("*.json"))


def get(name: str) -> PublishedTable:
    """The table of that name; `UnknownNameError` otherwise."""
    if name not in names():
        raise UnknownNameError(f"no published table {name!r}; {near(name, names(), 'there are')}")
    held: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    for key in ("misprints", "remarks", "rows"):
        held[key] = tuple(held[key])
    return PublishedTable(name, **held)
