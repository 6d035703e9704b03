"""Taking an edit back: its patch leaves the stack, exactly; or the ledger becomes as if the edit had never been.

Without ``remake`` the edit's patch (and merges that hold it) leave; everything else stays as it was made.  For edits made alone that is
the ledger in which it was never applied, bit for bit, in any order.  An edit that later ones went on from (a chain: BaFT, GRACE … in
continual mode) is inside their patches and cannot leave alone: refused, with the way out.

With ``remake`` every later edit that was made on top of it is made again, in order, on the stack without it: the same steps a ledger
takes that never had it.  Edits made alone stay; a later edit that was brought in as a saved patch stays too, unless it holds what is
made anew, which is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from errata.core.bank import active_patches
from errata.errors import LedgerError
from errata.ledger.database import Edit, Writer
from errata.ledger.editors import ConfiguredEditor, Progress, SingleEditReplayer
from errata.ledger.stacks import Entries, Entry, chained, holders, of_edit, unmerged, without
from errata.ledger.state import LedgerState


@dataclass(frozen=True)
class UndoResult:
    """remade: (edit, patch before, patch now) of edits made again; on_top: live edits that were made while this one was on, and stay so."""

    edit: int
    remade: tuple[tuple[int, str, str], ...]
    on_top: tuple[int, ...]


def undo(ledger: LedgerState, number: int, remake: bool, reason: str, progress: Progress | None) -> UndoResult:
    with ledger.transaction() as writer:
        edit, entries = writer.edit(number), writer.entries()
        own = of_edit(entries, number)
        event = writer.note("undo", ledger.author, reason, {})
        remade: list[tuple[int, str, str]] = []
        if remake:
            remade = _remake(ledger, writer, entries, own, event, progress)
        else:
            _refuse_inside(entries, edit)
            rest = without(entries, number)
            if gone := [e for e in active_patches(rest) if not e.stored]:
                raise LedgerError(
                    f"edit {number} cannot be taken off: the files of edit {gone[0].edit}, which would run again, were dropped by "
                    f"`compact --lean`; make it and what follows again with `errata ledger undo {number} --remake`"
                )
            writer.take([e for e in entries if e not in rest], event)
        writer.mark_undone(number, event)
        later = [writer.edit(e.edit) for e in entries if e.edit is not None and e.place > own.place]
        on_top = () if remake else tuple(e.number for e in later if e.settings is not None and not e.alone)
        details = {"edit": number, "remade": [{"edit": n, "before": old, "now": new} for n, old, new in remade]}
        writer.detail(event, details)
    return UndoResult(number, tuple(remade), on_top)


def _refuse_inside(entries: Entries, edit: Edit) -> None:
    if later := chained(entries, edit.number):
        names = ", ".join(map(str, later[:5])) + (" …" if len(later) > 5 else "")
        raise LedgerError(
            f"edit {edit.number} is inside a chain: edit{'s' if len(later) > 1 else ''} {names} went on from it and hold it. "
            f"Undo the later ones first (last one first), or make them again without it: `errata ledger undo {edit.number} --remake`"
        )


def _remake(
    ledger: LedgerState, writer: Writer, entries: Entries, own: Entry, event: int, progress: Progress | None
) -> list[tuple[int, str, str]]:
    """The later edits again, in their places.  The stack is rebuilt from the first place where something changes."""
    plain = unmerged(entries)
    first = own.place
    while missing := [e for e in active_patches(tuple(e for e in plain if e.place < first)) if not e.stored]:  # files dropped by compact
        held = {name for e in missing for name in (e.id, *e.replaces)}  # a merge stands where its last edit does: all are made again
        first = min(e.place for e in entries if e.id in held)
    kept = tuple(e for e in plain if e.place < first)
    todo = [e for e in plain if e.place >= first and e.edit is not None and e is not own]
    changed, out, alone = [own], [], SingleEditReplayer(ledger.lm, writer)
    for i, entry in enumerate(todo):
        assert entry.edit is not None
        edit = writer.edit(entry.edit)
        stays = entry.stored and (edit.alone or edit.settings is None)
        if stays:
            if set(entry.replaces) & {e.id for e in changed}:
                raise LedgerError(
                    f"edit {edit.number} was brought in as a saved patch that holds edit {own.edit} or one that would be made again; "
                    f"undo edit {edit.number} first"
                )
            kept = (*kept, entry)
            continue
        if edit.alone:
            patch = alone.again(edit)
        else:
            on = ledger.load(ledger.running(kept))
            (patch,) = ConfiguredEditor.again(ledger.lm, edit).make(ledger.lm, edit.requests, "continual", on)
        ledger.patch_store.save([patch])
        writer.add_patch(patch.id, patch.method, patch.replaces, patch.parameters)
        changed.append(entry)
        kept = (*kept, Entry(-1, patch.id, edit.number, entry.place, patch.replaces))
        out.append((edit.number, entry.id, patch.id))
        if progress is not None:
            progress("edits made again", i + 1, len(todo))
    # A merge stays only where nothing of it was touched, and it still runs where it did.
    merges = holders(tuple(e for e in entries if e.edit is None), [e.id for e in changed])
    writer.take([*changed, *merges], event)
    for entry in kept:
        if entry.row < 0:
            writer.put(entry.id, entry.edit, event, entry.place)
    return out
