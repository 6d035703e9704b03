"""ROME and R-ROME: one fact as a rank-one change of one MLP.

    u = C⁻¹k* / ‖C⁻¹k*‖,   Λ = (v* − W k) / (uᵀ k),   W ← W + Λ uᵀ,   hence W k = v* exactly

ROME (Meng et al. 2022, §3.1) averages k* over prefixes in u and takes k of the bare prompt in Λ.  R-ROME (Gupta et al. 2024)
found that this mix can disable a model after a few edits and uses one key everywhere.  Several requests are written one after
the other, as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from errata.core.bank import Stack
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Op, Patch
from errata.core.tail import Tail
from errata.core.weights import merge
from errata.errors import ConfigError
from errata.methods.locate.editor import ALMANAC, LocateEditor
from errata.methods.locate.run import LocateThenEditRun
from errata.methods.locate.solve import whitened
from errata.request import EditRequest
from errata.text.statistics import Moments

_LLAMA = {"layers": [5], "v_steps": 25, "v_decay": 1e-3}
_PRESETS: dict[str, dict[str, Any]] = {  # EasyEdit hparams/ROME; GPT-2-XL and GPT-J as in the authors' repository
    "gpt2-xl": {"layers": [17], "v_steps": 20, "v_decay": 0.5},
    "gpt-j-6b": {"layers": [5], "v_steps": 20, "v_decay": 0.5},
    "qwen-7b": {"layers": [5], "v_steps": 20, "v_decay": 0.5},
    **dict.fromkeys(("llama-2-7b", "llama-3-8b", "llama-3.1-8b", "llama-3.2-3b", "mistral-7b", "qwen2-7b", "qwen2.5-7b"), _LLAMA),
    "gemma-1.1-7b": _LLAMA,  # ours; no file was published
    "almanac": {**ALMANAC, "layers": [0]},
}


@dataclass(frozen=True)
class ROME(LocateEditor):
    """Rank-one model editing.  Where paper and code differ (decay, KL weight, templates) the code's numbers are the defaults."""

    name: ClassVar[str] = "rome"
    paper: ClassVar[str] = "Meng et al., NeurIPS 2022 (ROME)"
    VALUE_AT: ClassVar[str] = "mlp"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = _PRESETS

    prefixes: tuple[tuple[int, ...], ...] = ((5, 10), (10, 10))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and len(self.layers) != 1:
            raise ConfigError(f"{self.name} edits one block; got layers {list(self.layers)}")

    def weights(self, count: int) -> list[float]:
        """All prefixes alike."""
        return [1.0 / count] * count

    def down_factors(
        self, m: Moments | None, keys: Tensor, prompt_keys: Tensor, groups: Sequence[list[int]], past_keys: Tensor | None
    ) -> list[Tensor]:
        """u / (uᵀ k), so that the residual itself is the other factor."""
        u = whitened(m, keys)
        return list((u / (u * self.written(keys, prompt_keys).double()).sum(1, keepdim=True)).unsqueeze(1))

    def written(self, keys: Tensor, bare: Tensor) -> Tensor:
        """The key at which the value is exact."""
        return bare

    def edit(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> Patch:
        """One patch; each request is written on top of those before it."""
        if len(requests) < 2:
            return LocateThenEditRun(self, lm, [list(requests)], on, runner).run(progress)[0]
        made: list[Patch] = []
        for request in requests:
            made += LocateThenEditRun(self, lm, [[request]], (*on, *made), runner).run(progress)
        joint = merge(tuple(made))
        notes = {
            "seconds": round(sum(p.notes["seconds"] for p in made), 4),
            "loss": round(sum(p.notes["loss"] for p in made) / len(made), 6),
        }
        return replace(joint, method=self.name, settings=made[0].settings, replaces=(), notes=notes)


@dataclass(frozen=True)
class RROME(ROME):
    """ROME with one key everywhere.

    key              "mean" (over prefixes; value and output averaged alike, the default) or "prompt" (bare)
    """

    name: ClassVar[str] = "r-rome"
    paper: ClassVar[str] = "Gupta et al. 2024 (R-ROME)"

    key: Literal["mean", "prompt"] = "mean"

    def weights(self, count: int) -> list[float]:
        return [1.0 / count] * count if self.key == "mean" else [1.0, *[0.0] * (count - 1)]

    def written(self, keys: Tensor, bare: Tensor) -> Tensor:
        return keys

    def current(self, job: LocateThenEditRun, outputs: Tensor, ops: Sequence[list[Op]]) -> Tensor:
        """The linear's output for that same key; the goal v_0 + δ stays that of the bare prompt, as released."""
        return job.average(outputs)
