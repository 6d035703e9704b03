"""The tiny trained llama as a folder on disk, for tests that go through files and the command."""

from __future__ import annotations

from pathlib import Path

from families import lm
from transformers.utils import logging

# What makes an edit of the tiny model succeed in a fraction of a second.
QUICK = ("--set", "rank=4", "--set", "lr=0.02", "--set", "end=.")


def saved(folder: Path, family: str = "llama") -> Path:
    """Model and tokenizer in ``folder``."""
    logging.disable_progress_bar()
    model = lm(family)
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder
