"""What a gated edit does to states: its gates' weights, and Φ (see `errata.methods.subspace.op`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_RMS_EPS = 1e-6  # as in LLaMA's norms


def gate(p: Mapping[str, Tensor], kind: str, h: Tensor) -> Tensor:
    """Weights w(h) in [0, 1], [..., T, r] (or 1 in place of r), from hidden states h [..., T, d]."""
    return weights_by(keys(p, kind), kind, h)


def keys(p: Mapping[str, Tensor], kind: str) -> Tensor:
    """What states are multiplied with, [..., r, d]: the gates' directions, with the gain of ``rmsnorm`` and the shared one in them."""
    if kind == "shared_logit":
        return p["V"][..., :-1, :] + p["V"][..., -1:, :]
    return p["V"] * p["g"].unsqueeze(-2) if kind == "rmsnorm" else p["V"]


def weights_by(keys: Tensor, kind: str, h: Tensor) -> Tensor:
    """`gate` with keys that are made already."""
    if kind == "rmsnorm":
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + _RMS_EPS)
    return torch.sigmoid(h @ keys.mT)


def move(p: Mapping[str, Tensor], settings: Mapping[str, Any], y: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """(Φ at every state of ``y`` [..., T, d], the weights before the threshold, the update in the subspace [..., T, r])."""
    h = y.to(torch.promote_types(p["R"].dtype, y.dtype))
    update = h @ (p["A"] - p["R"]).mT + p["b"].unsqueeze(-2)
    w = None
    if settings["gate"] != "none":
        w = gate(p, settings["gate"], h)
        threshold = settings.get("threshold", 0.0)
        update = (torch.where(w < threshold, 0.0, w) if threshold else w) * update
    return y + (update @ p["R"]).to(y.dtype), w, update
