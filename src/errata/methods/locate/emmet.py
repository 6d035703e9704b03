"""EMMET: batched ROME, with equality constraints, in one block.

    C' = w C + n I,   D = Kᵀ C'⁻¹ K + λ_e I,   Δ = (Z − Z_now) D⁻¹ Kᵀ C'⁻¹

Source: Gupta et al. 2024 (EMMET) and its code.  λ_e = 0 writes every value exactly, whatever w;
with λ_e > 0 the ridge that counts is w λ_e.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from errata.errors import ConfigError
from errata.methods.locate.editor import ALMANAC, LocateEditor
from errata.methods.locate.solve import small_side, whitened
from errata.text.statistics import Moments

_LLAMA = {"layers": [5]}


@dataclass(frozen=True)
class EMMET(LocateEditor):
    """mom2_weight    w;  ``emmet_lambda`` λ_e;  ``norm_lambda`` n

    single_ridge   add λ_e I also for a single edit (EasyEdit).  The authors do not, so that one edit is exactly ROME: the default
    Presets are the authors' (w = 1 but for GPT-2-XL); EasyEdit's files have w = 100,000, which writes a fraction only.
    """

    name: ClassVar[str] = "emmet"
    paper: ClassVar[str] = "Gupta et al. 2024 (EMMET)"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-xl": {"layers": [17], "v_steps": 20, "v_decay": 0.5, "clamp": 0.75, "mom2_weight": 1_000.0},
        "gpt-j-6b": {"layers": [5], "v_decay": 0.5, "clamp": 0.75},
        **dict.fromkeys(("llama-2-7b", "llama-3-8b", "llama-3.2-3b", "mistral-7b", "qwen2-7b", "qwen2.5-7b", "gemma-1.1-7b"), _LLAMA),
        "almanac": {**ALMANAC, "layers": [2], "clamp": 1.5},
    }

    mom2_weight: float = 1.0
    emmet_lambda: float = 0.1
    norm_lambda: float = 0.0
    single_ridge: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and len(self.layers) != 1:
            raise ConfigError(f"emmet edits one block; got layers {list(self.layers)}")
        if self.mom2_weight <= 0 or self.emmet_lambda < 0 or self.norm_lambda < 0:
            raise ConfigError("emmet: mom2_weight must be positive, emmet_lambda and norm_lambda not negative")

    def down_factors(
        self, m: Moments | None, keys: Tensor, prompt_keys: Tensor, groups: Sequence[list[int]], past_keys: Tensor | None
    ) -> list[Tensor]:
        """D⁻¹ Kᵀ C'⁻¹ of each problem."""
        if m is None:  # C = I
            white = keys.double() / (self.mom2_weight + self.norm_lambda)
        else:  # (w C + n I)⁻¹ = (C + n/w I)⁻¹ / w
            white = whitened(m, keys, self.norm_lambda / self.mom2_weight) / self.mom2_weight
        plain = keys.double()
        ridge = [self.emmet_lambda if len(g) > 1 or self.single_ridge else 0.0 for g in groups]
        return [small_side(plain[g], white[g], r) for g, r in zip(groups, ridge, strict=True)]
