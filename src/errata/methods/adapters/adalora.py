"""AdaLoRA (Zhang et al., ICLR 2023) as an editor.

    ΔW = α/r · B diag(E) A,   A [r, I], B [O, r] ~ N(0, 0.02²),   E = 0
    loss = mean −log p(target token) + 0.5 · mean over all A and B of ‖A Aᵀ − I‖_F, ‖Bᵀ B − I‖_F

Formulas as PEFT has them, which EasyEdit runs; the paper's term is the sum of squared norms, not the mean of norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.core.fit import After
from errata.core.patch import Patch, Site
from errata.errors import ConfigError
from errata.methods.adapters.allocation import RankAllocator
from errata.methods.adapters.editor import PUBLISHED, AdapterEditor


@dataclass(frozen=True)
class AdaLoRA(AdapterEditor):
    """``published`` is what EasyEdit's files do: their ``rank: 8`` is one that AdaLoRA ignores, the rank is 12 and stays 12, because the
    step that lowers it is never called.  The early stop looks at the NLL alone: the orthogonality
    term by itself is above 0.01 from start to end (on the almanac 1.6, and 0.03 after 70 updates).

    orthogonal   weight of the orthogonality term
    allocate     lower the rank as published, to ``target_rank`` on average: `RankAllocator`.  A problem may then end early only once its
                 rank is final; factors that were dropped are left out of the patch
    target_rank, t_init, t_final, delta_t, beta1, beta2
                 of that schedule, with PEFT's defaults: full rank for ``t_init`` updates, the last ``t_final`` at the final rank (with 0
                 nothing repairs the last cut), a cut every ``delta_t``
    """

    name: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "Zhang et al., ICLR 2023 (AdaLoRA), arXiv:2303.10512; as an editor: EasyEdit, BaFT"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "published": PUBLISHED,
        "published llama-3.1-8b": {"steps": 50},
        "published gpt-j-6b": {"targets": ["fc_in", "fc_out"], "steps": 50},
        "published gpt2-xl": {"targets": ["c_attn"], "steps": 30},
        "published chatglm": {"targets": ["dense_h_to_4h", "dense_4h_to_h"], "steps": 50},
        # chosen on dev: twice that rate costs locality, half of it generality
        "almanac": {**PUBLISHED, "lr": 1e-2, "dropout": 0.0, "end": "."},
    }

    rank: int = 12
    lr: float = 5e-3  # as published: E begins at 0, so at LoRA's rate nothing is written in so many steps
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

    def scaling(self, p: Mapping[str, Tensor]) -> Tensor:
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
        ops, count = {op.site: op.tensors for op in patch.ops}, len(sites)
        if f"A.{group}" in patch.state or not all(s in ops and len(ops[s]["down"]) == self.rank for s in sites):
            a = patch.running(f"A.{group}", count, self.rank, None)
        else:
            a = torch.stack([ops[s]["down"] for s in sites])
        return {"A": a, "B": patch.running(f"B.{group}", count, None, self.rank), "E": patch.running(f"E.{group}", count, self.rank)}

    def resumable(self, patch: Patch) -> bool:
        return "scaled" not in patch.settings  # what the state holds was not scaled

    def held(self, updates: int) -> bool:
        return self.allocate and updates < self.steps - self.t_final

    def after_step(self, sites: int) -> After | None:
        return RankAllocator(self, sites) if self.allocate else None
