"""Muon (Jordan et al. 2024): momentum whose matrix updates are orthogonalised by a Newton-Schulz iteration.

torch's own `torch.optim.Muon` iterates in bfloat16, one matrix at a time, which is many times slower than float32 on
processors without fast bfloat16; this one iterates in float32 on all matrices of one shape together.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of the Muon note


def orthogonalise(m: Tensor, steps: int = 5) -> Tensor:
    """Approximately U Vᵀ of each matrix of ``m`` [N, r, c], from its singular value decomposition U S Vᵀ."""
    a, b, c = _COEFFICIENTS
    tall = m.shape[1] > m.shape[2]
    x = m.mT if tall else m
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    out: Tensor = x.mT if tall else x
    return out


class Muon(torch.optim.Optimizer):
    """lr is the root mean square of an update's entries times sqrt(max(1, rows/columns)) (the note's scaling)."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = collections.defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum"] for p in params]
                grads = [p.grad for p in params if p.grad is not None]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                nesterov = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
                updates = orthogonalise(nesterov) * max(1.0, shape[0] / shape[1]) ** 0.5
                if group["weight_decay"]:
                    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates), alpha=-group["lr"])
