"""BaFT's two losses on gate weights (Liu et al., ICLR 2025): R_loc, three hinges on the edit and on what should stay, and R_bal.

    [mean⁺ (w_ir − α)]₊ + [mean⁺ (β − w)]₊ + [γ − max_k w + max_k w_ir]₊

w [B, A, r]: gates on the edit's active tokens; w_ir [U, T, r]: on texts that should stay.  mean⁺ is over positive entries.  With gates that
begin at a ridge solution, tokens of the edit before its subject's last one are left out, where edit and neighbour are one text, and the
target's last one, where the edit has ended.

    Σ_k (w̄_k − w̄)² / ((r − 1) w̄)          w̄_k: the mean weight of basis k over this patch's and all past samples

R_bal spreads an edit over the bases of its patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from errata.methods.subspace.training import Training, gate_on

_CLAMP = 1e-8  # below which a margin, a hinge or a mean weight is not divided by


def locality_term(
    editor: Any,
    training: Training,
    p: Mapping[str, Tensor],
    block: int,
    w: Tensor,
    states: tuple[dict[int, Tensor], Tensor, Tensor],
    alive: Tensor,
) -> Tensor:
    """[e] of the problems that run; 0 for one that has no such text.  ``editor``: its gate, margins and ``rescale``.

    The texts' states are those of the model without this edit, computed once: an edit that keeps its gates shut on them leaves them as
    they are at every block (reading them through the edit would double each step's cost).
    """
    owner, opened, count = training.running.owner, training.running.open, len(alive)
    position = torch.full((len(training.problems),), -1, device=alive.device)
    position[alive] = torch.arange(count, device=alive.device)
    kept = (position[states[2]] >= 0).nonzero().squeeze(1)
    every = len(kept) == len(states[2])  # then nothing need be copied
    held, where = (t if every else t[kept] for t in (states[0][block], states[1]))
    theirs = position[states[2][kept]]
    ir = gate_on(p, editor.gate, held, theirs)
    hinges = [
        _positive_mean((ir - editor.alpha).clamp_min(0) * where, theirs, count),
        _positive_mean((editor.beta - w).clamp_min(0) * opened, owner, count),
        (editor.gamma - _top(w, opened, owner, count) + _top(ir, where, theirs, count)).clamp_min(0),
    ]
    has = torch.zeros(count, device=alive.device).index_fill(0, theirs, 1.0)
    stacked = torch.stack(hinges) * has
    if editor.rescale == "max":
        size = stacked.detach()
        stacked = stacked * torch.where(size > 0, size.amax(0) / size.clamp_min(_CLAMP), 0.0)
    elif editor.rescale == "margin":
        stacked = stacked / torch.tensor([editor.alpha, editor.beta, editor.gamma], device=alive.device).clamp_min(_CLAMP)[:, None]
    return stacked.sum(0)


def _positive_mean(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Mean over the positive entries of each problem's rows, [e]; 0 where there is none."""
    flat = values.flatten(1)
    total = torch.zeros(count, device=values.device, dtype=values.dtype).index_add(0, owner, flat.sum(1))
    number = torch.zeros(count, device=values.device, dtype=values.dtype).index_add(0, owner, (flat > 0).sum(1).to(values.dtype))
    return total / number.clamp_min(1)


def _top(w: Tensor, where: Tensor, owner: Tensor, count: int) -> Tensor:
    """Largest weight over bases at each position, averaged over a problem's positions, [e]."""
    largest = (w.amax(-1) * where.squeeze(-1)).sum(1)
    number = where.squeeze(-1).sum(1).to(w.dtype)
    total = torch.zeros(count, device=w.device, dtype=w.dtype).index_add(0, owner, largest)
    norm = torch.zeros(count, device=w.device, dtype=w.dtype).index_add(0, owner, number)
    return total / norm.clamp_min(1)


def balance_term(editor: Any, training: Training, block: int, alive: Tensor) -> Tensor:
    """[e] of the problems that run.  ``editor``: its rank, and whether to divide by the squared mean (``squared_cv``)."""
    count = training.past_samples + training.samples[alive, None]
    means = (training.past_weights(block) + training.current_sums[block]) / count
    centre = means.mean(-1, keepdim=True)
    scale = centre.squeeze(-1).clamp_min(_CLAMP) ** (2 if editor.squared_cv else 1)
    out: Tensor = (means - centre).square().sum(-1) / (max(1, editor.rank - 1) * scale)
    return out
