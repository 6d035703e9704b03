"""What stands on a ledger's stack, what of it runs, and what a stack is without one of its edits.

An entry names a patch and the edit it stands for.  A patch that went on from others holds them (``replaces``), and they stand aside
(`errata.core.bank.active_patches`).  An entry of no edit is a merge (`errata.ledger.compact`): it may leave at any time, and what it holds
runs again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.errors import LedgerError

Entries = tuple["Entry", ...]


@dataclass(frozen=True)
class Entry:
    """A patch on the stack since an event.  ``stored``: its folder is there."""

    row: int
    id: str
    edit: int | None
    place: int
    replaces: tuple[str, ...] = ()
    stored: bool = True
    since: int = 0


def of_edit(entries: Entries, number: int) -> Entry:
    """The entry of a live edit; `LedgerError` for one that is not live."""
    found = next((e for e in entries if e.edit == number), None)
    if found is None:
        raise LedgerError(f"edit {number} is undone already; `errata ledger log` lists what is live")
    return found


def holders(entries: Entries, patches: Sequence[str]) -> Entries:
    """Entries whose patches hold one of these."""
    wanted = set(patches)
    return tuple(e for e in entries if wanted & set(e.replaces))


def chained(entries: Entries, number: int) -> list[int]:
    """Later edits that went on from this one: their patches hold it, and cannot be without it."""
    return [e.edit for e in holders(entries, [of_edit(entries, number).id]) if e.edit is not None]


def without(entries: Entries, number: int) -> Entries:
    """The stack with the edit (and merges that hold it) taken off; only for an edit that no later one holds (`chained`)."""
    own = of_edit(entries, number)
    merges = holders(entries, [own.id])
    return tuple(e for e in entries if e is not own and e not in merges)


def unmerged(entries: Entries) -> Entries:
    """What an editor goes on from: the patches themselves and not their merges, where they are still there."""
    known = {e.id: e for e in entries}
    merges = [e for e in entries if e.edit is None]
    gone = {m.id for m in merges if all(known[p].stored for p in m.replaces if p in known and known[p].edit is not None)}
    return tuple(e for e in entries if e.id not in gone)
