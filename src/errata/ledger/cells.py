"""What lies in the cells of a ledger's database, read as what it must be.

SQLite keeps what it is given, and disks and hands change it: a number where a text was, half of a JSON text, a row that nothing speaks of.
Whatever is not as errata writes it is a `DamagedError` that says which cell; nothing is guessed and nothing left out in silence.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from errata.config import build
from errata.core.bank import active_patches
from errata.documents import parse_json
from errata.errors import ConfigError, InputError, StorageError, shortened
from errata.ledger.stacks import Entries
from errata.request import EditRequest

_Made: TypeAlias = tuple[tuple[EditRequest, ...], str, dict[str, Any] | None, bool]
_ID = re.compile(r"[0-9a-f]{16}")


class DamagedError(StorageError):
    """A cell, or rows that do not belong together; who knows the file says which it is (`errata.ledger.database`)."""


@dataclass(frozen=True)
class Place:
    """A row, for messages."""

    table: str
    row: Any

    def wrong(self, column: str, why: str) -> DamagedError:
        return DamagedError(f"table {self.table}, row {shortened(self.row)}, column {column}: {why}")

    def text(self, column: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.wrong(column, f"holds {shortened(value)}, not a text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.wrong(column, "is not UTF-8") from None
        return value

    def number(self, column: str, value: Any, least: int = 1) -> int:
        if not isinstance(value, int) or value < least:
            raise self.wrong(column, f"holds {shortened(value)}, not a whole number of at least {least}")
        return value

    def maybe(self, column: str, value: Any) -> int | None:
        """A number, or NULL."""
        return None if value is None else self.number(column, value)

    def flag(self, column: str, value: Any) -> bool:
        if not isinstance(value, int) or value not in (0, 1):
            raise self.wrong(column, f"holds {shortened(value)}, neither 0 nor 1")
        return bool(value)

    def patch(self, column: str, value: Any) -> str:
        """The id of one."""
        if not isinstance(value, str) or not _ID.fullmatch(value):
            raise self.wrong(column, f"holds {shortened(value)}, not the id of a patch")
        return value

    def json(self, column: str, value: Any, kind: type) -> Any:
        try:
            found = parse_json(self.text(column, value))
        except ValueError as error:
            raise self.wrong(column, f"is no JSON ({error})") from None
        if not isinstance(found, kind):
            raise self.wrong(column, f"holds {shortened(found)}, not {'an object' if kind is dict else 'a list'}")
        return found

    def requests(self, value: Any) -> tuple[EditRequest, ...]:
        try:
            found = tuple(map(EditRequest.restore, self.json("requests", value, list)))
        except InputError as error:
            raise self.wrong("requests", str(error)) from None
        if not found:
            raise self.wrong("requests", "holds no request")
        return found

    def made(self, requests: Any, method: Any, settings: Any, alone: Any) -> _Made:
        """What an edit writes and how it was made: requests, method, settings, alone."""
        how = None if settings is None else self.json("settings", settings, dict)
        return self.requests(requests), self.text("method", method), how, self.flag("alone", alone)

    def replaced(self, value: Any) -> tuple[str, ...]:
        return tuple(self.patch("replaces", old) for old in self.json("replaces", value, list))

    def details(self, verb: str, value: Any) -> dict[str, Any]:
        """What an event did."""
        found: dict[str, Any] = self.json("details", value, dict)
        try:
            if verb in _DETAILS:
                build(_DETAILS[verb], found, "details")
        except ConfigError as error:
            raise self.wrong("details", str(error)) from None
        return found


@dataclass(frozen=True)
class _Apply:
    edits: tuple[int, ...]
    patches: tuple[str, ...]


@dataclass(frozen=True)
class _Remade:
    edit: int
    before: str
    now: str


@dataclass(frozen=True)
class _Undo:
    edit: int
    remade: tuple[_Remade, ...]


@dataclass(frozen=True)
class _Merge:
    patch: str
    edits: tuple[int, ...]


@dataclass(frozen=True)
class _Compact:
    merges: tuple[_Merge, ...]
    dropped: tuple[str, ...]
    lean: bool


_DETAILS: dict[str, type] = {"apply": _Apply, "undo": _Undo, "compact": _Compact}


def check_cells(db: sqlite3.Connection) -> None:
    """Every cell of the tables patches, stack and edits by itself."""
    for patch, method, replaces, parameters, stored in db.execute("SELECT id, method, replaces, parameters, stored FROM patches"):
        place = Place("patches", patch)
        place.patch("id", patch)
        place.text("method", method)
        place.replaced(replaces)
        place.number("parameters", parameters, 0)
        place.flag("stored", stored)
    for row, patch, edit, where, since, until in db.execute("SELECT id, patch, edit, place, since, until FROM stack"):
        place = Place("stack", row)
        place.patch("patch", patch)
        place.maybe("edit", edit)
        place.number("place", where)
        begins, ends = place.number("since", since), place.maybe("until", until)
        if ends is not None and ends < begins:
            raise place.wrong("until", f"{ends} is before the row's beginning, {begins}")
    for number, *how, applied, undone in db.execute("SELECT number, requests, method, settings, alone, applied, undone FROM edits"):
        place = Place("edits", number)
        place.made(*how)
        place.number("applied", applied)
        place.maybe("undone", undone)


def check_relations(db: sqlite3.Connection, entries: Entries, dropped: set[str]) -> None:
    """Rows that speak of each other agree.  Each cell by itself was read before.

    ``entries``: what stands now; ``dropped``: the patches whose folders went, by the log
    """
    for table, row, parent, _ in db.execute("PRAGMA foreign_key_check"):
        raise DamagedError(f"table {table}, row {row}: speaks of a row of {parent} that is not there")
    stays = "SELECT edit, patch, since, until FROM stack WHERE edit IS NOT NULL ORDER BY id"
    rows: dict[int, list[Sequence[Any]]] = {}
    for edit, *row in db.execute(stays):
        rows.setdefault(edit, []).append(row)
    for number, applied, undone in db.execute("SELECT number, applied, undone FROM edits"):
        own = rows.get(number, [])
        if not own or own[0][1] != applied or own[-1][2] != undone or any(until is None for _, _, until in own[:-1]):
            until = f"to event {undone}" if undone else "until now"
            raise DamagedError(f"edit {number}: it was on from event {applied} {until}, and its rows in table stack say otherwise")
    gone = {patch for (patch,) in db.execute("SELECT id FROM patches WHERE stored = 0")}
    if odd := sorted(gone - dropped) or [e.id for e in active_patches(entries) if not e.stored]:
        raise DamagedError(f"table patches, row {odd[0]!r}, column stored: says that its folder was dropped, and the log does not")
