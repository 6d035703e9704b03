"""The live stack for others: patch folders in their order, the requests as JSON Lines, a LoRA adapter where all only change weights, and
on request llama.cpp's adapter and a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from errata import storage
from errata.errors import ErrataError, LedgerError, StorageError
from errata.ledger.state import LedgerState
from errata.request import to_jsonl

REQUESTS, _ADAPTER, _CHECKPOINT, _GGUF = "requests.jsonl", "lora", "checkpoint", "edits.gguf"


@dataclass(frozen=True)
class ExportResult:
    """adapter: where the LoRA adapter is; why_not: why there is none; rank: of the adapter; objections: what vLLM would have against
    it (see `errata.export.engines`); checkpoint: where the base with the edits in its weights is, gguf: llama.cpp's adapter, if they were
    asked for.
    """

    folder: Path
    patches: tuple[str, ...]
    requests: int
    adapter: Path | None
    why_not: str
    rank: int = 0
    objections: tuple[str, ...] = ()
    checkpoint: Path | None = None
    gguf: Path | None = None


def export(ledger: LedgerState, out: Path, rank: int | None, every_block: bool, checkpoint: bool, gguf: bool) -> ExportResult:
    """With ``checkpoint`` or ``gguf``, `PatchError` where an edit is no change of weights; without them the adapter is left out and the
    reason told."""
    from errata.export import bake, export_gguf, export_lora
    from errata.export.engines import objections

    with ledger.database.read_transaction() as view:
        entries, edits = view.entries(), view.edits()
    stack = ledger.load(ledger.running(entries))
    if not stack:
        raise LedgerError("no edit is live; there is nothing to export")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out} exists already; it is left alone, give another name")
    requests = list({r.id: r for e in edits for r in e.requests}.values())
    head = {"model": ledger.meta("model"), "base": ledger.meta("base"), "patches": [{"id": p.id, "edits": len(p.requests)} for p in stack]}
    adapter, why, most, against = out / _ADAPTER, "", 0, []
    with storage.atomic_folder(out) as temporary:
        for patch in stack:
            patch.save(temporary / patch.id)
        storage.write(temporary / storage.INDEX, (json.dumps(head, ensure_ascii=False, indent=1) + "\n").encode())
        storage.write(temporary / REQUESTS, to_jsonl(requests).encode())
        if checkpoint:
            bake(ledger.lm, stack, temporary / _CHECKPOINT)
        if gguf:
            export_gguf(ledger.lm, stack, temporary / _GGUF, rank=rank)
        try:
            report = export_lora(ledger.lm, stack, temporary / _ADAPTER, rank=rank, every_block=every_block)
            most = max(w.rank for w in report.linears)
            against = objections(temporary / _ADAPTER, ledger.lm.hf.config.model_type)
        except StorageError:
            raise
        except ErrataError as error:  # a method that is no change of weights, or a dense one too large
            why = str(error)
    more = (out / _CHECKPOINT if checkpoint else None, out / _GGUF if gguf else None)
    return ExportResult(out, tuple(p.id for p in stack), len(requests), None if why else adapter, why, most, tuple(against), *more)
