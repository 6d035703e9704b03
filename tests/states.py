"""Every state of whole texts, read in one plain pass: other ways to read them are compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.core.bank import Stack
from errata.core.families import hidden_of
from errata.core.model import LM
from errata.core.tokens import Encoded, positions


def capture(lm: LM, encoded: Sequence[Encoded], blocks: Sequence[int], on: Stack = ()) -> tuple[dict[int, Tensor], Tensor, Tensor]:
    """Block outputs {block: [B, T, D]}, position [B, T] (-1: padding) and prompt lengths [B] of rows under ``on``."""
    batch = lm.batch(encoded).to(lm.device)
    seen: dict[int, Tensor] = {}

    def keep(block: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            out = hidden_of(output).detach()
            seen[block] = out[:, -batch.ids.shape[1] :]  # context may stand in front

        return hook

    plan = lm.plan([on], None, len(encoded))
    plan.prompt_lengths = batch.prompt_lengths
    with torch.no_grad(), lm.running(plan):  # the plan's hooks run first, so what is kept is under ``on``
        handles = [lm.blocks[b].register_forward_hook(keep(b)) for b in blocks]
        try:
            lm.forward(batch.ids, batch.mask, use_cache=False, **lm.last_logits_kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return seen, positions(batch.mask), batch.prompt_lengths
