"""`fit`: E independent problems optimised in one batch, each stopping by itself.

AdamW acts on each number alone, so E problems stacked along the first axis train exactly as they would one at a time.
A finished problem is taken out of the batch; the others go on in a smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import FitError

# (parameters of the problems still running, their indices [e]) -> (loss to minimise [e], loss compared with the stop [e])
Loss = Callable[[Mapping[str, Tensor], Tensor], tuple[Tensor, Tensor]]


@dataclass
class Fitted:
    """params [E, …]; steps [E] updates made; loss [E] the last value compared with the stop."""

    params: dict[str, Tensor]
    steps: Tensor
    loss: Tensor


def fit(
    params: Mapping[str, Tensor],
    loss: Loss,
    *,
    steps: int,
    lr: float,
    stop: float | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    progress: Callable[[int, int, float], None] | None = None,
) -> Fitted:
    """AdamW (decoupled weight decay) for up to ``steps`` updates; problem e ends when its compared loss is below ``stop``.

    ``progress(step, running, mean loss)`` is called once a step.  Raises `FitError` when a loss is not finite.
    """
    count = next(iter(params.values())).shape[0]
    device = next(iter(params.values())).device
    final = {k: p.detach().clone() for k, p in params.items()}
    made, last = torch.zeros(count, dtype=torch.long, device=device), torch.full((count,), torch.inf, device=device)
    alive = torch.arange(count, device=device)
    now = {k: p.detach().clone() for k, p in params.items()}
    first = {k: torch.zeros_like(p) for k, p in now.items()}
    second = {k: torch.zeros_like(p) for k, p in now.items()}
    for step in range(1, steps + 2):  # the last round only measures
        leaves = {k: p.requires_grad_(True) for k, p in now.items()}
        try:
            total, compared = loss(leaves, alive)
        except torch.linalg.LinAlgError:
            raise FitError(f"the parameters grew until no basis could be made of them at step {step}; lower the learning rate") from None
        values = compared.detach().to(last.dtype)
        last[alive] = values
        broken = (~torch.isfinite(total.detach())).nonzero().flatten()
        if len(broken):
            raise FitError(
                f"problem {int(alive[broken[0]])} of {count}: the loss became NaN or infinite at step {step}; lower the learning rate"
            )
        if progress is not None:
            progress(step, len(alive), float(values.mean()))
        if step > steps:
            break
        keep = values >= stop if stop is not None else torch.ones_like(values, dtype=torch.bool)
        all_run = bool(keep.all())
        if not all_run and not bool(keep.any()):
            break
        gradients = dict(zip(leaves, torch.autograd.grad(total.sum(), list(leaves.values())), strict=True))
        with torch.no_grad():
            if not all_run:
                for k in now:
                    final[k][alive[~keep]] = now[k][~keep].detach()
                    now[k], first[k], second[k], gradients[k] = (t[keep].detach() for t in (now[k], first[k], second[k], gradients[k]))
                alive = alive[keep]
            made[alive] = step
            for k in now:
                now[k] = now[k].detach()
                first[k].lerp_(gradients[k], 1 - betas[0])
                second[k].lerp_(gradients[k].square(), 1 - betas[1])
                scale = (second[k] / (1 - betas[1] ** step)).sqrt_().add_(eps)
                now[k].mul_(1 - lr * weight_decay).addcdiv_(first[k], scale, value=-lr / (1 - betas[0] ** step))
    for k in now:
        final[k][alive] = now[k].detach()
    return Fitted(final, made, last)


class _TokenNLL(torch.autograd.Function):
    """−log softmax at the labels, its gradient made in one pass over the vocabulary instead of four."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        norm = logits.logsumexp(1)
        ctx.save_for_backward(logits, labels, norm)
        return norm - logits.gather(1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels, norm = ctx.saved_tensors
        out = (logits - norm[:, None]).exp_().mul_(gradient[:, None])
        out.scatter_add_(1, labels[:, None], -gradient[:, None])
        return out, None


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """[M]: negative log-likelihood of ``labels`` [M] under ``logits`` [M, V], natural logarithm."""
    out: Tensor = _TokenNLL.apply(logits, labels)  # type: ignore[no-untyped-call]
    return out
