"""What may be done to a finished ΔW so that a model stands more of them: RECT, PRUNE and a bound on each entry.

Each is a function of ΔW [O, I] and the frozen W, after any method of the locate-then-edit family; the result is `dense`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.core.model import LM
from errata.core.patch import Op, Site
from errata.core.weights import delta_weight
from errata.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Conditioning:
    """rect    share of entries kept, those with the largest |ΔW_ij / W_ij|; the released code keeps 0.2 (Gu et al. 2024)
    prune   how singular values of ΔW above the largest of W are reduced: "log" or "linear" (Ma et al. 2024)
    base    n of "log"; the paper tries e, 2, 1.5 and 1.2
    bound   |ΔW_ij| ≤ bound (the norm constraint of fine-tuning)
    """

    rect: float | None = None
    prune: Literal["none", "log", "linear"] = "none"
    base: float = 2.718281828459045
    bound: float | None = None

    def check(self, name: str) -> None:
        if self.rect is not None and not 0 < self.rect <= 1:
            raise ConfigError(f"{name}: rect is the share of entries kept, above 0 and at most 1; got {self.rect:g}")
        if self.bound is not None and self.bound <= 0:
            raise ConfigError(f"{name}: norm_constraint must be positive")
        if self.prune == "log" and self.base <= 1:
            raise ConfigError(f"{name}: prune_base must be above 1")

    @property
    def active(self) -> bool:
        return self.rect is not None or self.prune != "none" or self.bound is not None

    def apply(self, lm: LM, op: Op) -> Op:
        """The op with its ΔW conditioned, PRUNE first, then RECT, then the bound."""
        change = delta_weight(op)
        if self.prune != "none":
            change = pruned(change, torch.linalg.matrix_norm(weight(lm, op.site), 2), self.prune, self.base)
        if self.rect is not None:
            change = rected(change, weight(lm, op.site), self.rect)
        if self.bound is not None:
            change = change.clamp(-self.bound, self.bound)
        dtype = next(iter(op.tensors.values())).dtype
        return Op("dense", op.site, {"weight": change.to(dtype).contiguous()})


def weight(lm: LM, site: Site) -> Tensor:
    """W [O, I] of a plain linear (Conv1D turned round), float64."""
    module = lm.module(site)
    found = getattr(module, "weight", None)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.device.type == "meta":
        raise ModelError(f"block {site.block} ({site.point}) holds no plain weights to compare the change with; leave rect and prune off")
    return (found.T if type(module).__name__ == "Conv1D" else found).detach().double()


def rected(change: Tensor, weight: Tensor, keep: float) -> Tensor:
    """Only the ``keep`` share of entries with the largest relative change; the others 0."""
    relative = (change / weight.to(change.device)).abs().nan_to_num(torch.inf)  # a change where W is 0 is as large as can be
    count = max(1, round(keep * change.numel()))
    threshold = relative.flatten().topk(count).values[-1]
    return torch.where(relative >= threshold, change, 0.0)


def pruned(change: Tensor, top: Tensor, how: str, base: float) -> Tensor:
    """Singular values σ above ``top`` = σ_max(W) become log_n σ − log_n σ_max + σ_max, or σ_max + (σ − σ_max)/2."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    top = top.to(values)
    if how == "log":
        small = (values.clamp_min(1e-300) / top).log() / torch.log(torch.tensor(base, dtype=values.dtype)) + top
    else:
        small = top + (values - top) / 2
    out: Tensor = left * torch.where(values > top, torch.minimum(small, values), values) @ right
    return out
