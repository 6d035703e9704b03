"""Many gated edits one after another at one site, in the time of those that open.

Edits that open at their subject alone are shut on nearly every token: of a stack of a thousand a token meets one, or none.  Run one by one
they cost a thousand small products a site.  Here the gates of all are asked at once; a token whose first open edit is u is moved by u, the
gates of the edits behind u are asked again at the moved state, and so on until none opens.  What a shut gate does is nothing, so this is
what the edits do one after another:

    h_0 = h;   h_{j+1} = Φ_u(h_j),  u the first edit behind the last one that opens at h_j            until none opens

The cost is one product of the states with the keys of all gates, [M, d] × [d, N r], and a small step for each edit that opens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from errata.core.patch import Op, OpContext, Site
from errata.methods.subspace.gating import keys, move, weights_by


@dataclass
class GateChain:
    """Stands where a bank does (`errata.core.bank.Bank`).

    params   of the U distinct edits, [U, …]; keys [U, r, d]: of their gates
    place    [P, U] the place of each edit in the chain of each stack; U where a stack is without it
    rows     [B] the stack of each row, -1 for none; None: one stack serves every row
    """

    site: Site
    settings: Mapping[str, Any]
    params: Mapping[str, Tensor]
    keys: Tensor
    place: Tensor
    rows: Tensor | None = None
    patch_index: int = 0

    @classmethod
    def of(cls, columns: Sequence[Sequence[Op]], rows: Tensor | None, device: torch.device) -> GateChain:
        """A column of ops, in their order, a stack."""
        every = list({id(op): op for ops in columns for op in ops}.values())
        number = {id(op): u for u, op in enumerate(every)}
        place = torch.full((len(columns), len(every)), len(every))
        for i, ops in enumerate(columns):
            for at, op in enumerate(ops):
                place[i, number[id(op)]] = at
        params = {name: torch.stack([op.tensors[name].to(device) for op in every]) for name in every[0].tensors}
        if rows is not None:
            empty = torch.tensor([not ops for ops in columns], device=device)
            rows = torch.where(empty[rows.to(device)], -1, rows.to(device))
        settings = every[0].settings
        return cls(every[0].site, settings, params, keys(params, settings["gate"]), place.to(device), rows)

    def apply(self, x: Tensor, y: Tensor, context: OpContext) -> Tensor:
        """The site's new output; a state at which no gate opens passes through untouched, bit for bit."""
        acts = context.active(self.settings["last"]).squeeze(-1)
        if self.rows is not None:
            acts = acts & (self.rows >= 0)[:, None]
        at = acts.nonzero(as_tuple=True)
        place = self.place[self.rows[at[0]]] if self.rows is not None else self.place.expand(len(at[0]), -1)
        states, todo, end = y[at], torch.arange(len(at[0]), device=y.device), place.shape[1]
        last, moved = torch.full_like(todo, -1), False
        while True:
            due = torch.where(self._open(states[todo]) & (place[todo] > last[todo, None]), place[todo], end)
            first, edit = due.min(-1)
            opens = first < end
            if not bool(opens.any()):
                return y.index_put(at, states) if moved else y
            todo, edit, moved = todo[opens], edit[opens], True
            last = last.index_copy(0, todo, first[opens])
            states = states.index_copy(0, todo, self._moved(states[todo], edit))

    @torch.no_grad()
    def _open(self, states: Tensor) -> Tensor:
        """[m, U] whether any gate of each edit is open at each of these states [m, d]."""
        h = states.to(torch.promote_types(self.keys.dtype, states.dtype))
        w = weights_by(self.keys.flatten(0, 1), self.settings["gate"], h).unflatten(-1, self.keys.shape[:2])
        opened: Tensor = (w >= self.settings["threshold"]).any(-1)
        return opened

    def _moved(self, states: Tensor, edit: Tensor) -> Tensor:
        """These states [m, d], each moved by its edit [m]."""
        return move({k: t[edit] for k, t in self.params.items()}, self.settings, states.unsqueeze(1))[0].squeeze(1)

    def select(self, rows: Tensor) -> GateChain:
        """Of some rows of the batch, one also several times."""
        return self if self.rows is None else replace(self, rows=self.rows[rows])
