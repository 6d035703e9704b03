"""The live stack for others: patch folders in their order, the requests as JSON Lines, and a LoRA adapter where all only change weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from errata import storage
from errata.errors import ErrataError, LedgerError, StorageError
from errata.request import as_lines

if TYPE_CHECKING:
    from errata.ledger.book import Ledger

REQUESTS, ADAPTER = "requests.jsonl", "lora"


@dataclass(frozen=True)
class Exported:
    """adapter: where the LoRA adapter is; why_not: why there is none."""

    folder: Path
    patches: tuple[str, ...]
    requests: int
    adapter: Path | None
    why_not: str


def export(ledger: Ledger, out: Path, rank: int | None) -> Exported:
    from errata.export import export_lora

    with ledger.record.reading() as view:
        entries, edits = view.entries(), view.edits()
    stack = ledger.load(ledger.running(entries))
    if not stack:
        raise LedgerError("no edit is live; there is nothing to export")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out} exists already; it is left alone, give another name")
    requests = list({r.id: r for e in edits for r in e.requests}.values())
    head = {"model": ledger.meta("model"), "base": ledger.meta("base"), "patches": [{"id": p.id, "edits": len(p.requests)} for p in stack]}
    adapter, why = out / ADAPTER, ""
    with storage.replacing(out) as temporary:
        for patch in stack:
            patch.save(temporary / patch.id)
        storage.write(temporary / storage.INDEX, (json.dumps(head, ensure_ascii=False, indent=1) + "\n").encode())
        storage.write(temporary / REQUESTS, as_lines(requests).encode())
        try:
            export_lora(ledger.lm, stack, temporary / ADAPTER, rank=rank)
        except StorageError:
            raise
        except ErrataError as error:  # a method that is no change of weights, or a dense one too large
            why = str(error)
    return Exported(out, tuple(p.id for p in stack), len(requests), None if why else adapter, why)
