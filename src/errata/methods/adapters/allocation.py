"""AdaLoRA's budget: which of the triplets of all linears stay, step by step (Zhang et al., ICLR 2023, §3.2 and §3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class RankAllocator:
    """The budget of each of E problems, called after each update t = 1 … T (``steps``): a cut zeroes E of the least important triplets
    (row of A, number of E, column of B), of all linears together.

    Importance of a number w is s̄ · ū, with s = |w ∂loss/∂w| (w after the update, the gradient from before it, as in PEFT),
    s̄ ← β1 s̄ + (1 − β1) s,   ū ← β2 ū + (1 − β2) |s − s̄|;  of a triplet: that of its E plus the means over its row and its column.
    Budget: n r up to t_init; n r* + (n r − n r*) (1 − (t − t_init)/(T − t_final − t_init))³, rounded down, every delta_t; n r* from
    T − t_final on, where the choice is final.
    """

    editor: Any  # an `errata.methods.adapters.adalora.AdaLoRA`
    sites: int
    alive: Tensor | None = None
    mean: dict[str, Tensor] = field(default_factory=dict)  # s̄ of the problems that run [e, S, …]
    spread: dict[str, Tensor] = field(default_factory=dict)  # ū
    cut: dict[str, Tensor] = field(default_factory=dict)  # of each E [e, S, R]: cut for good

    def budget(self, step: int) -> int | None:
        """How many triplets of a problem are to be left after this update; None: no cut now."""
        e, end = self.editor, self.editor.steps - self.editor.t_final
        if step <= e.t_init or (step % e.delta_t and step < end):
            return None
        full, least = e.rank * self.sites, e.target_rank * self.sites
        return int((full - least) * (1 - (step - e.t_init) / (end - e.t_init)) ** 3 + least)

    def __call__(self, p: Mapping[str, Tensor], gradients: Mapping[str, Tensor], alive: Tensor, step: int) -> None:
        end = self.editor.steps - self.editor.t_final
        self._keep(alive)
        if step > end:
            for name, cut in self.cut.items():
                p[name].masked_fill_(cut, 0.0)
            return
        if step < end:
            self._measure(p, gradients)
        left = self.budget(step)
        if left is not None:
            least = self._least(p, left)
            for name, where in least.items():
                p[name].masked_fill_(where, 0.0)
            self.cut = least if step == end else {}

    def _keep(self, alive: Tensor) -> None:
        if self.alive is not None and len(self.alive) != len(alive):
            kept = torch.isin(self.alive, alive)
            self.mean, self.spread, self.cut = ({k: t[kept] for k, t in d.items()} for d in (self.mean, self.spread, self.cut))
        self.alive = alive

    def _measure(self, p: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        b1, b2 = self.editor.beta1, self.editor.beta2
        for name, w in p.items():
            now = (w * gradients[name]).abs()
            mean, spread = (d.get(name, torch.zeros_like(now)) for d in (self.mean, self.spread))
            self.mean[name] = b1 * mean + (1 - b1) * now
            self.spread[name] = b2 * spread + (1 - b2) * (now - self.mean[name]).abs()

    def _least(self, p: Mapping[str, Tensor], left: int) -> dict[str, Tensor]:
        """For each E, which triplets are not among the ``left`` most important of their problem."""
        scores: dict[str, Tensor] = {}
        for name in p:
            part = self.mean[name] * self.spread[name]
            part = part.mean(-1) if name.startswith("A.") else part.mean(-2) if name.startswith("B.") else part
            own = f"E.{name.partition('.')[2]}"
            scores[own] = scores[own] + part if own in scores else part
        flat = torch.cat([s.flatten(1) for s in scores.values()], 1)
        drop = flat.shape[1] - left
        if not drop:
            return {name: torch.zeros_like(s, dtype=torch.bool) for name, s in scores.items()}
        threshold = flat.kthvalue(drop, 1).values[:, None, None]
        return {name: s <= threshold for name, s in scores.items()}
