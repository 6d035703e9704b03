"""The op behind ReFT and BaFT: an edit of the residual stream inside a learned subspace, with or without gates.

    Φ(h) = h + Rᵀ W(h) (A h + b − R h)          R [r, d] with orthonormal rows, A [r, d], b [r], W(h) = diag(w_1 … w_r)

Source: Wu et al. 2024 (ReFT, W = I) and BaFT eq. (2), (3).  Gates (the published parameter counts
fit both of the first two and cannot tell them apart):

    none           w = 1                                                     ReFT
    shared_logit   w_k = σ(v_k·h + v_0·h),        V [r+1, d], no bias        (S), the default
    rmsnorm        w_k = σ(v_k·(g ⊙ h / rms(h))), V [r, d], g [d] = 1        (N), free of the scale of h
    subspace       w_k = σ(v·h) for every k,      V [1, d]                   the ablation "ss-w"

With a ``threshold`` t a weight below it is exactly 0 (a sparse gate, the paper's own next step, appendix D.3): where every gate is shut,
h is left as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.core.op_schema import OpSchema, Tensors
from errata.core.patch import Op, OpContext, Site
from errata.errors import ConfigError
from errata.methods.subspace.chain import GateChain
from errata.methods.subspace.gating import move


@dataclass(frozen=True)
class _Settings:
    """Of an op; ``threshold`` is younger than some patches."""

    gate: Literal["none", "shared_logit", "rmsnorm", "subspace"]
    last: int | None
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ConfigError(f"setting.last counts prompt tokens, at least 1, not {self.last}")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"setting.threshold is a weight, from 0 to 1, not {self.threshold:g}")


def _tensors(settings: _Settings, _: Tensors) -> dict[str, str]:
    gates = {"none": {}, "shared_logit": {"V": "r+1 O"}, "rmsnorm": {"V": "r O", "g": "O"}, "subspace": {"V": "1 O"}}
    return {"R": "r O", "A": "r O", "b": "r", **gates[settings.gate]}


class Subspace:
    """Registered as ``subspace``; acts on the last ``last`` prompt tokens (None: all of them) and every later token."""

    schema = OpSchema(_tensors, _Settings, linear=False)

    @staticmethod
    def apply(p: Mapping[str, Tensor], settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext) -> Tensor:
        """Computed in the parameters' float32 (or wider) whatever the base's dtype; the update is cast back, h itself is not rounded."""
        moved, w, update = move(p, settings, y)
        acts = context.active(settings["last"])
        if w is not None:
            context.record(site, "gate", w)
            if threshold := settings.get("threshold", 0.0):
                acts = acts & (w >= threshold).any(-1, keepdim=True)
        context.record(site, "update", update)
        return torch.where(acts, moved, y)

    @staticmethod
    def reads_prompt_end(settings: Mapping[str, Any]) -> bool:
        return settings["last"] is not None

    @staticmethod
    def chain_key(op: Op) -> Hashable | None:
        """Ops with equal keys that follow each other at a site run as one `GateChain`; None: an op whose gates are never quite shut."""
        return op.signature() if op.settings.get("threshold") and op.settings["gate"] != "none" else None

    @staticmethod
    def chain(columns: Sequence[Sequence[Op]], rows: Tensor | None, device: torch.device) -> Any:
        return GateChain.of(columns, rows, device)


def orthonormal(x: Tensor) -> Tensor:
    """Orthonormal rows spanning those of ``x`` [..., r, d]: the transposed Q of the thin QR of xᵀ, signs fixed by diag(R) > 0.

    Computed from the r×r Gram matrix (Cholesky QR): all problems of a bank in three batched calls and no d×d buffer.  The
    map has the entries of ``x`` as free parameters, so counts agree with the published ones, and weight decay cannot break it.

    Next to orthonormal x, R moves by the part of a step dx that leaves the span, and by a turn inside it: at most as far as x.  pyreft's
    R moves twice as far as its parameters (`turned`), so at the same rate R goes about half as far here, and the loss falls more slowly.
    """
    lower = torch.linalg.cholesky(x @ x.mT)
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device).expand_as(lower)
    out: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False) @ x  # the inverse of r×r is small, d columns are not
    return out


Frame = tuple[Tensor, Tensor, Tensor]


def _reflections(v: Tensor, half: Tensor) -> Tensor:
    """T [..., r, r] with H_1 … H_r = I − Vᵀ T V, H_j along row v_j of V (compact WY form); ``half`` [..., r] = |v_j|² / 2."""
    inverse = (v @ v.mT).triu(1) + torch.diag_embed(half)
    eye = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device).expand_as(inverse)
    out: Tensor = torch.linalg.solve_triangular(inverse, eye, upper=True)
    return out


def frame(base: Tensor) -> Frame:
    """An orthogonal d×d matrix B whose first r columns are the orthonormal rows of ``base`` [..., r, d], for `turned`: (V, T, signs) with
    B = (I − Vᵀ T V) diag(signs, 1 … 1).  It is never written out."""
    rank, width = base.shape[-2:]
    packed, tau = torch.geqrf(base.mT)
    v = packed.mT.triu(1) + torch.eye(rank, width, dtype=base.dtype, device=base.device)
    none = tau == 0  # no reflection
    v = torch.where(none.unsqueeze(-1), 0.0, v)
    return v, _reflections(v, torch.where(none, 1.0, 1 / torch.where(none, 1.0, tau))), packed.diagonal(dim1=-2, dim2=-1).sign()


def turned(x: Tensor, of: Frame) -> Tensor:
    """pyreft's R: orthonormal rows at ``x`` [..., r, d], those of the base that `frame` was made of at x = 0.

        Rᵀ = B · (the first r columns of −H_1 … H_r),   H_j the reflection along v_j = e_j + Σ_{i > j} x_ji e_i

    as torch.nn.utils.parametrizations.orthogonal(orthogonal_map="householder") has it; what is left of x's diagonal and on it is not
    used.  To first order R = base + 2 x Bᵀ.  B beside the base is any completion: torch draws one, here reflections make it.
    """
    rank, width = x.shape[-2:]
    own = torch.eye(rank, width, dtype=x.dtype, device=x.device)
    v = x.triu(1) + own
    rows = v[..., :rank].mT @ (_reflections(v, v.square().sum(-1) / 2).mT @ v) - own
    base, t, signs = of
    rows = torch.cat([rows[..., :rank] * signs.unsqueeze(-2), rows[..., rank:]], -1)
    out: Tensor = rows - (rows @ base.mT) @ (t.mT @ base)
    return out


def start(rank: int, width: int, kind: str, init: str, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Parameters at the start of an edit, without the bank axis; ``X`` is the free matrix behind R.

    A, b and V are U(±1/√d), torch's default for a linear layer (what pyreft does); ``init="identity"`` sets A ← R, b ← 0.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = width**-0.5

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    x = orthonormal(torch.randn(rank, width, generator=generator))
    p = {"X": x, "A": uniform(rank, width), "b": uniform(rank)}
    if init == "identity":
        p["A"], p["b"] = x.clone(), torch.zeros(rank)
    if kind != "none":
        p["V"] = uniform({"shared_logit": rank + 1, "rmsnorm": rank, "subspace": 1}[kind], width)
    if kind == "rmsnorm":
        p["g"] = torch.ones(width)
    return {k: t.to(device) for k, t in p.items()}
