"""The op of REP: keys of an edited linear are moved where a gate is open.

    k̂ = k + g(k) · B A k,   y ← y + [g(k) > τ] U A k,   U = (W + ΔW) B

k is the linear's input at every token, W the frozen linear, ΔW the patch's own change of it.  W k̂ + ΔW k̂ = y + (W + ΔW)(k̂ − k), so with
U folded when the patch is made, no weight is read and no module's input is touched: at a closed gate the output is y, bit for bit.
g = σ(w₂ᵀ GELU(W₁ k + b₁) + b₂).  One op may hold n adaptors: the one whose gate is most open acts, if it is above τ.
Source: REP (arXiv 2410.09338) and its released module, whose soft gate in training and hard gate at use this follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, one_hot

from errata.core.op_schema import OpSchema
from errata.core.patch import Op, OpContext, Site
from errata.core.weights import RowGroups
from errata.errors import ConfigError

AT_ONCE = 32  # adaptors whose inner numbers are held at one time


def gate_logit(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[…, T, n]: the gates before σ.  x [B or 1, T, I]; w1 [P, n, h, I], b1 [P, n, h], w2 [P, n, h], b2 [P, n]."""
    hidden = gelu(_each(x, p["w1"]) + p["b1"].unsqueeze(-3))
    return (hidden * p["w2"].unsqueeze(-3)).sum(-1) + p["b2"].unsqueeze(-2)


def _each(x: Tensor, rows: Tensor) -> Tensor:
    """[B, T, I] × [P, n, m, I] -> [B, T, n, m]; one product over all tokens where P is 1."""
    flat = rows.flatten(1, 2)
    out: Tensor = (x @ (flat[0] if len(flat) == 1 else flat).mT).unflatten(-1, rows.shape[1:3])
    return out


@dataclass(frozen=True)
class _Settings:
    tau: float
    gate: bool
    constant: bool

    def __post_init__(self) -> None:
        if not 0 < self.tau < 1:
            raise ConfigError(f"setting.tau is a share between 0 and 1, not {self.tau:g}")


def _one_constant(settings: _Settings, tensors: Mapping[str, Tensor]) -> str | None:
    """A constant projection has one direction, by the size of the key."""
    rank = tensors["a"].shape[1]
    return f"setting.constant goes with one direction, and it has {rank}" if settings.constant and rank != 1 else None


class KeyAdaptor:
    """a [n, r, I], u [n, O, r] and the gate's tensors; settings: tau, and with ``gate`` false g = 1 (an ablation), with ``constant`` the
    projection is a vector that does not depend on k (another)."""

    schema = OpSchema({"a": "n r I", "u": "n O r", "w1": "n h I", "b1": "n h", "w2": "n h", "b2": "n"}, _Settings, numbers=_one_constant)
    additive = True  # it reads x only and adds to y

    @staticmethod
    def apply(p: Mapping[str, Tensor], settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext) -> Tensor:
        x = x.to(p["a"].dtype)
        count, gated = p["a"].shape[1], settings["gate"]
        parts = [slice(i, i + AT_ONCE) for i in range(0, count, AT_ONCE)]
        if gated:
            logit = torch.cat([gate_logit({k: p[k][:, part] for k in ("w1", "b1", "w2", "b2")}, x) for part in parts], -1)
            context.record(site, "key gate", logit.sigmoid())
            acts = one_hot(logit.argmax(-1), count).bool() & (logit > threshold(settings["tau"]))
        else:
            acts = torch.ones((*x.shape[:-1], count), dtype=torch.bool, device=x.device)
        added = torch.zeros(y.shape, dtype=x.dtype, device=y.device)
        for part in parts:
            inner = acts[..., part, None].to(x.dtype)
            inner = inner * (torch.linalg.vector_norm(x, dim=-1)[..., None, None] if settings["constant"] else _each(x, p["a"][:, part]))
            up = p["u"][:, part].transpose(1, 2).flatten(2)  # [P, O, n r]
            added = added + inner.flatten(-2) @ (up[0] if len(up) == 1 else up).mT
        return torch.where(acts.any(-1, keepdim=True), y + added.to(y.dtype), y)

    @staticmethod
    def apply_grouped(
        p: Mapping[str, Tensor], groups: RowGroups, settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext
    ) -> Tensor:
        parts = zip(groups.split(x), groups.split(y), groups.entries, strict=True)
        silent: Any = _Silent()
        moved = [
            KeyAdaptor.apply({k: t[entry : entry + 1] for k, t in p.items()}, settings, own, out, site, silent) for own, out, entry in parts
        ]
        return y.index_copy(0, groups.order, torch.cat(moved))

    @staticmethod
    def fuse(ops: Sequence[Op], device: torch.device) -> Op:
        """Adaptors of several patches at one linear as one op: at a token one of them acts."""
        tensors = {k: torch.cat([op.tensors[k].to(device) for op in ops]) for k in ops[0].tensors}
        return Op(ops[0].kind, ops[0].site, tensors, ops[0].settings)

    @staticmethod
    def fuse_key(op: Op) -> tuple[Any, ...]:
        """Ops with equal keys can be `fuse`: the number of adaptors does not matter."""
        return (*sorted(op.settings.items()), *((k, *t.shape[1:], str(t.dtype)) for k, t in sorted(op.tensors.items())))


class _Silent:
    """A context that takes no notes: parts of a batch would overwrite each other's."""

    def record(self, site: Site, name: str, value: Tensor) -> None: ...


def threshold(tau: float) -> float:
    """τ before σ."""
    return math.log(tau / (1 - tau))
