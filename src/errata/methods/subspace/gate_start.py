"""Where a gate begins: at the ridge solution that is open on the edit and shut on what should stay.

    v = argmin_v Σ_i c_i (v·x_i − y_i)² + λ |v|²,     x_i = h_i / rms(h_i) [d],   y_i = `_OPEN` on the edit, `_SHUT` elsewhere

h_i are the base's states at the positions an edit touches, on the edit from its subject's last token on: what stands before is the same
whoever is asked about.  c_i gives both sides the same weight.  A random start leaves every gate half
open, and some dozens of steps at a small rate only close it in part: what is written through gates of a tenth is then large, and a gate of
a twenty-fifth on a neighbour lets a third of it through.  From the ridge solution the gate has only to be kept, and the rest is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from errata.core.bank import Stack
from errata.core.model import LM
from errata.core.tail import capture
from errata.methods.subspace.texts import knows_subject, ways_to_ask, what_stays
from errata.request import EditRequest

_OPEN, _SHUT = 2.0, -6.0  # logits: a gate of 0.88, and of 0.0025
_RIDGE = 0.03  # λ as a part of the mean |x|², which is d
_SPREAD = 0.1  # of the random start, which stays between the bases of a patch
_EPS = 1e-6


def ridge_gates(
    editor: Any, lm: LM, problems: Sequence[Sequence[EditRequest]], blocks: Sequence[int], on: Stack
) -> dict[int, dict[int, Tensor]]:
    """{problem: {block: v [d]}} of the problems that say what should stay (``contrast``, ``unrelated``)."""
    edits = [(i, r, text) for i, own in enumerate(problems) for r in own for text in ways_to_ask(lm, r, editor.prefixes)]
    rows: list[tuple[int, str, str, int | None]]
    rows = [(i, text, r.target + editor.end, knows_subject(lm, r, text)) for i, r, text in edits]
    rows += [(i, *pair, None) for i, own in enumerate(problems) for pair in what_stays(lm, own, editor.prefixes)]
    out: dict[int, dict[int, Tensor]] = {}
    for problem in range(len(problems)):
        mine = [row for row in rows if row[0] == problem]
        if all(start is not None for *_, start in mine):
            continue
        encoded = lm.encode([text for _, text, _, _ in mine], [answer for _, _, answer, _ in mine])
        states, position, lengths = capture(lm, encoded, blocks, on)
        where = (position >= 0) & (position >= lengths[:, None] - editor.last)
        edited = torch.tensor([row[3] is not None for row in mine], device=where.device)[:, None].expand_as(where)
        where &= position >= torch.tensor([row[3] or 0 for row in mine], device=where.device)[:, None]
        out[problem] = {b: _solve(h[where], edited[where]) for b, h in states.items()}
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
