"""ReFT (LoReFT) as an editor: BaFT with every gate weight 1 and no regularisation (BaFT, appendix C; Wu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from errata.methods.subspace.editor import SubspaceEditor

# the models of the paper's tables
_PAPER = {
    "llama-2-7b": {"layers": [9, 18, 24, 28]},
    "llama-3-8b": {"layers": [9, 18, 24, 28]},
    "gemma-1.1-7b": {"layers": [18, 20, 22, 24]},
}


@dataclass(frozen=True)
class ReFT(SubspaceEditor):
    """Φ(h) = h + Rᵀ(A h + b − R h) at the last prompt tokens and every output token."""

    name: ClassVar[str] = "reft"
    paper: ClassVar[str] = "Wu et al. 2024, arXiv:2404.03592; as an editor: BaFT, ICLR 2025"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {},
        **{f"published {model}": values for model, values in _PAPER.items()},
        **_PAPER,
        "almanac": {"lr": 1e-3, "batched_lr": 1e-3, "weight_decay": 5.0, "end": "."},  # chosen on dev (docs/results)
    }
