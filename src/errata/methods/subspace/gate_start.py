"""Where a gate begins: at the ridge solution that is open on the edit and shut on what should stay.

    v = argmin_v Σ_i c_i (v·x_i − y_i)² + λ |v|²,     x_i = h_i / rms(h_i) [d],   y_i = `_OPEN` on the edit, `_SHUT` elsewhere

h_i are the base's states at the positions an edit touches; on the edit, from its subject's last token on (what stands before is the same
whoever is asked about) to the target's last but one (at its last the gate is shut: what follows is the model's own again).  c_i gives both
sides the same weight.

A random start leaves every gate half open, and some dozens of steps at a small rate only close it in part: what is written through gates of
a tenth is then large, and a gate of a twenty-fifth on a neighbour lets a third of it through.  From the ridge solution the gate has only to
be kept, and the rest is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from errata.core.tail import capture

_OPEN, _SHUT = 2.0, -6.0  # logits: a gate of 0.88, and of 0.0025
_RIDGE = 0.03  # λ as a part of the mean |x|², which is d
_SPREAD = 0.1  # of the random start, which stays between the bases of a patch
_EPS = 1e-6


def ridge_gates(training: Any) -> dict[int, dict[int, Tensor]]:
    """{problem: {block: v [d]}} of the problems that say what should stay (``contrast``, ``unrelated``)."""
    stays = training.irrelevant_states(training.editor.last)
    if stays is None:
        return {}
    shut, there, theirs = stays[0], stays[1].squeeze(-1), stays[2]
    own, position, lengths = capture(training.lm, training.encoded, training.blocks, training.on)
    first = (lengths - training.editor.last).clamp_min(0) + training.knows
    ends = position == position.amax(1, keepdim=True)  # the target's last token: what follows it is the model's own again
    here = (position >= 0) & (position >= first[:, None])
    out: dict[int, dict[int, Tensor]] = {}
    for problem in theirs.unique().tolist():
        edit, other = training.owner == problem, theirs == problem
        kept, moved = there[other], here[edit]
        wanted = torch.cat([~ends[edit][moved], torch.zeros(int(kept.sum()), dtype=torch.bool, device=here.device)])
        out[problem] = {b: _solve(torch.cat([own[b][edit][moved].to(shut[b]), shut[b][other][kept]]), wanted) for b in training.blocks}
    return out


def _solve(h: Tensor, wanted: Tensor) -> Tensor:
    """v [d] from states h [n, d], by the dual: n is a hundred or so, d may be thousands."""
    x = h.to(torch.promote_types(torch.float32, h.dtype)).double()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS)
    y = torch.where(wanted, _OPEN, _SHUT).double()
    weight = torch.where(wanted, 1 / wanted.sum(), 1 / (~wanted).sum().clamp_min(1)).double()
    gram = x @ x.T + torch.diag(_RIDGE * x.square().sum(-1).mean() / (weight * len(y) / 2))
    v: Tensor = x.T @ torch.linalg.solve(gram, y)
    return v.to(torch.promote_types(torch.float32, h.dtype))


def set_gates(params: Mapping[str, Tensor], found: Mapping[int, Mapping[int, Tensor]], blocks: Sequence[int]) -> dict[str, Tensor]:
    """Parameters [E, blocks, …] with the gates' V [E, blocks, r, d] about these directions."""
    if not found:
        return dict(params)
    gates = params["V"].clone()
    for problem, own in found.items():
        for i, block in enumerate(blocks):
            gates[problem, i] = gates[problem, i] * _SPREAD + own[block]
    return {**params, "V": gates}
