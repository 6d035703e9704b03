"""AlphaEdit: MEMIT's change, projected onto what the model's own keys do not use.

    P = U₀ U₀ᵀ (eigenvectors of C with small eigenvalues),   M = Σ K_p K_pᵀ over earlier edits
    Δ = R Kᵀ P (M P + K Kᵀ P + L₂ I)⁻¹

Source: Fang et al., ICLR 2025, eq. (14) with I replaced by L₂ I, as its code has it.  Keys of earlier edits come from the stack: an edit
that is taken back is forgotten.  Computed in the coordinates of U₀, where the system is symmetric and as small as the number of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from errata.core.model import LM
from errata.core.patch import Op
from errata.errors import ConfigError
from errata.methods.locate.editor import ALMANAC, FIVE, RIDGE_ALONE, LocateEditor
from errata.methods.locate.run import LocateThenEditRun
from errata.methods.locate.solve import coordinates, from_coordinates, ridge_rows
from errata.text.statistics import Moments

_L2 = 10.0
_UPSTREAM = {"v_decay": 0.5, "clamp": 0.75, "l2": _L2, "threshold": 2e-2}
_FOUR_TO_EIGHT = [4, 5, 6, 7, 8]


@dataclass(frozen=True)
class AlphaEdit(LocateEditor):
    """threshold   eigenvalues of C below it span the null space (code 2e-2, the paper's footnote 1e-2): on the scale of the keys
    share       take this share of directions, those with the smallest eigenvalues, instead
    l2          L₂; None: 10, as in the authors' files for all their models (1 in some of EasyEdit's), and 0.1 where a norm follows the
                MLP
    history     keep clear of what earlier edits on the stack wrote
    """

    name: ClassVar[str] = "alphaedit"
    paper: ClassVar[str] = "Fang et al., ICLR 2025 (AlphaEdit)"
    EXPERTS: ClassVar[bool] = True
    DEPTHS: ClassVar[tuple[float, ...]] = FIVE
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-xl": {"layers": [13, 14, 15, 16, 17], "v_steps": 20, **_UPSTREAM},
        "gpt-j-6b": {"layers": [3, 4, 5, 6, 7, 8], **_UPSTREAM},
        **{key: {"layers": _FOUR_TO_EIGHT, "v_lr": 0.1, **_UPSTREAM} for key in ("llama-3-8b", "llama-3.1-8b")},
        "qwen2.5-7b": {"layers": _FOUR_TO_EIGHT, "l2": 1.0},
        **{key: {"layers": _FOUR_TO_EIGHT} for key in ("llama-2-7b", "mistral-7b", "gemma-1.1-7b")},  # ours; no file was published
        "almanac": {**ALMANAC, "layers": [0, 1, 2], "clamp": 1.5, "share": 0.7, "l2": 100.0},
    }

    TUNES: ClassVar[dict[str, Any]] = {**LocateEditor.TUNES, "l2": (1.0, 100.0), "share": (0.5, 0.8)}

    threshold: float = 2e-2
    share: float | None = None
    l2: float | None = None
    history: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mom2_adjustment:
            raise ConfigError("alphaedit needs the second moments of the keys; leave mom2_adjustment on")
        if self.threshold <= 0 or (self.l2 is not None and self.l2 <= 0) or (self.share is not None and not 0 < self.share <= 1):
            raise ConfigError("alphaedit: threshold and l2 must be positive, share above 0 and at most 1")

    def down_factors(
        self, m: Moments | None, keys: Tensor, prompt_keys: Tensor, groups: Sequence[list[int]], past_keys: Tensor | None
    ) -> list[Tensor]:
        """Kᵀ P (…)⁻¹ = [ (K̃ K̃ᵀ + M̃ + L₂ I)⁻¹ K̃ ]ᵀ U₀ᵀ with K̃ = U₀ᵀ K."""
        assert m is not None  # mom2_adjustment is checked above
        bases = [basis.to(keys.device) for basis in m.null_spaces(self.threshold, self.share)]
        if not any(basis.shape[1] for basis in bases):
            smallest = float(m.eigen()[0].min())
            raise ConfigError(
                f"alphaedit: no direction of block {m.site.block} has an eigenvalue below {self.threshold:g} (the smallest is "
                f"{smallest:.3g}); raise threshold, or set share"
            )
        inner = coordinates(keys.double(), bases)  # [N, m]
        kept = coordinates(past_keys.double(), bases) if past_keys is not None and self.history else inner[:0]
        return [from_coordinates(ridge_rows(inner[g], kept, _L2 if self.l2 is None else self.l2), bases) for g in groups]

    def alone(self, lm: LM) -> Self:
        return replace(self, l2=_L2 * RIDGE_ALONE) if self.l2 is None else self

    def patch_state(self, job: LocateThenEditRun, ops: Sequence[list[Op]]) -> list[dict[str, Tensor]]:
        """The keys of each patch at each block, read once everything is written."""
        keys = {b: job.average(job.read_keys(b, ops)[0]) for b in job.blocks}
        return [{name: t for b, k in keys.items() for name, t in job.state_of(b, k[g]).items()} for g in job.groups]

    def facts(self, job: LocateThenEditRun) -> dict[str, Any]:
        """The share of directions that count as null space at each block."""
        kept = {
            m.site.block: sum(u.shape[1] for u in m.null_spaces(self.threshold, self.share)) / m.eigen()[0].numel()
            for m in job.moments.values()
        }
        return {"null space": ", ".join(f"block {b}: {share:.1%}" for b, share in sorted(kept.items()))}
