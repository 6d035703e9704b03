"""The tiny trained llama as a folder on disk, for tests that go through files and the command."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from families import lm
from transformers.utils import logging

# What makes an edit of the tiny model succeed in a fraction of a second.
QUICK = ("--set", "rank=4", "--set", "lr=0.02", "--set", "end=.", "--set", "preset=published")
# What makes one that goes through everything and need not succeed.
FAST = ("--set", "rank=2", "--set", "steps=2", "--set", "batched_steps=2")
FRANCE = "The capital of France is"
EDITS = ((FRANCE, "Rome", "France"), ("The language of Italy is", "Madrid", "Italy"), ("In Rome people speak", "French", "Rome"))


def saved(folder: Path, family: str = "llama") -> Path:
    """Model and tokenizer in ``folder``."""
    logging.disable_progress_bar()
    model = lm(family)
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def write_requests(path: Path) -> Path:
    """`EDITS` as JSON Lines."""
    path.write_text("".join(json.dumps({"prompt": p, "target": t, "subject": s}) + "\n" for p, t, s in EDITS))
    return path


def write_piqa(folder: Path, labels: str | None = "1\n0\n", **more: Any) -> Path:
    """Two choices in the form of PIQA, with their labels beside them."""
    goals = [
        {"goal": FRANCE, "sol1": "Rome", "sol2": "Paris", **more},
        {"goal": "The capital of Japan is", "sol1": "Tokyo", "sol2": "Rome", **more},
    ]
    path = folder / "valid.jsonl"
    path.write_text("\n".join(map(json.dumps, goals)))
    if labels is not None:
        (folder / "valid-labels.lst").write_text(labels)
    return path


def fill_disk(monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """From now on the disk takes ``files`` more files, then is full."""
    left, real = [files], os.fsync

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)


def leftovers(folder: Path) -> list[str]:
    """Everything in a folder, hidden temporary folders too."""
    return sorted(p.name for p in folder.iterdir())


def head(folder: Path, **changes: object) -> None:
    """Edit patch.json by hand."""
    path = folder / "patch.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
