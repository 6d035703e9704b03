"""BaFT's Theorem 2.3 in numbers: a linear edit that holds in a ball around one state must move states nearby; a gated one need not.

ReFT is affine, Φ(h) = (I + H) h + Rᵀb with H = Rᵀ(A − R).  Let it map h₀ to t = Φ(h₀) and the ball B(h₀, ε₀) into B(t, ε_t).  Then

    σ_max(I + H) ≤ ε_t / ε₀,   σ_max(H) ≤ ε_t / ε₀ + 1,
    ‖Φ(h) − h‖ ≥ ‖t − h₀‖ − (ε_t / ε₀ + 1) ‖h − h₀‖   for every h                                    (bound)

and an unrelated h at distance ε_ir + ε₀ leaves its own ball of radius ε_ir where ε_ir < (‖t − h₀‖ − ε_t − ε₀) ε₀ / (ε_t + 2ε₀).

Here both are trained on one objective: reach t, keep the ball's points near t, leave unrelated states where they are.  The trained ReFT's
own ε_t = σ_max(I + H) ε₀ makes the theorem's premise hold exactly; a penalty keeps it near ε₀, as an edit that holds wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.core.bank import ForwardContext
from errata.core.patch import Site
from errata.errors import ConfigError
from errata.methods.subspace.op import Subspace, orthonormal, start

WIDTH, RANK, _RADIUS, _SHIFT = 32, 4, 0.5, 10.0  # d, r, ε₀, ‖t − h₀‖ wanted
OTHERS = 24  # unrelated states, at distances from 1.2 ε₀ to `_FAR` ‖t − h₀‖
_FAR = 1.2
_BALL = 64  # states of the ball that training sees
STEPS, _RATE = 600, 0.02
_SIGMA, _PENALTY = 1.2, 100.0  # ReFT's σ_max(I + H) is held below the first: ε_t = 1.2 ε₀


@dataclass(frozen=True)
class Shown:
    """points: a row an unrelated state: distance from h₀, moved by ReFT and by BaFT, the bound there, whether ReFT moves it out of its
    ball (of radius distance − ε₀); facts: the theorem's quantities, and how well each editor does its task."""

    points: list[dict[str, Any]]
    facts: dict[str, float]


def apply(p: dict[str, Tensor], h: Tensor, gate: str) -> Tensor:
    """Φ(h) of states [n, d], by the op that edits models."""
    own = {("R" if k == "X" else k): (orthonormal(t) if k == "X" else t)[None] for k, t in p.items()}
    context = ForwardContext(torch.zeros(1, len(h), dtype=torch.long), torch.ones(1, dtype=torch.long))
    return Subspace.apply(own, {"gate": gate, "last": 1}, h[None], h[None], Site(0), context)[0]


def demonstrate(seed: int = 0, steps: int = STEPS) -> Shown:
    """Train both, look at every unrelated state."""
    if steps < 1:
        raise ConfigError(f"the demonstration trains for at least one step, not {steps}")
    generator = torch.Generator().manual_seed(seed)

    def unit(n: int) -> Tensor:
        x = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
        out: Tensor = x / x.norm(dim=1, keepdim=True)
        return out

    h0 = 4.0 * unit(1)
    t = h0 + _SHIFT * unit(1)
    ball = h0 + _RADIUS * unit(_BALL)
    distance = torch.linspace(1.2 * _RADIUS, _FAR * _SHIFT, OTHERS, dtype=torch.float64)[:, None]
    others = h0 + distance * unit(OTHERS)
    reft, baft = (_train(kind, h0, t, ball, others, seed, steps) for kind in ("none", "shared_logit"))
    with torch.no_grad():
        return _shown(reft, baft, h0, ball, others, distance.squeeze(1), t)


def _train(gate: str, h0: Tensor, t: Tensor, ball: Tensor, others: Tensor, seed: int, steps: int) -> dict[str, Tensor]:
    """Mean squared distance from t over h₀ and the ball, and that of unrelated states from themselves.  ReFT keeps the whole ball near t
    where σ_max(I + H) is small, BaFT is nonlinear and sees the ball's states only."""
    p = {k: v.double().requires_grad_() for k, v in start(RANK, WIDTH, gate, "identity", seed, torch.device("cpu")).items()}
    adam = torch.optim.Adam(p.values(), lr=_RATE)
    near = torch.cat([h0, ball])
    for _ in range(steps):
        adam.zero_grad()
        missed = (apply(p, near, gate) - t).square().sum(1).mean()
        moved = (apply(p, others, gate) - others).square().sum(1).mean()
        over = (_sigma(p) - _SIGMA).clamp_min(0) if gate == "none" else h0.new_zeros(())
        (missed + moved + _PENALTY * over.square()).backward()
        adam.step()
    return {k: v.detach() for k, v in p.items()}


def _sigma(p: dict[str, Tensor]) -> Tensor:
    """σ_max(I + H)."""
    r = orthonormal(p["X"])
    out: Tensor = torch.linalg.matrix_norm(torch.eye(WIDTH, dtype=r.dtype) + r.mT @ (p["A"] - r), 2)
    return out


def _shown(
    reft: dict[str, Tensor], baft: dict[str, Tensor], h0: Tensor, ball: Tensor, others: Tensor, distance: Tensor, wanted: Tensor
) -> Shown:
    r = orthonormal(reft["X"])
    h = r.mT @ (reft["A"] - r)
    t = apply(reft, h0, "none")
    largest = float(_sigma(reft))
    eps_t, shift = largest * _RADIUS, float((t - h0).norm())
    moved = {gate: (apply(p, others, gate) - others).norm(dim=1) for p, gate in ((reft, "none"), (baft, "shared_logit"))}
    bound = shift - (largest + 1) * distance
    points = [
        {"distance": float(d), "reft": float(a), "baft": float(b), "bound": float(low), "reft leaves": bool(a > d - _RADIUS)}
        for d, a, b, low in zip(distance, moved["none"], moved["shared_logit"], bound, strict=True)
    ]
    reach = (shift - eps_t - _RADIUS) * _RADIUS / (eps_t + 2 * _RADIUS)
    facts = {"width": WIDTH, "rank": RANK, "eps_0": _RADIUS, "eps_t": eps_t, "shift": shift, "sigma(I + H)": largest}
    facts |= {"sigma(H)": float(torch.linalg.matrix_norm(h, 2)), "eps_ir below": reach}
    for name, p, gate in (("reft", reft, "none"), ("baft", baft, "shared_logit")):
        near = apply(p, torch.cat([h0, ball]), gate)
        facts[f"{name} from t"] = float((near - wanted).norm(dim=1).mean())
        facts[f"{name} moves unrelated"] = float(moved[gate].mean())
    return Shown(points, facts)
