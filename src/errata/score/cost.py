"""What a patch costs to keep and to run: numbers, bytes on disk, added time a token."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from errata.bank import Stack
from errata.model import LM
from errata.patch import Patch


def size_on_disk(patch: Patch) -> int:
    """Bytes of the saved patch folder: its tensors, requests, settings and description."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(patch.save(Path(folder) / "patch"))
        return sum(file.stat().st_size for file in saved.iterdir())


def latency(
    lm: LM, stacks: Sequence[Stack], prompts: Sequence[str], *, tokens: int = 16, repeat: int = 5, rows: int = 1
) -> list[tuple[float, float]]:
    """(seconds a generated token, ratio to the base) of each stack: greedy decoding of ``prompts``, ``rows`` at a time, prompt included.

    Machines are noisy: base and stacks take turns within each repeat, and the ratio is the median over repeats of that repeat's
    own ratio.  What is attached to ``lm`` runs under all of them.
    """
    chunks = [list(prompts[i : i + rows]) for i in range(0, len(prompts), rows)]
    seconds: list[list[float]] = []
    for turn in range(repeat + 1):  # the first warms up
        taken = []
        for stack in ((), *stacks):
            with lm.under(*stack):  # compiled once, as where it is served
                began = time.perf_counter()
                made = sum(len(ids) for chunk in chunks for ids in lm.continuations(chunk, max_new_tokens=tokens, stop=()))
                if lm.device.type == "cuda":
                    torch.cuda.synchronize()
                taken.append((time.perf_counter() - began) / max(1, made))
        if turn:
            seconds.append(taken)
    out = []
    for i in range(1, len(stacks) + 1):
        own = sorted(t[i] for t in seconds)
        ratios = sorted(t[i] / t[0] for t in seconds)
        out.append((own[len(own) // 2], ratios[len(ratios) // 2]))
    return out
