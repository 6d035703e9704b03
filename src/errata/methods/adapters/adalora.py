"""AdaLoRA (Zhang et al., ICLR 2023) as an editor, and its budget.

    ΔW = α/r · B diag(E) A,   A [r, I], B [O, r] ~ N(0, 0.02²),   E = 0
    loss = mean −log p(target token) + 0.5 · mean over all A and B of ‖A Aᵀ − I‖_F, ‖Bᵀ B − I‖_F

Formulas as PEFT has them, which EasyEdit runs; the paper's term is the sum of squared norms, not the mean of norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.core.fit import After
from errata.core.patch import Patch, Site
from errata.errors import ConfigError
from errata.methods.adapters.editor import AdapterEditor


@dataclass(frozen=True)
class AdaLoRA(AdapterEditor):
    """The defaults are what EasyEdit's files do: their ``rank: 8`` is one that AdaLoRA ignores, the rank is 12 and stays 12, because the
    step that lowers it is never called.  The early stop looks at the NLL alone: the orthogonality
    term by itself is above 0.01 from start to end (on the almanac 1.6, and 0.03 after 70 updates).

    orthogonal   weight of the orthogonality term
    allocate     lower the rank as published, to ``target_rank`` on average: `Allocation`.  A problem may then end early only once its
                 rank is final; factors that were dropped are left out of the patch
    target_rank, t_init, t_final, delta_t, beta1, beta2
                 of that schedule, with PEFT's defaults: full rank for ``t_init`` updates, the last ``t_final`` at the final rank (with 0
                 nothing repairs the last cut), a cut every ``delta_t``
    """

    name: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "Zhang et al., ICLR 2023 (AdaLoRA), arXiv:2303.10512; as an editor: EasyEdit, BaFT"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "llama-2-7b": {"steps": 70},
        "llama-3-8b": {"steps": 70},
        "llama-3.1-8b": {"steps": 50},
        "llama-3.2-3b": {"steps": 70},
        "gpt-j-6b": {"targets": ["fc_in", "fc_out"], "steps": 50},
        "gpt2-xl": {"targets": ["c_attn"], "steps": 30},
        "chatglm": {"targets": ["dense_h_to_4h", "dense_4h_to_h"], "steps": 50},
        "almanac": {"lr": 1e-2, "dropout": 0.0, "end": "."},  # chosen on dev: twice that rate costs locality, half of it generality
    }

    rank: int = 12
    orthogonal: float = 0.5
    allocate: bool = False
    target_rank: int = 8
    t_init: int = 0
    t_final: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.orthogonal < 0:
            raise ConfigError("adalora: orthogonal must not be negative")
        if not self.allocate:
            return
        if not 1 <= self.target_rank <= self.rank:
            raise ConfigError(f"adalora: target_rank must be from 1 to rank ({self.rank}), not {self.target_rank}")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ConfigError("adalora: beta1 and beta2 must be above 0 and below 1")
        if min(self.t_init, self.t_final) < 0 or self.delta_t < 1 or self.steps - self.t_final <= max(1, self.t_init):
            raise ConfigError("adalora: no updates are left to lower the rank in; delta_t must be at least 1, t_init + t_final below steps")

    def initial(self, inner: int, outer: int, generator: torch.Generator) -> dict[str, Tensor]:
        a, b = (0.02 * torch.randn(shape, generator=generator) for shape in ((self.rank, inner), (outer, self.rank)))
        return {"A": a, "B": b, "E": torch.zeros(self.rank)}

    def gain(self, p: Mapping[str, Tensor]) -> Tensor:
        return self.alpha / (self.rank + 1e-5) * p["E"]  # 1e-5 as in PEFT

    def penalty(self, groups: Sequence[Mapping[str, Tensor]]) -> Tensor | float:
        if not self.orthogonal:
            return 0.0
        eye = torch.eye(self.rank, device=groups[0]["A"].device, dtype=groups[0]["A"].dtype)
        grams = [gram for p in groups for gram in (p["A"] @ p["A"].mT, p["B"].mT @ p["B"])]  # [E, S, R, R]
        norms = torch.cat([torch.linalg.matrix_norm(gram - eye) for gram in grams], 1)
        return self.orthogonal * norms.mean(1)

    def state(self, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """B and E, which ``up`` holds as a product; A too where a cut took factors from ``down``."""
        return {k: t for k, t in p.items() if k != "A" or bool((p["E"] == 0).any())}

    def resumed(self, group: int, sites: Sequence[Site], patch: Patch) -> dict[str, Tensor]:
        ops, state = {op.site: op.tensors for op in patch.ops}, patch.state
        a = state[f"A.{group}"] if f"A.{group}" in state else torch.stack([ops[s]["down"] for s in sites])
        return {"A": a, "B": state[f"B.{group}"], "E": state[f"E.{group}"]}

    def resumable(self, patch: Patch) -> bool:
        return "scaled" not in patch.settings  # what the state holds was not scaled

    def held(self, updates: int) -> bool:
        return self.allocate and updates < self.steps - self.t_final

    def after(self, sites: int) -> After | None:
        return Allocation(self, sites) if self.allocate else None


@dataclass
class Allocation:
    """The budget of each of E problems, called after each update t = 1 … T (``steps``): a cut zeroes E of the least important triplets
    (row of A, number of E, column of B), of all linears together.

    Importance of a number w is s̄ · ū, with s = |w ∂loss/∂w| (w after the update, the gradient from before it, as in PEFT),
    s̄ ← β1 s̄ + (1 − β1) s,   ū ← β2 ū + (1 − β2) |s − s̄|;  of a triplet: that of its E plus the means over its row and its column.
    Budget: n r up to t_init; n r* + (n r − n r*) (1 − (t − t_init)/(T − t_final − t_init))³, rounded down, every delta_t; n r* from
    T − t_final on, where the choice is final.
    """

    editor: AdaLoRA
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
            cut = self._least(p, left)
            for name, where in cut.items():
                p[name].masked_fill_(where, 0.0)
            self.cut = cut if step == end else {}

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
