"""What a patch costs to keep and to run: numbers, bytes on disk, added time a token."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from errata.core.bank import Stack
from errata.core.model import LM
from errata.core.patch import Patch


def size_on_disk(patch: Patch) -> int:
    """Bytes of the saved patch folder: its tensors, requests, settings and description."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(patch.save(Path(folder) / "patch"))
        return sum(file.stat().st_size for file in saved.iterdir())


@torch.no_grad()
def _decode(lm: LM, prompts: Sequence[str], tokens: int) -> None:
    """Exactly ``tokens`` greedy tokens a row, whatever they are, under what is attached."""
    batch = lm.batch(lm.encode(prompts)).to(lm.device)
    ids, mask, cache = batch.ids, batch.mask, None
    for _ in range(tokens):
        out = lm.forward(ids, mask, past_key_values=cache, use_cache=True, **lm.last_logits_kwargs)
        cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones((len(mask), 1))], 1)
    if lm.device.type == "cuda":
        torch.cuda.synchronize()


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
                for chunk in chunks:
                    _decode(lm, chunk, tokens)
                taken.append((time.perf_counter() - began) / (tokens * len(prompts)))
        if turn:
            seconds.append(taken)
    middle = [(statistics.median(t[i] for t in seconds), statistics.median(t[i] / t[0] for t in seconds)) for i in range(len(stacks) + 1)]
    return middle[1:]


def reset_peak(device: torch.device) -> None:
    """Begin to watch memory anew, where the system lets one (Linux; CUDA)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from what is held now
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> dict[str, int | None]:
    """Most bytes held since `reset_peak`: by this process in memory, by its tensors on a GPU (None on a CPU, or where nobody says)."""
    resident = None
    with contextlib.suppress(OSError, ValueError, IndexError):
        found = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM:")]
        resident = 1024 * int(found[0].split()[1])
    return {"resident_bytes": resident, "cuda_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}
