"""Every live edit asked again: does it still hold, which later edit broke it, is its folder whole; and damaged folders made again.

Who broke an edit is found by bisection over the stack: right with the edits up to its own, wrong with all; some edit between is the
first one found with which a right answer turns wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from errata.core.bank import active_patches
from errata.errors import LedgerError, PatchError
from errata.ledger.database import Edit, Writer
from errata.ledger.editors import ConfiguredEditor, Progress, SingleEditReplayer
from errata.ledger.stacks import Entries, Entry, holders, of_edit, unmerged
from errata.ledger.state import LedgerState
from errata.request import EditRequest
from errata.score import wanted


@dataclass(frozen=True)
class EditStatus:
    """One request of a live edit.

    status  right (the answer begins with the target); broken (right when made, wrong now, from ``by`` on); never (wrong with the edits up
            to its own, too); wrong (what was right when made cannot be run any more, see `errata.ledger.compact`); damaged (the folder
            of the edit's patch); unknown (another's folder is damaged, so that nothing can be asked)
    """

    edit: int
    request: EditRequest
    answer: str | None
    status: str
    by: int | None = None


@dataclass(frozen=True)
class CheckResult:
    """repaired: (edit, exactly): whether the patch that was made again is the old one bit for bit."""

    held: tuple[EditStatus, ...]
    repaired: tuple[tuple[int, bool], ...]

    @property
    def sound(self) -> bool:
        return all(h.status == "right" for h in self.held)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        rows = [{"edit": h.edit, "request": h.request.to_dict(), "answer": h.answer, "status": h.status, "by": h.by} for h in self.held]
        return {"sound": self.sound, "edits": rows, "repaired": [{"edit": n, "exact": exact} for n, exact in self.repaired]}


def check(ledger: LedgerState, repair: bool, progress: Progress | None) -> CheckResult:
    repaired = _repair(ledger, progress) if repair else ()
    with ledger.database.read_transaction() as view:
        entries, edits = view.entries(), view.edits()
    asked = [(edit, request) for edit in edits for request in edit.requests]
    broken = {e.id for e in entries if e.stored and ledger.damaged(e.id)}
    if broken & {e.id for e in active_patches(entries)}:
        return CheckResult(tuple(EditStatus(e.number, r, None, "damaged" if e.patch in broken else "unknown") for e, r in asked), repaired)
    stack, held = ledger.stack(), []
    answers = wanted.ask(ledger.lm, [(r.prompt, stack, r.target) for _, r in asked], short=True)
    for i, ((edit, request), answer) in enumerate(zip(asked, answers, strict=True)):
        if edit.patch in broken:  # it stands aside: the answer is what it was
            status, by = "damaged", None
        elif answer.as_wanted:
            status, by = "right", None
        else:
            status, by = _since(ledger, unmerged(entries), edit, request)
        held.append(EditStatus(edit.number, request, answer.text, status, by))
        if progress is not None:
            progress("edits asked", i + 1, len(asked))
    return CheckResult(tuple(held), repaired)


def _since(ledger: LedgerState, entries: Entries, edit: Edit, request: EditRequest) -> tuple[str, int | None]:
    """(status, the edit that broke it) of a request that is wrong now."""
    places = [e for e in entries if e.edit is not None]
    low = next(i for i, e in enumerate(places) if e.edit == edit.number)
    high = len(places) - 1

    def right(last: int) -> bool:
        part = tuple(e for e in entries if e.place <= places[last].place)
        (answer,) = wanted.ask(ledger.lm, [(request.prompt, ledger.load(ledger.running(part)), request.target)], short=True)
        return answer.as_wanted

    try:
        if not right(low):
            return "never", None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if right(middle) else (low, middle)
    except (LedgerError, PatchError):  # a state that compact has dropped
        return "wrong", None
    return "broken", places[high].edit


def _repair(ledger: LedgerState, progress: Progress | None) -> tuple[tuple[int, bool], ...]:
    """Damaged folders made again from the record: how, on what and from what requests is all there."""
    out = []
    with ledger.transaction() as writer:
        broken = [e for e in writer.entries() if e.stored and ledger.damaged(e.id)]
        event = writer.note("repair", ledger.author, "", {}) if broken else 0
        merges = [e for e in broken if e.edit is None]
        writer.take(merges, event)  # what they hold runs again
        alone = SingleEditReplayer(ledger.lm, writer)
        for i, entry in enumerate(e for e in broken if e.edit is not None):
            out.append((entry.edit or 0, _made_again(ledger, writer, entry, event, alone)))
            if progress is not None:
                progress("patches made again", i + 1, len(broken))
        if broken:
            writer.detail(event, {"edits": [n for n, _ in out], "exact": [exact for _, exact in out], "merges": [e.id for e in merges]})
    return tuple(out)


def _made_again(ledger: LedgerState, writer: Writer, entry: Entry, event: int, alone: SingleEditReplayer) -> bool:
    """Whether it is the same patch, bit for bit.  Another (another machine, other threads) takes its place if no patch holds it."""
    edit = writer.edit(entry.edit or 0)
    if edit.alone:
        patch = alone.again(edit)
    else:
        standing: dict[int | None, Entry] = {e.edit: e for e in writer.entries() if e.edit is not None}
        before = tuple(e for e in writer.entries(entry.since) if e.place < entry.place)
        # One that was not made again bit for bit, now or in an earlier repair, stays damaged: what took its place stands in.
        whole = tuple(standing.get(e.edit, e) if ledger.damaged(e.id) else e for e in before)
        on = ledger.load(ledger.running(unmerged(whole)))
        (patch,) = ConfiguredEditor.again(ledger.lm, edit).make(ledger.lm, edit.requests, "continual", on)
    if patch.id != entry.id:
        now = writer.entries()
        held = holders(now, [entry.id])
        if later := [e.edit for e in held if e.edit is not None]:
            raise LedgerError(
                f"edit {edit.number} cannot be made again bit for bit here, and edit {later[0]} holds it; bring its folder back from a "
                f"copy, or `errata ledger undo {edit.number} --remake`"
            )
        writer.take([of_edit(now, edit.number), *held], event)
    ledger.patch_store.save([patch])
    writer.add_patch(patch.id, patch.method, patch.replaces, patch.parameters)
    if patch.id != entry.id:
        writer.put(patch.id, edit.number, event, entry.place)
    return patch.id == entry.id
