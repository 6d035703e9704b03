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
from torch.optim.adamw import adamw

from errata.errors import FitError

# (parameters of the problems still running, their indices [e]) -> (loss to minimise [e], loss compared with the stop [e])
Loss = Callable[[Mapping[str, Tensor], Tensor], tuple[Tensor, Tensor]]


@dataclass
class Fitted:
    """params [E, …]; steps [E] updates made; loss [E] the last value compared with the stop."""

    params: dict[str, Tensor]
    steps: Tensor
    loss: Tensor


@dataclass(frozen=True)
class AdamW:
    """The update rule, on each number alone (Loshchilov & Hutter 2019; torch's defaults but for the decay).

    schedule    factor of ``lr`` at an update, by its number (from 1)
    """

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Callable[[int], float] = lambda step: 1.0

    def update(self, p: list[Tensor], gradient: list[Tensor], first: list[Tensor], second: list[Tensor], step: int) -> None:
        """Update number ``step`` (from 1) of the tensors and their moments, in place; torch's fused kernel, one pass over memory."""
        lr = self.lr * self.schedule(step)
        adamw(
            p, gradient, first, second, [], [torch.tensor(float(step - 1), device=t.device) for t in p], fused=True, amsgrad=False,
            beta1=self.betas[0], beta2=self.betas[1], lr=lr, weight_decay=self.weight_decay, eps=self.eps, maximize=False,
        )  # fmt: skip


def _evaluate(loss: Loss, leaves: Mapping[str, Tensor], alive: Tensor, count: int, step: int) -> tuple[Tensor, Tensor]:
    """The loss and what is compared with the stop; `FitError` names the problem that went wrong."""
    try:
        total, compared = loss(leaves, alive)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise FitError(f"the parameters grew until no basis could be made of them at step {step}; lower the learning rate") from None
    broken = (~torch.isfinite(total.detach())).nonzero().flatten()
    if len(broken):
        raise FitError(
            f"problem {int(alive[broken[0]])} of {count}: the loss became NaN or infinite at step {step}; lower the learning rate"
        )
    return total, compared.detach().float()


def fit(
    params: Mapping[str, Tensor],
    loss: Loss,
    *,
    steps: int,
    rule: AdamW,
    stop: float | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    project: Callable[[Mapping[str, Tensor], Tensor], None] | None = None,
) -> Fitted:
    """Up to ``steps`` updates of each problem; problem e ends when its compared loss is below ``stop``.

    ``project(params, alive)`` puts parameters back into their bounds, in place, after each update.

    ``progress(step, running, mean loss)`` is called once a step.  Raises `FitError` when a loss is not finite.
    """
    some = next(iter(params.values()))
    count, device = some.shape[0], some.device
    final = {k: p.detach().clone() for k, p in params.items()}
    made, last = torch.zeros(count, dtype=torch.long, device=device), torch.full((count,), torch.inf, device=device)
    alive = torch.arange(count, device=device)
    now = {k: p.detach().clone() for k, p in params.items()}
    first = {k: torch.zeros_like(p) for k, p in now.items()}
    second = {k: torch.zeros_like(p) for k, p in now.items()}
    for step in range(1, steps + 2):  # the last round only measures
        leaves = {k: p.requires_grad_(True) for k, p in now.items()}
        total, compared = _evaluate(loss, leaves, alive, count, step)
        last[alive] = compared
        if progress is not None:
            progress(step, len(alive), float(compared.mean()))
        keep = compared >= stop if stop is not None else torch.ones_like(alive, dtype=torch.bool)
        if step > steps or not bool(keep.any()):
            break
        gradients = dict(zip(leaves, torch.autograd.grad(total.sum(), list(leaves.values())), strict=True))
        now = {k: p.detach() for k, p in now.items()}
        if not bool(keep.all()):  # the finished leave with the parameters that met the stop
            for k in now:
                final[k][alive[~keep]] = now[k][~keep]
                now[k], first[k], second[k], gradients[k] = now[k][keep], first[k][keep], second[k][keep], gradients[k][keep]
            alive = alive[keep]
        made[alive] = step
        # the fused kernel reads memory in order, whatever the strides are: a gradient of W.mT comes transposed
        values = [list(d.values()) for d in (now, {k: gradients[k].contiguous() for k in now}, first, second)]
        rule.update(values[0], values[1], values[2], values[3], step)
        if project is not None:
            project(now, alive)
    for k in now:
        final[k][alive] = now[k].detach()
    return Fitted(final, made, last)


class _TokenNLL(torch.autograd.Function):
    """−log softmax at the labels.  [M, V] numbers are made once, on the way in, and turned into the gradient in place on the way back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = logits.log_softmax(1)
        ctx.labels, ctx.log_p = labels, log_p
        return -log_p.gather(1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out = ctx.log_p.exp_().mul_(gradient[:, None])
        out.scatter_add_(1, ctx.labels[:, None], -gradient[:, None])
        return out, None


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """[M]: negative log-likelihood of ``labels`` [M] under ``logits`` [M, V], natural logarithm."""
    out: Tensor = _TokenNLL.apply(logits, labels)  # type: ignore[no-untyped-call]
    return out
