"""The database of a ledger: what was done, and which patches stand on the stack since and until when.

SQLite in WAL mode with ``synchronous=FULL``: a transaction that was committed survives a kill and a power cut.  Every operation has a
connection of its own, so that any thread or process may read at any time; one writes, others wait for it up to ``wait`` seconds.

    events   what was done: time, author, reason, verb, details (never deleted)
    edits    one change that can be undone: its requests, and how it was made (NULL: brought in as a saved patch)
    patches  what is known of each patch; ``stored`` says whether its folder is there
    stack    a patch at a place, from one event (``since``) to another (``until``, NULL: still): the state after any event
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from errata.errors import DiskError, LedgerError, StorageError, shortened
from errata.ledger.cells import DamagedError, Place, check_cells, check_relations
from errata.ledger.stacks import Entry
from errata.request import EditRequest

NAME = "ledger.db"
_APPLICATION, VERSION = 0x65727261, 1  # "erra"; raised with every change of the tables
WAIT = 30.0  # seconds a writer waits for another
_SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, author TEXT NOT NULL, reason TEXT NOT NULL, "
    "verb TEXT NOT NULL, details TEXT NOT NULL)",
    "CREATE TABLE edits (number INTEGER PRIMARY KEY AUTOINCREMENT, requests TEXT NOT NULL, method TEXT NOT NULL, settings TEXT, "
    "alone INTEGER NOT NULL, applied INTEGER NOT NULL REFERENCES events, undone INTEGER REFERENCES events)",
    "CREATE TABLE patches (id TEXT PRIMARY KEY, method TEXT NOT NULL, replaces TEXT NOT NULL, parameters INTEGER NOT NULL, "
    "stored INTEGER NOT NULL)",
    "CREATE TABLE stack (id INTEGER PRIMARY KEY AUTOINCREMENT, patch TEXT NOT NULL REFERENCES patches, edit INTEGER REFERENCES edits, "
    "place INTEGER NOT NULL, since INTEGER NOT NULL REFERENCES events, until INTEGER REFERENCES events)",
    "CREATE INDEX standing ON stack (until, place)",
    "CREATE INDEX of_edit ON stack (edit)",
)


@dataclass(frozen=True)
class Event:
    """One line of the log."""

    id: int
    time: str
    author: str
    reason: str
    verb: str
    details: dict[str, Any]


@dataclass(frozen=True)
class Edit:
    """One change that can be undone.

    requests  what it writes (of a patch that went on from another: only what it added)
    settings  every hyper-parameter, so that it can be made again; None for a patch that was brought in
    alone     made on the bare base; otherwise on the edits before it
    patch     the patch it stands for now (or stood for last)
    """

    number: int
    requests: tuple[EditRequest, ...]
    method: str
    settings: dict[str, Any] | None
    alone: bool
    patch: str
    applied: Event
    undone: Event | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""

        def when(event: Event) -> dict[str, Any]:
            return {"event": event.id, "time": event.time, "author": event.author, "reason": event.reason}

        return {
            "number": self.number,
            "live": self.undone is None,
            "requests": [r.to_dict() for r in self.requests],
            "method": self.method,
            "settings": self.settings,
            "alone": self.alone,
            "patch": self.patch,
            "applied": when(self.applied),
            "undone": None if self.undone is None else when(self.undone),
        }


class LedgerDatabase:
    """The database at ``folder/ledger.db``."""

    def __init__(self, folder: Path, wait: float = WAIT) -> None:
        self.path, self.wait = folder / NAME, wait

    def create(self, meta: dict[str, str]) -> None:
        """Tables, in one transaction; nothing where another made them first."""
        with self._connection(write=True) as db, _transaction(db, "IMMEDIATE"):
            if db.execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in _SCHEMA:
                    db.execute(statement)
                db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
                db.execute(f"PRAGMA application_id = {_APPLICATION}")
                db.execute(f"PRAGMA user_version = {VERSION}")

    def exists(self) -> bool:
        """Whether there is a ledger with tables; `LedgerError` for one of another program or a newer errata."""
        if not self.path.exists():
            return False
        with self._connection() as db:
            (application,), (version,) = (db.execute(f"PRAGMA {n}").fetchone() for n in ("application_id", "user_version"))
            tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not tables and not version:  # killed before its tables were there
            return False
        if application != _APPLICATION:
            raise LedgerError(f"{self.path} is a database of another program; it is left alone, give another folder")
        if version != VERSION:
            raise LedgerError(f"{self.path} has tables of version {version}, this errata reads {VERSION}; update errata to open it")
        return True

    @contextlib.contextmanager
    def read_transaction(self) -> Iterator[Reader]:
        """One consistent view, whatever others write meanwhile."""
        with self._connection() as db, _transaction(db, "DEFERRED"):
            yield Reader(db)

    @contextlib.contextmanager
    def write_transaction(self, wait: float | None = None) -> Iterator[Writer]:
        """One transaction, committed (and on the disk) at the end of the ``with`` block, undone by any error.  Others wait."""
        with self._connection(write=True, wait=wait) as db, _transaction(db, "IMMEDIATE"):
            yield Writer(db)

    @contextlib.contextmanager
    def _connection(self, write: bool = False, wait: float | None = None) -> Iterator[sqlite3.Connection]:
        waited = self.wait if wait is None else wait
        with self._complaining(waited):
            db = sqlite3.connect(self.path, timeout=waited, isolation_level=None)
            db.text_factory = lambda text: text.decode("utf-8", "surrogateescape")  # what is not UTF-8 is said of its cell
            try:
                if write:
                    db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA foreign_keys = ON")
                yield db
            finally:
                db.close()

    @contextlib.contextmanager
    def _complaining(self, waited: float) -> Iterator[None]:
        advice = f"bring {NAME} back from a copy; the patch folders beside it are whole and can be applied to a new ledger"
        try:
            yield
        except DamagedError as error:
            raise StorageError(f"{self.path}: damaged: {error}; {advice}") from None
        except sqlite3.OperationalError as error:
            text = str(error)
            if "locked" in text or "busy" in text:
                raise LedgerError(
                    f"{self.path.parent}: another is writing to this ledger (waited {waited:g} s); try again, or wait longer (--wait)"
                ) from None
            what, advice = _why(text)
            raise DiskError(f"{self.path}: {what}; the ledger is as it was before; {advice}") from None
        except OverflowError:
            raise LedgerError(f"{self.path.parent}: no such number; `errata ledger log` lists what there is") from None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter: what SQLite says of it is no text
            raise StorageError(f"{self.path}: cannot be read ({error}); try `sqlite3 {NAME} .recover`, or {advice}") from None


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # SQLite has done it by itself where the disk was full
            db.execute("ROLLBACK")
        raise


def _why(text: str) -> tuple[str, str]:
    """What SQLite could not do, and the way out."""
    if "full" in text:
        return "not written (the disk is full)", "free space, then try again"
    if "readonly" in text or "unable to open" in text:
        return f"cannot be written ({text})", "get the right to write to it and to its folder, or work on a copy"
    if "no such" in text:
        return f"is not as errata left it ({text})", "bring it back from a copy"
    return f"not read or written ({text})", "look at the disk, then try again"


def _event(row: tuple[Any, ...]) -> Event:
    place, (_, time, author, reason, verb, details) = Place("events", row[0]), row
    said = {"time": time, "author": author, "reason": reason, "verb": verb}
    texts = {column: place.text(column, value) for column, value in said.items()}
    return Event(place.number("id", row[0]), **texts, details=place.details(texts["verb"], details))


def _entry(row: tuple[Any, ...]) -> Entry:
    number, patch, edit, place, since, replaces, stored = row
    own, of = Place("stack", number), Place("patches", patch)
    where = own.number("place", place), own.number("since", since)
    return Entry(
        number, own.patch("patch", patch), own.maybe("edit", edit), where[0], of.replaced(replaces), of.flag("stored", stored), where[1]
    )


class Reader:
    """Questions to the database, inside a transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def meta(self, key: str) -> str:
        row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return Place("meta", key).text("value", None if row is None else row[0])

    def head(self) -> int:
        """The last event; 0 before the first."""
        return int(self.db.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()[0])

    def entries(self, at: int | None = None) -> tuple[Entry, ...]:
        """The stack now, or as it was after event ``at``."""
        when, values = ("s.until IS NULL", ()) if at is None else ("s.since <= :at AND (s.until IS NULL OR s.until > :at)", {"at": at})
        rows = self.db.execute(
            "SELECT s.id, s.patch, s.edit, s.place, s.since, p.replaces, p.stored FROM stack s LEFT JOIN patches p ON p.id = s.patch "
            f"WHERE {when} ORDER BY s.place, s.id",
            values,
        )
        return tuple(map(_entry, rows))

    def events(self, last: int | None = None) -> list[Event]:
        """The log, oldest first; its ``last`` ones only where given."""
        rows = self.db.execute(
            "SELECT id, time, author, reason, verb, details FROM events ORDER BY id DESC LIMIT ?", (-1 if last is None else last,)
        )
        return [_event(row) for row in rows][::-1]

    def event(self, number: int) -> Event:
        row = self.db.execute("SELECT id, time, author, reason, verb, details FROM events WHERE id = ?", (number,)).fetchone()
        if row is None:
            raise DamagedError(f"table events: there is no event {shortened(number)}, and an edit speaks of it")
        return _event(row)

    def edits(self, live: bool = True) -> list[Edit]:
        """Live ones, or all that ever were, by number."""
        numbers = self.db.execute("SELECT number FROM edits" + (" WHERE undone IS NULL" if live else "") + " ORDER BY number").fetchall()
        return [self.edit(n) for (n,) in numbers]

    def count(self) -> int:
        """How many edits are live."""
        return int(self.db.execute("SELECT count(*) FROM edits WHERE undone IS NULL").fetchone()[0])

    def edit(self, number: int) -> Edit:
        """`LedgerError` for a number that no edit has."""
        row = self.db.execute("SELECT requests, method, settings, alone, applied, undone FROM edits WHERE number = ?", (number,)).fetchone()
        if row is None:
            most = self.db.execute("SELECT coalesce(max(number), 0) FROM edits").fetchone()[0]
            raise LedgerError(
                f"there is no edit {number}; " + (f"they are 1 to {most} (`errata ledger log`)" if most else "none was made yet")
            )
        stands = self.db.execute("SELECT id, patch FROM stack WHERE edit = ? ORDER BY id DESC LIMIT 1", (number,)).fetchone()
        if stands is None:
            raise DamagedError(f"edit {number}: table stack has no row of it")
        patch = Place("stack", stands[0]).patch("patch", stands[1])
        undone = None if row[5] is None else self.event(row[5])
        return Edit(number, *Place("edits", number).made(*row[:4]), patch, self.event(row[4]), undone)

    def stored(self) -> set[str]:
        """Patches whose folders belong here."""
        return {row[0] for row in self.db.execute("SELECT id FROM patches WHERE stored = 1")}

    def check(self) -> None:
        """Every cell of every table, and what they say of each other; `StorageError` for the first that is damaged."""
        (found,) = self.db.execute("PRAGMA integrity_check(1)").fetchone()  # an index may have lost rows that the table has
        if found != "ok":
            raise DamagedError(found)
        for key in ("base", "model"):
            self.meta(key)
        check_cells(self.db)
        dropped = {p for event in self.events() if event.verb == "compact" for p in event.details.get("dropped", [])}
        check_relations(self.db, self.entries(), dropped)


class Writer(Reader):
    """Changes, all of one transaction."""

    def note(self, verb: str, author: str, reason: str, details: dict[str, Any]) -> int:
        """A new event; its number."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        values = (now, author, reason, verb, json.dumps(details, ensure_ascii=False))
        return int(
            self.db.execute("INSERT INTO events (time, author, reason, verb, details) VALUES (?, ?, ?, ?, ?)", values).lastrowid or 0
        )

    def detail(self, event: int, details: dict[str, Any]) -> None:
        """Details of an event of this transaction, once they are known."""
        self.db.execute("UPDATE events SET details = ? WHERE id = ?", (json.dumps(details, ensure_ascii=False), event))

    def add_patch(self, patch: str, method: str, replaces: Sequence[str], parameters: int) -> None:
        self.db.execute(
            "INSERT INTO patches VALUES (?, ?, ?, ?, 1) ON CONFLICT (id) DO UPDATE SET stored = 1",
            (patch, method, json.dumps(list(replaces)), parameters),
        )

    def drop_patches(self, patches: Sequence[str]) -> None:
        self.db.executemany("UPDATE patches SET stored = 0 WHERE id = ?", [(p,) for p in patches])

    def add_edit(self, requests: Sequence[EditRequest], method: str, settings: dict[str, Any] | None, alone: bool, event: int) -> int:
        """A new edit; its number."""
        values = (
            json.dumps([r.to_dict() for r in requests], ensure_ascii=False),
            method,
            None if settings is None else json.dumps(settings, ensure_ascii=False),
            alone,
            event,
        )
        done = self.db.execute("INSERT INTO edits (requests, method, settings, alone, applied) VALUES (?, ?, ?, ?, ?)", values)
        return int(done.lastrowid or 0)

    def put(self, patch: str, edit: int | None, event: int, place: int | None = None) -> None:
        """A patch on the stack: on top, or at a place (behind what stands there)."""
        top = "coalesce((SELECT max(place) FROM stack), 0) + 1"
        self.db.execute(
            f"INSERT INTO stack (patch, edit, place, since) VALUES (?, ?, {top if place is None else '?'}, ?)",
            (patch, edit, *(() if place is None else (place,)), event),
        )

    def take(self, entries: Sequence[Entry], event: int) -> None:
        """Off the stack."""
        self.db.executemany("UPDATE stack SET until = ? WHERE id = ?", [(event, e.row) for e in entries])

    def mark_undone(self, number: int, event: int) -> None:
        self.db.execute("UPDATE edits SET undone = ? WHERE number = ?", (event, number))
