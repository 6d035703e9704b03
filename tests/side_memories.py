"""Side memories made by hand: an op of WISE with the ΔW one gives it, and patches of the tiny models that hold one."""

from __future__ import annotations

from typing import Any

import torch

from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.methods.wise.op import pack

SITE = Site(1, "mlp_down")


def memory_op(deltas: list[torch.Tensor], least: list[float], **settings: Any) -> Op:
    outer, inner = deltas[0].shape
    tensors = {"least": torch.tensor(least, dtype=torch.float64)}
    for i, delta in enumerate(deltas):
        where = torch.arange(outer * inner)
        tensors |= {f"{k}.{i}": t for k, t in pack(where, delta.double().flatten(), outer * inner).items()}
    return Op("side_memory", SITE, tensors, {"shape": [outer, inner], "act": "silu", "act_ratio": 0.8, "long": 100, **settings})


def patch_of(base: LM, op: Op, name: str) -> Patch:
    return Patch(name, {}, base.fingerprint, (), (op,))


def real_op(base: LM, least: list[float], seed: int) -> Op:
    g = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(32, 64, generator=g) * 0.5 for _ in least]
    return memory_op(deltas, least)
