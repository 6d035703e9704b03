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

_OPEN, _SHUT = 2.0, -6.0  # logits: a gate of 0.88, and of 0.0025
_RIDGE = 0.03  # λ as a part of the mean |x|², which is d
_SPREAD = 0.1  # of the random start, which stays between the bases of a patch
_EPS = 1e-6


def ridge_gates(training: Any) -> dict[int, dict[int, Tensor]]:
    """{problem: {block: v [d]}} of the problems that say what should stay (``contrast``, ``unrelated``)."""
    last = training.editor.last
    stays = training.irrelevant_states(last)
    if stays is None:
        return {}
    shut, there, theirs = stays[0], stays[1].squeeze(-1), stays[2]
    starts = [max(0, e.prompt_length - last) + known for e, known in zip(training.encoded, training.knows.tolist(), strict=True)]
    own, text = training.states_from(training.encoded, starts)
    ends = torch.cat([text.diff() > 0, text.new_ones(1, dtype=torch.bool)])  # the target's last token: what follows is the model's again
    out: dict[int, dict[int, Tensor]] = {}
    for place, problem in enumerate(theirs.tolist()):
        mine, kept = training.owner[text] == problem, there[place]
        wanted = torch.cat([~ends[mine], ends.new_zeros(int(kept.sum()))])
        out[problem] = {b: _solve(torch.cat([own[b][mine], shut[b][place, kept]]), wanted) for b in training.blocks}
    return out


def _solve(h: Tensor, wanted: Tensor) -> Tensor:
    """v [d] from states h [n, d], by the dual: n is a hundred or so, d may be thousands."""
    x = h.double()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS)
    y = torch.where(wanted, _OPEN, _SHUT).double()
    weight = torch.where(wanted, 1 / wanted.sum(), 1 / (~wanted).sum().clamp_min(1)).double()
    gram = x @ x.T + torch.diag(_RIDGE * x.square().sum(-1).mean() / (weight * len(y) / 2))
    v: Tensor = x.T @ torch.linalg.solve(gram, y)
    return v.to(h)


def set_gates(params: Mapping[str, Tensor], found: Mapping[int, Mapping[int, Tensor]], blocks: Sequence[int]) -> dict[str, Tensor]:
    """Parameters [E, blocks, …] with the gates' V [E, blocks, r, d] about these directions."""
    if not found:
        return dict(params)
    gates = params["V"].clone()
    for problem, own in found.items():
        for i, block in enumerate(blocks):
            gates[problem, i] = gates[problem, i] * _SPREAD + own[block]
    return {**params, "V": gates}
