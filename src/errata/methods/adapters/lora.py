"""LoRA (Hu et al., ICLR 2022) as an editor.

ΔW = α/r · B A,   A [r, I] ~ U(−1/√I, 1/√I) (Kaiming-uniform with a = √5, as PEFT has it),   B [O, r] = 0
loss = mean −log p(target token)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.core.patch import Patch, Site
from errata.methods.adapters.editor import PUBLISHED, AdapterEditor


@dataclass(frozen=True)
class LoRA(AdapterEditor):
    """``published`` is EasyEdit's LoRA file for Qwen-2.5, its only one with more than two steps.  It takes requests one after the other,
    this trains all rows of a patch at once.  Going on, B is what the last patch holds divided by α/r."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al., ICLR 2022 (LoRA), arXiv:2106.09685; as an editor: EasyEdit"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "published": PUBLISHED,
        # chosen on dev: rates from 1e-3 to 1e-2 trade generality against locality; dropout from 0 to 0.5 changes less than the seed does
        "almanac": {**PUBLISHED, "dropout": 0.0, "end": "."},
    }

    steps: int = 60

    def initial(self, inner: int, outer: int, generator: torch.Generator) -> dict[str, Tensor]:
        uniform = torch.rand(self.rank, inner, generator=generator, dtype=torch.float64)
        return {"A": ((2 * uniform - 1) * inner**-0.5).float(), "B": torch.zeros(outer, self.rank)}

    def scaling(self, p: Mapping[str, Tensor]) -> Tensor:
        return torch.full((), self.alpha / self.rank, device=p["A"].device, dtype=p["A"].dtype).expand(p["A"].shape[:-1])

    def resumed(self, group: int, sites: Sequence[Site], patch: Patch) -> dict[str, Tensor]:
        ops = {op.site: op.tensors for op in patch.ops}
        scale = self.alpha / self.rank
        return {"A": torch.stack([ops[s]["down"] for s in sites]), "B": torch.stack([ops[s]["up"] / scale for s in sites])}
