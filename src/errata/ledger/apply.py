"""Edits made now, and saved patches brought in; and what is odd about requests, looked for before any of them is edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from errata.core.patch import Patch
from errata.errors import ConfigError, LedgerError
from errata.ledger import findings
from errata.ledger.database import Edit, Writer
from errata.ledger.editors import MODES, ConfiguredEditor, Progress
from errata.ledger.stacks import holders, unmerged
from errata.ledger.state import LedgerState, as_text
from errata.request import EditRequest


def iter_apply(
    ledger: LedgerState,
    requests: Sequence[EditRequest],
    *,
    method: str = "baft",
    settings: dict[str, Any] | None = None,
    mode: str = "single",
    size: int | None = None,
    reason: str = "",
    force: bool = False,
    progress: Progress | None = None,
    losses: Callable[[float], None] | None = None,
) -> Iterator[list[Edit]]:
    """Make edits now; yields those of each transaction once they are on the disk.

    mode   "single": each alone on the bare base, so that any can be taken back as if it had never been; "continual": one after
           another on what is live; "batched": joint edits of ``size``
    force  go on although a fact is there already, contradicts a live edit or is known to the model (`errata.ledger.findings`)
    losses told the mean loss after each step of training
    """
    if mode not in MODES or (size is not None and size < 1):
        raise ConfigError(f"mode is one of {', '.join(MODES)} and size at least 1, not {mode!r} and {size}")
    if not requests:
        raise ConfigError("no request to apply")
    as_text("reason", reason)
    maker = ConfiguredEditor.new(ledger.lm, method, settings or {}, progress)
    own: set[int] = set()
    if not force:
        findings.raise_on_findings(find_oddities(ledger, requests))
    step = MODES[mode] if size is None or mode != "batched" else size
    for start in range(0, len(requests), step):
        part = list(requests[start : start + step])
        with ledger.transaction() as writer:
            if not force:  # what another wrote since
                others = [e for e in writer.edits() if e.number not in own]
                findings.raise_on_findings(list(findings.find_conflicts(part, others)))
            on = () if mode == "single" else ledger.load(ledger.running(unmerged(writer.entries())))
            patches = maker.make(ledger.lm, part, mode, on, progress, losses)
            members = [[r] for r in part] if mode == "single" else [part]
            made = _put(ledger, writer, list(zip(patches, members, strict=True)), maker, mode == "single", reason)
        own |= {e.number for e in made}
        if progress is not None:
            progress("edits", start + len(part), len(requests))
        yield made


def apply_patches(ledger: LedgerState, patches: Sequence[Patch], reason: str, force: bool) -> list[Edit]:
    """Saved patches, in order, in one transaction.  One that is live already and damaged on the disk is put right."""
    if not patches:
        raise ConfigError("no patch to apply")
    as_text("reason", reason)
    out: list[Edit] = []
    with ledger.transaction() as writer:
        standing = {e.id: e.edit for e in writer.entries()}
        for patch in patches:
            ledger.lm.check(patch)
        repaired = [p for p in patches if p.id in standing and ledger.damaged(p.id)]
        ledger.patch_store.save(repaired)
        if repaired:
            writer.note("repair", ledger.author, reason, {"patches": [p.id for p in repaired]})
            out += [writer.edit(n) for p in repaired if (n := standing[p.id]) is not None]
        new = [p for p in patches if p not in repaired]
        pairs = _with_added(writer, new)
        if not force:
            findings.raise_on_findings(find_oddities(ledger, [r for _, requests in pairs for r in requests]) if pairs else [])
        out += _put(ledger, writer, pairs, None, False, reason) if pairs else []
    return out


def find_oddities(ledger: LedgerState, requests: Sequence[EditRequest]) -> list[findings.Finding]:
    """What is odd about requests, against what is live now."""
    with ledger.database.read_transaction() as view:
        live_edits = view.edits()
    found = list(findings.find_conflicts(requests, live_edits))
    seen = {f.request.id for f in found}
    rest = [r for r in requests if r.id not in seen]
    return found + (list(findings.known(ledger.lm, rest, ledger.stack())) if rest else [])


def _put(
    ledger: LedgerState,
    writer: Writer,
    pairs: Sequence[tuple[Patch, Sequence[EditRequest]]],
    maker: ConfiguredEditor | None,
    alone: bool,
    reason: str,
) -> list[Edit]:
    """Save patches, then write their edits down; ``maker`` None: they were brought in."""
    entries = writer.entries()
    for i, (patch, requests) in enumerate(pairs):
        if patch.id in {e.id for e in entries} | {p.id for p, _ in pairs[:i]}:
            raise LedgerError(f"patch {patch.id} ({requests[0].prompt!r} …) is live already; nothing was changed")
        if holders(entries, [patch.id]) or any(patch.id in p.replaces for p, _ in pairs[:i]):
            raise LedgerError(f"patch {patch.id} would change nothing: one before it went on from it and holds it already")
    ledger.patch_store.save([p for p, _ in pairs])
    event = writer.note("apply", ledger.author, reason, {})
    numbers = []
    for patch, requests in pairs:
        method, settings = (patch.method, None) if maker is None else (maker.name, maker.settings)
        writer.add_patch(patch.id, patch.method, patch.replaces, patch.parameters)
        numbers.append(writer.add_edit(requests, method, settings, alone, event))
        writer.put(patch.id, numbers[-1], event)
    writer.detail(event, {"edits": numbers, "patches": [p.id for p, _ in pairs]})
    return [writer.edit(n) for n in numbers]


def _with_added(writer: Writer, patches: Sequence[Patch]) -> list[tuple[Patch, list[EditRequest]]]:
    """Each with its requests beyond those that what it replaces has brought: live edits, and patches before it."""
    brought = {e.id: list(writer.edit(e.edit).requests) for e in writer.entries() if e.edit is not None}
    out = []
    for patch in patches:
        held = {r.id for old in patch.replaces for r in brought.get(old, [])}
        brought[patch.id] = [r for r in patch.requests if r.id not in held] or list(patch.requests)
        out.append((patch, brought[patch.id]))
    return out
