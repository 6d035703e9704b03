"""Ledgers of the tiny trained llama: quick edits, and states compared by logits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from families import SENTENCES
from tiny import EDITS

from errata.core.model import LM
from errata.ledger import Ledger
from errata.request import EditRequest

SETTINGS: dict[str, Any] = {"preset": "published", "rank": 2, "lr": 0.02, "steps": 12, "end": "."}
WEIGHTS: dict[str, Any] = {"layers": [1, 2], "steps": 10}  # of ft-m
PROMPTS = [prompt for prompt, _ in SENTENCES]
REQUESTS = [EditRequest(p, t, s) for p, t, s in EDITS]


def logits(lm: LM, stack: Any = ()) -> torch.Tensor:
    """Of every sentence, under a stack."""
    return lm.logits(lm.batch(lm.encode(PROMPTS)), stacks=[tuple(stack)], rows=[0] * len(PROMPTS))


def same(ledger: Ledger, stack: Any) -> bool:
    """What is live gives the logits of ``stack``, bit for bit."""
    return torch.equal(logits(ledger.lm, ledger.stack()), logits(ledger.lm, stack))


def names(ledger: Ledger) -> list[str]:
    """The patch folders that are there."""
    return sorted(p.name for p in ledger.patch_store.folder.iterdir())


def copied(folder: Path, lm: LM, to: Path) -> Ledger:
    """A ledger of one's own with what another holds."""
    return Ledger.open(shutil.copytree(folder, to / "book"), lm)
