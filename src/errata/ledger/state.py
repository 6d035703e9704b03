"""`LedgerState`: what a ledger is between two changes, and how a change begins and ends; its verbs work on this.

    folder/ledger.db       SQLite: events, edits, what stands on the stack since and until when (`errata.ledger.database`)
    folder/patches/<id>/   patch folders, on the disk before a transaction speaks of them (`errata.ledger.patch_store`)

A change holds SQLite's write lock from reading the stack to the commit, the training between them included: no edit is made on a stack
that is no longer there, a kill lets the lock go, and readers see the last committed state meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from errata.core.bank import Stack, active_patches
from errata.core.model import LM
from errata.errors import ErrataError, InputError, LedgerError, PatchError
from errata.ledger.database import Edit, Event, LedgerDatabase, Writer
from errata.ledger.patch_store import PatchStore
from errata.ledger.stacks import Entries


class LedgerState:
    """The record, the patch folders and the model of one ledger; `errata.ledger.ledger.Ledger` opens it."""

    def __init__(self, folder: Path, record: LedgerDatabase, lm: LM | None, author: str) -> None:
        self.folder, self.database, self.author = folder, record, author
        self.patch_store = PatchStore(folder)
        self._lm = lm

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def lm(self) -> LM:
        """`LedgerError` where the ledger was opened without a model."""
        if self._lm is None:
            raise LedgerError("this needs the model; open the ledger with it")
        return self._lm

    def meta(self, key: str) -> str:
        """``base`` (the fingerprint) or ``model`` (its name)."""
        with self.database.read_transaction() as view:
            return view.meta(key)

    def log(self, last: int | None = None) -> list[Event]:
        """What was done, oldest first."""
        with self.database.read_transaction() as view:
            return view.events(last)

    def edits(self, live: bool = True) -> list[Edit]:
        """Edits that are on (or all that ever were), by number."""
        with self.database.read_transaction() as view:
            return view.edits(live)

    def show(self, number: int) -> Edit:
        """One edit; `LedgerError` for a number that there is not."""
        with self.database.read_transaction() as view:
            return view.edit(number)

    def entries(self, at: int | None = None) -> Entries:
        """What stands on the stack now, or stood there after event ``at``."""
        with self.database.read_transaction() as view:
            if at is not None and not 0 <= at <= view.head():
                raise LedgerError(f"there is no event {at}; the last is {view.head()} (`errata ledger log`)")
            return view.entries(at)

    def stack(self, at: int | None = None) -> Stack:
        """The patches that run now (`errata.core.bank.active_patches`), or ran after event ``at``."""
        running = self.running(self.entries(at))
        if at is None:
            self.patch_store.keep(e.id for e in running)
        return self.load(running)

    def running(self, entries: Entries) -> Entries:
        """Those that run; `LedgerError` where the folder of one is dropped."""
        out = active_patches(entries)
        if gone := [e for e in out if not e.stored]:
            raise LedgerError(
                f"the files of patch {gone[0].id} (edit {gone[0].edit}) were dropped by compact; that state cannot run any more"
            )
        return out

    def load(self, entries: Entries) -> Stack:
        """The patches of entries, checked against the model where there is one."""
        patches = self.patch_store.load(entries)
        if self._lm is not None:
            for patch in patches:
                self._lm.check(patch)
        return patches

    # -- changing ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Writer]:
        """One transaction; where it fails, or Ctrl-C comes, patch folders saved inside vanish with it."""
        try:
            with self.database.write_transaction() as writer:
                yield writer
        except BaseException:
            self.recover()  # asks the database what to keep: Ctrl-C may come just after the commit
            raise

    def damaged(self, patch: str) -> bool:
        """Whether its folder cannot be read."""
        try:
            self.patch_store.read(patch)
        except PatchError:
            return True
        return False

    def recover(self) -> list[str]:
        """Remove what a torn change has left, unless another is writing now; the names of what went."""
        try:
            with self.database.write_transaction(wait=0.0) as writer:
                writer.check()  # a damaged record must cost no folder
                return self.patch_store.sweep(writer.stored())
        except ErrataError:  # busy, or a disk that cannot be written: the next open does it
            return []


def as_text(name: str, value: str) -> None:
    """`InputError` for what the database cannot hold, said before any work: bytes of a terminal that are not UTF-8 come as such."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the {name} {value!r} is not UTF-8 at character {error.start}; write it in UTF-8") from None
