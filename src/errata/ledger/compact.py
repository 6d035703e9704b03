"""Fewer and smaller files: weight-like patches that follow each other as one, folders nobody needs gone; the history stays.

A merge stands on the stack above the patches it holds, which stand aside; an edit inside it can still be undone (the merge leaves, the
others run again).  Patches with running state (AlphaEdit's keys) are not merged: later edits go on from that state.

Folders of edits that were undone, or made again, go.  ``lean`` also drops those of patches that stand aside; undoing an edit inside a
chain or merge then has to make the others again (``--remake``), and old states can no longer be run.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from errata.core.bank import active_patches
from errata.core.patch import WEIGHT_LIKE, Patch
from errata.core.weights import merge as merged
from errata.ledger.stacks import Entries, Entry, unmerged
from errata.ledger.state import LedgerState


@dataclass(frozen=True)
class CompactResult:
    """merges: (patch, the edits in it) made now; dropped: ids of patches whose folders went; freed: bytes."""

    merges: tuple[tuple[str, tuple[int, ...]], ...]
    dropped: tuple[str, ...]
    freed: int


def compact(ledger: LedgerState, merge: bool, lean: bool, reason: str) -> CompactResult:
    with ledger.transaction() as writer:
        entries, made = writer.entries(), []
        event = writer.note("compact", ledger.author, reason, {})
        if merge:
            plain = unmerged(entries)
            runs = [(run, merged(patches)) for run, patches in _runs(ledger, plain)]
            new = {patch.id for _, patch in runs}
            writer.take([e for e in entries if e not in plain and e.id not in new], event)
            for run, patch in runs:
                if patch.id not in {e.id for e in entries}:
                    ledger.patch_store.save([patch])
                    writer.add_patch(patch.id, patch.method, patch.replaces, patch.parameters)
                    writer.put(patch.id, None, event, run[-1].place)
                    made.append((patch.id, tuple(e.edit for e in plain if e.id in patch.replaces and e.edit is not None)))
        standing = writer.entries()
        needed = {e.id for e in (active_patches(standing) if lean else standing)}
        dropped = sorted(writer.stored() - needed)
        writer.drop_patches(dropped)
        freed = sum(f.stat().st_size for name in dropped for f in (ledger.patch_store.folder / name).glob("*"))
        writer.detail(event, {"merges": [{"patch": p, "edits": list(edits)} for p, edits in made], "dropped": dropped, "lean": lean})
    ledger.recover()  # folders go after the commit that says so
    return CompactResult(tuple(made), tuple(dropped), freed)


def _runs(ledger: LedgerState, entries: Entries) -> list[tuple[list[Entry], tuple[Patch, ...]]]:
    """Running patches that follow each other and only change weights, two or more."""
    running = ledger.running(entries)
    pairs = list(zip(running, ledger.load(running), strict=True))
    out = []
    for fits, group in groupby(pairs, lambda pair: _mergeable(pair[1])):
        members = list(group)
        if fits and len(members) > 1:
            out.append(([e for e, _ in members], tuple(p for _, p in members)))
    return out


def _mergeable(patch: Patch) -> bool:
    return bool(patch.ops) and not patch.state and all(op.kind in WEIGHT_LIKE for op in patch.ops)
